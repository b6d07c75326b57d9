"""Texts: what a file holds, token ids and batches; the paper's four sets, own files, `pydocs`.

Letters: N texts, B a batch of them, K the longest one's tokens.
"""
import ast
import csv
import hashlib
import itertools
import json
import math
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from support import fetch
from support.fetch import BadInput, Lists
from support.images import SUFFIXES as PICTURES

SUFFIXES = (".jsonl", ".csv", ".tsv", ".txt")
Rows = list[tuple[str, str | None]]  # (text, label); the label is None where a file has none


class Texts:
    """Token ids of many texts, end to end: text i is ids[offsets[i]:offsets[i + 1]]. On the CPU."""

    def __init__(self, ids: Tensor, offsets: Tensor, pad_id: int):
        self.ids, self.offsets, self.pad_id = ids, offsets, pad_id

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def places(self, index: Tensor, width: int | None = None) -> tuple[Tensor, Tensor]:
        """Where in `ids` the texts at index [B] lie, [B, K], and Bool[B, K], True at padding.

        K is the given width or the longest text's.
        """
        start = self.offsets[index]  # [B]
        length = self.offsets[index + 1] - start  # [B]
        column = torch.arange(width or int(length.max()))  # [K]
        place = (start[:, None] + column).clamp_(max=len(self.ids) - 1)  # [B, K]
        return place, column >= length[:, None]

    def __getitem__(self, index: Tensor) -> Tensor:
        """Ids [B, K] of the texts at index [B], padded to the longest of them."""
        place, padding = self.places(index)  # 2 of [B, K]
        return self.ids[place].long().masked_fill_(padding, self.pad_id)

    def take(self, index: Tensor) -> "Texts":
        """The texts at index [n] alone, in that order."""
        each = self.ids.split(self.offsets.diff().tolist())
        chosen = [each[i] for i in index.tolist()]
        offsets = torch.tensor([0] + [len(ids) for ids in chosen]).cumsum(0)  # [n + 1]
        return Texts(torch.cat([self.ids[:0], *chosen]), offsets, self.pad_id)


