"""PAPER.md shows the code as it stands, has every item of the paper, and names tests that exist.

    python -m experiments.test_paper   # after a change of code: the nearest lines go into PAPER.md
"""
import ast
import difflib
import re
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "PAPER.md"
TEXT = PAGE.read_text(encoding="utf-8")
EXCERPT = re.compile(r"`([\w/]+\.py)`, `([\w.]+)`\n\n```python\n(.*?)\n```", re.DOTALL)
COUNTS = {"Equation": 9, "Algorithm": 2, "Lemma": 1, "Theorem": 2, "Remark": 1, "Table": 9,
          "Figure": 5}


def nearest(file: str, name: str, shown: str) -> str:
    """The lines of a definition ("MAE.loss") most like an excerpt, without their indentation."""
    text = (ROOT / file).read_text(encoding="utf-8")
    node = ast.parse(text)
    for part in name.split("."):
        node = next(one for one in node.body if getattr(one, "name", None) == part or
                    isinstance(one, ast.Assign) and one.targets[0].id == part)
    lines, height = text.splitlines()[node.lineno - 1:node.end_lineno], shown.count("\n") + 1
    found = [textwrap.dedent("\n".join(lines[start:start + height]))
             for start in range(len(lines) - height + 1)]
    return max(found, key=lambda one: difflib.SequenceMatcher(None, one, shown).ratio())


@pytest.mark.parametrize("file, name, shown", EXCERPT.findall(TEXT))
def test_every_excerpt_stands_in_its_file(file, name, shown):
    assert shown == nearest(file, name, shown)


@pytest.mark.parametrize("item", [f"{kind} {number}" for kind, count in COUNTS.items()
                                  for number in range(1, count + 1)])
def test_every_numbered_item_has_a_heading(item):
    assert len(re.findall(rf"(?m)^### {item}\b", TEXT)) == 1


def test_every_test_of_the_index_exists():
    files = [ROOT / "test_all.py", *ROOT.glob("*/test_*.py")]
    written = "".join(file.read_text(encoding="utf-8") for file in files)
    missing = {name for name in re.findall(r"`(test_\w+)`", TEXT) if f"def {name}(" not in written}
    assert "`test_" in TEXT and not missing


def test_formulas_and_excerpts_are_read_as_such():
    """GitHub reads Markdown first: it eats a backslash before a sign, and "}_" may open italics."""
    formulas = re.findall(r"(?s)\n\$\$\n(.*?)\n\$\$\n", TEXT)
    assert len(formulas) == TEXT.count("$$") / 2
    for formula in formulas:
        assert formula.count("{") == formula.count("}")
        assert not re.search(r"\\[^A-Za-z]|[^A-Za-z0-9]_|[*<>&]", formula), formula
    assert len(EXCERPT.findall(TEXT)) == TEXT.count("```") / 2  # none escapes the test above


if __name__ == "__main__":
    PAGE.write_text(EXCERPT.sub(lambda match: match[0].replace(match[3], nearest(*match.groups())),
                                TEXT), encoding="utf-8")
