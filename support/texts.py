"""Texts as one tensor a split: the paper's four sets, the user's own files, and `pydocs`.

A name becomes texts with labels, texts become token ids, and the ids of a whole split lie end to
end in one int32 tensor (`Texts`). They are kept on disk under `cache/`, keyed by everything that
they depend on, and memory-mapped from there, so a second start neither parses nor tokenises.
Letters: N texts, B a batch of them, K the longest one's tokens.
"""
import ast
import hashlib
import json
import math
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from support import data, fetch
from support.fetch import BadInput

OFFICIAL = ("chemprot", "acl_arc", "scierc", "twitter_emotion")
Rows = list[tuple[str, str | None]]  # (text, label); the label is None where a file has none
Split = tuple[Rows, Rows, list[str], str]  # training rows, test rows, classes, a note


class Texts:
    """Token ids of many texts, end to end: text i is ids[offsets[i]:offsets[i + 1]]."""

    def __init__(self, ids: Tensor, offsets: Tensor, pad_id: int, truncated: int = 0):
        self.ids, self.offsets, self.pad_id, self.truncated = ids, offsets, pad_id, truncated

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def places(self, index: Tensor, width: int | None = None) -> tuple[Tensor, Tensor]:
        """Where in `ids` the texts at index [B] lie, [B, K], and Bool[B, K], True at padding.

        K is the given width or the longest text's.
        """
        index = index.cpu()  # offsets stay on the CPU, where finding the longest stops no device
        start = self.offsets[index]  # [B]
        length = self.offsets[index + 1] - start  # [B]
        column = torch.arange(width or int(length.max()))  # [K]
        place = (start[:, None] + column).clamp_(max=len(self.ids) - 1)  # [B, K]
        return place, column >= length[:, None]

    def __getitem__(self, index: Tensor) -> Tensor:
        """Ids [B, K] of the texts at index [B], padded to the longest of them."""
        place, padding = (x.to(self.ids.device) for x in self.places(index))  # 2 of [B, K]
        return self.ids[place].long().masked_fill_(padding, self.pad_id)

    def take(self, index: Tensor) -> "Texts":
        """The texts at index [n] alone, in that order."""
        length = self.offsets.diff()[index]  # [n]
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), length.cumsum(0)])  # [n + 1]
        shift = (self.offsets[index] - offsets[:-1]).repeat_interleave(length)  # [total]
        place = torch.arange(int(offsets[-1])) + shift  # [total]
        return Texts(self.ids[place.to(self.ids.device)], offsets, self.pad_id, self.truncated)

    def to(self, device: str | torch.device) -> "Texts":
        """The same texts with their ids on another device."""
        return Texts(self.ids.to(device), self.offsets, self.pad_id, self.truncated)