def tokenise(texts: list[str], tokenizer: Tokenizer, max_length: int) -> tuple[Tensor, Tensor, int]:
    """All texts' ids end to end, their offsets, and how many texts were cut to max_length.

    Each is `<s> … </s>`. BadInput for a text in which the tokenizer finds nothing.
    """
    tokenizer = Tokenizer.from_str(tokenizer.to_str())  # a copy: the caller's keeps its settings
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # a text that spells out "<mask>" contains no mask
    start, end, room = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>"), max_length - 2
    found = [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    if [] in found:
        raise BadInput(f"the tokenizer finds nothing in {texts[found.index([])]!r}: remove it")
    ids = [i for text in found for i in (start, *text[:room], end)]
    offsets = torch.tensor([0] + [min(len(text), room) + 2 for text in found]).cumsum(0)  # [N + 1]
    return torch.tensor(ids, dtype=torch.int32), offsets, sum(len(text) > room for text in found)


def plain(path: str | Path, tokenizer: Tokenizer, max_length: int,
          text_key: str = "text") -> tuple[list[str], Texts]:
    """The texts of a file as `rows` reads it; its labels are left aside."""
    found = [text for text, _ in rows(Path(path), text_key)]
    ids, offsets, cut = tokenise(found, tokenizer, max_length)
    if cut:
        fetch.warn(f"longer than {max_length} tokens and cut: {cut} of {len(found)} texts")
    return found, Texts(ids, offsets, tokenizer.token_to_id("<pad>"))


# ----------------------------------------------------------------------------- files to texts


def holds(path: Path) -> bool:
    """Whether a path is of texts: such a file, or a folder of them without pictures or folders."""
    if not path.is_dir():
        return path.suffix.lower() in SUFFIXES
    found = [file for file in path.iterdir() if fetch.shown(file.name)]
    kinds = {file.suffix.lower() for file in found}
    return not kinds.isdisjoint(SUFFIXES) and kinds.isdisjoint(PICTURES) and not any(
        map(Path.is_dir, found))


def lines(path: Path) -> list[str]:
    """Lines of a UTF-8 file; only a newline ends one, as tweets contain Unicode's other breaks."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def records(path: Path, text_key: str) -> Iterator[tuple[str, dict]]:
    """Where each line is and what it holds: JSON, a .csv's or .tsv's row, or simply a text."""
    kind, content = path.suffix.lower(), lines(path)
    if kind in (".csv", ".tsv"):
        table = csv.DictReader([line + "\n" for line in content], strict=True,
                               delimiter="," if kind == ".csv" else "\t")
        try:
            for row in table:
                if None in row or None in row.values():
                    raise csv.Error("it has not as many fields as the first line")
                yield f"{path}, line {table.line_num}", row
        except csv.Error as error:
            raise BadInput(f"{path}, line {table.line_num}: not {kind} ({error})") from error
        return
    for number, line in enumerate(content, 1):
        where, json_line = f"{path}, line {number}", kind == ".jsonl" and line.strip()
        if json_line and json_line[0] == "[":
            raise BadInput(f"{where}: a JSON array: write one object a line")
        try:
            row = json.loads(line) if json_line else {text_key: line}
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{where}: not JSON ({error})") from error
        if line.strip():
            yield where, row if isinstance(row, dict) else {}


def rows(path: Path, text_key: str, label_key: str = "label") -> Rows:
    """The (text, label)s of a file; all have a label or none has. BadInput where that is not so."""
    found = []
    for where, record in records(path, text_key):
        text, label = record.get(text_key), record.get(label_key)
        if not isinstance(text, str) or not text.strip():
            raise BadInput(f'{where}: no "{text_key}" with words in it (--text-key); it has '
                           f"{', '.join(record) or 'nothing'}")
        label = str(label) if isinstance(label, int) else label or None
        if not isinstance(label, str | None):
            raise BadInput(f'{where}: "{label_key}" is {label!r}, but must be a word, a whole '
                           "number, true or false")
        # half a surrogate pair ("\ud83d" alone, from cut emoji) is legal JSON but no text
        found.append((text.encode(errors="replace").decode(), label))
        if (label is None) != (found[0][1] is None):
            raise BadInput(f"{where}: some lines have a label and some have none")
    if not found:
        raise BadInput(f"{path} holds no texts")
    return found


def parts(root: Path) -> tuple[dict[str, Path], list[str]]:
    """The files of train, test and unlabelled, or the only one as train; and what is not used."""
    files = [path for path in fetch.files(root) if path.suffix.lower() in SUFFIXES]
    found = {} if root.is_file() else fetch.splits(files)
    if not found and len(files) > 1:
        raise BadInput(f"{root} holds {', '.join(path.name for path in files)}: call one train")
    found = found or {"train": files[0]}
    return found, [path.name for path in files if path not in found.values()]


def _tweets(root: Path) -> Lists:
    """TweetEval's emotion set: texts and class numbers line by line, the names in mapping.txt."""
    names = dict(line.split("\t", 1) for line in lines(root / "mapping.txt"))

    def split(name: str) -> Rows:
        texts, labels = (lines(root / f"{name}_{kind}.txt") for kind in ("text", "labels"))
        return [(text, names[label]) for text, label in zip(texts, labels, strict=True)]

    return Lists(list(names.values()), split("train"), split("test"))


def held_out(rows: Rows, share: float = 0.8) -> dict[str, list[int]]:
    """Indices of train, with a share of each class, and test, by a hash; equal texts together."""
    def place(text: str) -> bytes:
        content = text.encode()
        return hashlib.sha256(len(content).to_bytes(8, "little") + content).digest()

    label_of = dict(reversed(rows))  # of equal texts the first one's label
    train = set()
    for wanted in sorted(set(label_of.values())):
        of_class = sorted((text for text, label in label_of.items() if label == wanted), key=place)
        train |= set(of_class[:math.ceil(share * len(of_class))])
    found = {"train": [], "test": []}
    for i, (text, _) in enumerate(rows):
        found["train" if text in train else "test"].append(i)
    return found


# ----------------------------------------------------------------------------- pydocs

# class -> modules: rich in docstrings, in every Python from 3.11 to 3.14, never packaged apart
PYDOCS = {"asyncio": ("asyncio",), "decimal": ("_pydecimal", "fractions", "statistics"),
          "email": ("email",), "http": ("http", "urllib"), "importlib": ("importlib",),
          "logging": ("logging",), "mailbox": ("mailbox",),
          "multiprocessing": ("multiprocessing", "concurrent"), "tarfile": ("tarfile", "zipfile"),
          "unittest": ("unittest",), "xml": ("xml",)}


def stdlib() -> Path:
    """Where this Python keeps its own modules."""
    return Path(sysconfig.get_paths()["stdlib"])


def pydocs_files() -> list[Path]:
    """The source files of these modules and packages, their tests left out."""
    found = []
    for module in itertools.chain(*PYDOCS.values()):
        file, package = stdlib() / f"{module}.py", stdlib() / module
        inside = sorted(f for f in package.rglob("*.py") if not {"test", "tests"} & set(f.parts))
        found += [file] if file.exists() else inside
    return found


def _pydocs(_: Path) -> Lists:
    """Docstrings labelled by the package that they come from, without that package's own name."""
    label_of = {module: label for label, modules in PYDOCS.items() for module in modules}
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    rows = {}
    for file in pydocs_files():
        label = label_of[file.relative_to(stdlib()).parts[0].removesuffix(".py")]
        names = "|".join(sorted({name.strip("_") for name in (label, *PYDOCS[label])}))
        own_name = re.compile(rf"(?<![A-Za-z0-9])(?:{names})(?![A-Za-z0-9])", re.IGNORECASE)
        for node in ast.walk(ast.parse(file.read_bytes())):
            text = ast.get_docstring(node) if isinstance(node, documented) else None
            words = own_name.sub("", text or "").split()
            if len(words) >= 5:
                rows.setdefault(" ".join(words), label)
    if not rows:
        raise BadInput(f"this Python has no sources in {stdlib()}: choose another --dataset")
    rows = list(rows.items())
    train, test = ([rows[i] for i in index] for index in held_out(rows, 0.7).values())
    return Lists(sorted(PYDOCS), train, test)


READERS = {"twitter_emotion": _tweets, "pydocs": _pydocs}  # the others are as one's own are