def load(name: str, data_dir: str | Path, tokenizer: Tokenizer | None, max_length: int) -> object:
    """Training and test texts of a data set, each `<s> … </s>` of at most max_length tokens.

    name is an official one, "pydocs", a .jsonl file or a folder of them. Raises BadInput for files
    that cannot be used.
    """
    if tokenizer is None:
        raise BadInput("the weights have no tokenizer.json beside them: put it there to read texts")
    files, read = sources(name, data_dir)
    fingerprint = digest(*(part for file in files for part in (file.name, read_bytes(file))))
    # this file's own text is part of the key: a changed reader must not meet an old cache
    key = digest(fingerprint, str(files[0]), tokenizer.to_str(), str(max_length),
                 Path(__file__).read_bytes())

    def make() -> tuple[dict[str, Tensor], dict]:
        train, test, classes, note = read(files)
        tensors, truncated = {}, {}
        for split, rows in (("train", train), ("test", test)):
            words = [text for text, _ in rows]
            ids, offsets, truncated[split] = tokenise(words, tokenizer, max_length)
            if empty := [i for i, length in enumerate(offsets.diff().tolist()) if length == 2]:
                raise BadInput(f"{name} ({split}): the tokenizer finds nothing in text "
                               f"{empty[0] + 1}, {words[empty[0]]!r}: remove it")
            tensors |= {f"{split}.ids": ids, f"{split}.offsets": offsets}
            if classes and rows:
                labels = [label for _, label in rows]
                tensors[f"{split}.labels"] = label_ids(labels, classes, f"{name} ({split})")
        known = {text for text, _ in train}
        return tensors, {"classes": classes, "note": note, "truncated": truncated,
                         "shared": sum(text in known for text, _ in test)}

    tensors, stored = data.cached(f"{Path(name).stem[:50]}-{key[:16]}", data_dir, make)
    note, counts = stored["note"], {split: len(tensors[f"{split}.offsets"]) - 1
                                    for split in ("train", "test")}
    if stored["shared"]:
        note += fetch.warn(f"also among the training texts: {stored['shared']} of "
                           f"{counts['test']} test texts")
    for split, cut in stored["truncated"].items():
        if cut:
            note += fetch.warn(f"longer than {max_length} tokens and cut: {cut} of "
                               f"{counts[split]} {split} texts")
    pad_id = tokenizer.token_to_id("<pad>")
    train, test = (Texts(tensors[f"{split}.ids"], tensors[f"{split}.offsets"], pad_id,
                         stored["truncated"][split]) for split in ("train", "test"))
    return data.Data(name=name, train=train, train_labels=tensors.get("train.labels"),
                test=test if len(test) else None, test_labels=tensors.get("test.labels"),
                classes=stored["classes"], metric="micro_f1" if name == "chemprot" else "macro_f1",
                fingerprint=fingerprint, note=note)


def sources(name: str, data_dir: str | Path) -> tuple[list[Path], Callable[[list[Path]], Split]]:
    """The files behind a dataset's name, and the function that reads them."""
    if name == "pydocs":
        return [file for modules in PYDOCS.values() for file in module_files(modules)], read_pydocs
    if name not in OFFICIAL:
        path = Path(name)
        files = [path] if path.is_file() else sorted(path.glob("*.jsonl"))
        if len(files) != 1 and not any(file.stem == "train" for file in files):
            raise BadInput(f"no texts at {name!r}: give {', '.join(OFFICIAL)}, pydocs, a .jsonl "
                           "file or a folder with train.jsonl and, if you have it, test.jsonl")
        return files, read_jsonl
    folder = Path(data_dir) / name
    folder = folder if folder.is_dir() else Path(fetch.dataset(name, data_dir))
    if name == "twitter_emotion":
        kinds, splits = ("text", "labels"), ("train", "val", "test")
        parts = [f"{split}_{kind}.txt" for split in splits for kind in kinds]
        return [folder / part for part in (*parts, "mapping.txt")], read_tweets
    return [folder / f"{split}.jsonl" for split in ("train", "dev", "test")], read_jsonl


def tokenise(rows: list[str], tokenizer: Tokenizer, max_length: int) -> tuple[Tensor, Tensor, int]:
    """All texts' ids end to end, their offsets, and how many texts were cut to max_length."""
    tokenizer = Tokenizer.from_str(tokenizer.to_str())  # a copy: the caller's keeps its settings
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # a text that spells out "<mask>" contains no mask
    start, end, room = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>"), max_length - 2
    found = [encoding.ids for encoding in tokenizer.encode_batch(rows, add_special_tokens=False)]
    ids = [i for text in found for i in (start, *text[:room], end)]
    offsets = torch.tensor([0] + [min(len(text), room) + 2 for text in found]).cumsum(0)  # [N + 1]
    return torch.tensor(ids, dtype=torch.int32), offsets, sum(len(text) > room for text in found)


def plain(path: str | Path, tokenizer: Tokenizer, max_length: int) -> tuple[list[str], Texts]:
    """The texts of a .jsonl file, or of any other with one a line; labels are not read."""
    path = Path(path)
    if path.suffix == ".jsonl":
        found = [text for text, _ in jsonl_rows(path)]
    else:
        found = [line for line in read_lines(path) if line.strip()]
    if not found:
        raise BadInput(f"{path} holds no texts")
    ids, offsets, cut = tokenise(found, tokenizer, max_length)
    if cut:
        fetch.warn(f"longer than {max_length} tokens and cut: {cut} of {len(found)} texts")
    return found, Texts(ids, offsets, tokenizer.token_to_id("<pad>"))


def label_ids(labels: list[str], classes: list[str], where: str) -> Tensor:
    unseen = sorted(set(labels) - set(classes))
    if unseen:
        raise BadInput(f"{where} has the label {unseen[0]!r}, which no training text has: "
                       f"they have {', '.join(classes)}")
    return torch.tensor([classes.index(label) for label in labels])


# ----------------------------------------------------------------------------- files


def digest(*parts: str | bytes) -> str:
    """One hex digest of several strings; lengths keep ("ab", "c") and ("a", "bc") apart."""
    total = hashlib.sha256()
    for part in parts:
        # a file name may be any bytes, which Python has as half surrogate pairs
        part = part.encode(errors="surrogatepass") if isinstance(part, str) else part
        total.update(len(part).to_bytes(8, "little") + part)
    return total.hexdigest()


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror})") from error


def read_lines(path: Path) -> list[str]:
    """Lines of a UTF-8 file; only a newline ends one, as tweets contain Unicode's other breaks."""
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def jsonl_rows(path: Path) -> Rows:
    """(text, label) of every line `{"text": …, "label": …}`; all lines have a label or none has."""
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{path}, line {number}: not JSON ({error})") from error
        text, label = (row.get("text"), row.get("label")) if isinstance(row, dict) else (None, None)
        if not isinstance(text, str) or not text.strip() or not any(map(str.isprintable, text)):
            raise BadInput(f'{path}, line {number}: no "text" with words in it')
        if not isinstance(label, str | None):
            raise BadInput(f'{path}, line {number}: "label" is {label!r}, but must be a string')
        if rows and (label is None) != (rows[0][1] is None):
            raise BadInput(f"{path}, line {number}: some lines have a label and some have none")
        # half a surrogate pair ("\ud83d" alone, from cut emoji) is legal JSON but no text
        rows.append((text.encode(errors="replace").decode(), label))
    if not rows:
        raise BadInput(f"{path} holds no texts")
    return rows


def read_jsonl(files: list[Path]) -> Split:
    """train.jsonl and test.jsonl, or one file that is split 80 : 20 where it has labels."""
    named = {file.stem: file for file in files}
    source = named.get("train", files[0])
    train, test, note = jsonl_rows(source), [], f"from {source.parent}"
    if "test" in named and source != named["test"]:
        test = jsonl_rows(named["test"])
        if (test[0][1] is None) != (train[0][1] is None):
            raise BadInput(f"{source.parent}: of train.jsonl and test.jsonl only one has labels")
    elif train[0][1] is not None:
        train, test = divide(train, 0.8)
        note = f"from {source}, divided 80 : 20"
        if not test:
            raise BadInput(f"{source} has too few texts of each label to hold a fifth out: add "
                           "more, or a test.jsonl beside a train.jsonl")
    if "dev" in named:
        note += f"; its {len(jsonl_rows(named['dev']))} development texts are not used"
    return train, test, sorted({label for _, label in train if label is not None}), note


def read_tweets(files: list[Path]) -> Split:
    """TweetEval's emotion set: texts and class numbers line by line, the names in mapping.txt."""
    lines = {file.stem: read_lines(file) for file in files}
    names = {line.partition("\t")[0]: line.partition("\t")[2] for line in lines["mapping"]}
    splits = {}
    for split in ("train", "val", "test"):
        texts, labels = lines[f"{split}_text"], lines[f"{split}_labels"]
        if len(texts) != len(labels) or not set(labels) <= set(names):
            raise BadInput(f"{files[0].parent}: {split}_labels.txt must have {len(texts)} lines as "
                           f"{split}_text.txt has, each a number of mapping.txt, not {len(labels)}")
        splits[split] = [(text, names[label]) for text, label in zip(texts, labels, strict=True)]
    note = f"from {files[0].parent}; its {len(splits['val'])} development texts are not used"
    return splits["train"], splits["test"], list(names.values()), note


def divide(rows: Rows, share: float) -> tuple[Rows, Rows]:
    """Two parts by a hash of the text: equal texts together, every class in the first."""
    label_of = dict(reversed(rows))  # of equal texts the first one's label
    train = set()
    for wanted in sorted(set(label_of.values())):
        of_class = sorted((text for text, label in label_of.items() if label == wanted), key=digest)
        train |= set(of_class[:math.ceil(share * len(of_class))])
    return [row for row in rows if row[0] in train], [row for row in rows if row[0] not in train]


# ----------------------------------------------------------------------------- pydocs

# class -> modules: rich in docstrings, in every Python from 3.11 to 3.14, never packaged apart
PYDOCS = {"asyncio": ("asyncio",), "decimal": ("_pydecimal", "fractions", "statistics"),
          "email": ("email",), "http": ("http", "urllib"), "importlib": ("importlib",),
          "logging": ("logging",), "mailbox": ("mailbox",),
          "multiprocessing": ("multiprocessing", "concurrent"), "tarfile": ("tarfile", "zipfile"),
          "unittest": ("unittest",), "xml": ("xml",)}
SHORTEST = 5  # words


def stdlib() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def module_files(modules: Iterable[str]) -> list[Path]:
    """Source files of standard modules and packages, their tests left out."""
    found = []
    for module in modules:
        file, package = stdlib() / f"{module}.py", stdlib() / module
        inside = sorted(f for f in package.rglob("*.py") if not {"test", "tests"} & set(f.parts))
        found += [file] if file.exists() else inside
    if not found:
        raise BadInput(f"this Python has no sources of {', '.join(modules)} in {stdlib()}, which "
                       "pydocs reads: choose another --dataset")
    return found


def docstrings(file: Path) -> Iterator[str]:
    """Docstrings of a Python file's module, classes and functions, one line each."""
    for node in ast.walk(ast.parse(read_bytes(file))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield " ".join((ast.get_docstring(node) or "").split())


def read_pydocs(files: list[Path]) -> Split:
    """Docstrings labelled by the package that they come from, without that package's own name."""
    rows = {}
    for label, modules in PYDOCS.items():
        names = "|".join(sorted({name.strip("_") for name in (label, *modules)}))
        own_name = re.compile(rf"(?<![A-Za-z0-9])(?:{names})(?![A-Za-z0-9])", re.IGNORECASE)
        for text in (text for file in module_files(modules) for text in docstrings(file)):
            text = " ".join(own_name.sub("", text).split())
            if len(text.split()) >= SHORTEST:
                rows.setdefault(text, label)
    train, test = divide(list(rows.items()), 0.7)
    version = ".".join(map(str, sys.version_info[:3]))
    note = f"docstrings of Python {version}'s standard library, divided 70 : 30"
    return train, test, sorted(PYDOCS), note


def pydocs_other() -> Iterator[str]:
    """English from the modules that pydocs does not read: long strings and comments, each once."""
    used = {name.strip("_") for label, modules in PYDOCS.items() for name in (label, *modules)}
    seen = set()
    for file in sorted(stdlib().rglob("*.py")):
        parts = file.relative_to(stdlib()).parts
        words = set(re.split(r"[._/]", "/".join(parts)))
        if used & words or {"site-packages", "dist-packages"} & set(parts):
            continue
        try:
            source = file.read_text(encoding="utf-8")
            nodes = list(ast.walk(ast.parse(source)))
        except (SyntaxError, ValueError):  # some tests are wrong on purpose
            continue
        values = [node.value for node in nodes if isinstance(node, ast.Constant)]
        comments = re.findall(r"(?m)(?:^[ \t]*#.*\n)+", source)
        found = [value for value in values if isinstance(value, str)]
        found += [re.sub(r"(?m)^[ \t]*#+", "", comment) for comment in comments]
        for text in (" ".join(text.split()) for text in found):
            letters = sum(c.isascii() and (c.isalpha() or c == " ") for c in text)
            if text.count(" ") < 7 or letters < 0.8 * len(text) or not text.isprintable():
                continue  # too short to say anything, or no English
            if text not in seen:
                seen.add(text)
                yield text
