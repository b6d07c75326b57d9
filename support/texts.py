"""Texts: what a file holds, token ids and batches; the paper's four sets, own files, `pydocs`.

Letters: N texts, B a batch of them, K the longest one's tokens.
"""
import ast
import hashlib
import itertools
import json
import math
import re
import sysconfig
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from support import fetch
from support.fetch import BadInput

Rows = list[tuple[str, str | None]]  # (text, label); the label is None where a file has none
Lists = tuple[list[str], Rows, Rows, list[str]]  # classes, training and test texts, what to tell


class Texts:
    """Token ids of many texts, end to end: text i is ids[offsets[i]:offsets[i + 1]]."""

    def __init__(self, ids: Tensor, offsets: Tensor, pad_id: int):
        self.ids, self.offsets, self.pad_id = ids, offsets, pad_id

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
        length = self.offsets.diff()  # [N]
        each = self.ids.split(length.tolist())
        ids = torch.cat([self.ids[:0], *(each[i] for i in index.tolist())])  # [total]
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), length[index].cumsum(0)])  # [n + 1]
        return Texts(ids, offsets, self.pad_id)

    def to(self, device: str | torch.device) -> "Texts":
        """The same texts with their ids on another device."""
        return Texts(self.ids.to(device), self.offsets, self.pad_id)


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


def plain(path: str | Path, tokenizer: Tokenizer, max_length: int) -> tuple[list[str], Texts]:
    """The texts of a .jsonl file, or of any other with one a line; labels are not read."""
    path = Path(path)
    found = [text for text, _ in jsonl_rows(path)] if path.suffix == ".jsonl" else [
        line for line in lines(path) if line.strip()]
    if not found:
        raise BadInput(f"{path} holds no texts")
    ids, offsets, cut = tokenise(found, tokenizer, max_length)
    if cut:
        fetch.warn(f"longer than {max_length} tokens and cut: {cut} of {len(found)} texts")
    return found, Texts(ids, offsets, tokenizer.token_to_id("<pad>"))


# ----------------------------------------------------------------------------- files to texts


def files(name: str, root: Path) -> list[Path]:
    """The files of a data set in its folder, or one's own: a .jsonl file or a folder of them."""
    if name == "pydocs":
        return pydocs_files()
    if name == "twitter_emotion":
        return [root / f"{split}_{kind}.txt" for split in ("train", "val", "test")
                for kind in ("text", "labels")] + [root / "mapping.txt"]
    if name in fetch.datasets():
        return [root / f"{split}.jsonl" for split in ("train", "dev", "test")]
    found = [root] if root.is_file() else sorted(root.glob("*.jsonl"))
    if len(found) != 1 and not any(file.stem == "train" for file in found):
        raise BadInput(f"no texts at {root}: give a .jsonl file or a folder with train.jsonl and, "
                       "if you have it, test.jsonl")
    return found


def read(name: str, files: list[Path], tokenizer: Tokenizer,
         max_length: int) -> tuple[dict[str, Tensor], dict]:
    """Token ids, offsets and labels of each split; classes, what to tell.

    BadInput for files that cannot be used.
    """
    reader = {"pydocs": _pydocs, "twitter_emotion": _tweets}.get(name, _jsonl)
    classes, train, test, told = reader(files)
    tensors = {}
    for split, rows in (("train", train), ("test", test)):
        if not rows:
            continue
        words = [text for text, _ in rows]
        tensors[split], tensors[f"{split}_offsets"], cut = tokenise(words, tokenizer, max_length)
        if classes:
            tensors[f"{split}_labels"] = torch.tensor([classes.index(name) for _, name in rows])
        if cut:
            told.append(f"longer than {max_length} tokens and cut: {cut} of {len(rows)} {split} "
                        "texts")
    return tensors, {"classes": classes, "told": told}


def digest(*parts: str | bytes) -> str:
    """One hex digest of several strings; lengths keep ("ab", "c") and ("a", "bc") apart."""
    total = hashlib.sha256()
    for part in parts:
        # a file name may be any bytes, which Python has as half surrogate pairs
        part = part.encode(errors="surrogatepass") if isinstance(part, str) else part
        total.update(len(part).to_bytes(8, "little") + part)
    return total.hexdigest()


def lines(path: Path) -> list[str]:
    """Lines of a UTF-8 file; only a newline ends one, as tweets contain Unicode's other breaks."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def jsonl_rows(path: Path) -> Rows:
    """(text, label) of every line `{"text": …, "label": …}`; all lines have a label or none has."""
    rows = []
    for number, line in enumerate(lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{where}: not JSON ({error})") from error
        text, label = (row.get("text"), row.get("label")) if isinstance(row, dict) else (None, None)
        if not isinstance(text, str) or not text.strip():
            raise BadInput(f'{where}: no "text" with words in it')
        if not isinstance(label, str | None):
            raise BadInput(f'{where}: "label" is {label!r}, but must be a string')
        # half a surrogate pair ("\ud83d" alone, from cut emoji) is legal JSON but no text
        rows.append((text.encode(errors="replace").decode(), label))
        if (label is None) != (rows[0][1] is None):
            raise BadInput(f"{where}: some lines have a label and some have none")
    if not rows:
        raise BadInput(f"{path} holds no texts")
    return rows


def _jsonl(files: list[Path]) -> Lists:
    """train.jsonl and test.jsonl, or one file that is divided 80 : 20 where it has labels."""
    named = {file.stem: file for file in files}
    source = named.get("train", files[0])
    train, test, told = jsonl_rows(source), [], []
    if "test" in named and source != named["test"]:
        test = jsonl_rows(named["test"])
    elif train[0][1] is not None:
        train, test = divide(train, 0.8)
        told = ["no test.jsonl: a fifth of each label, by a hash of the text, is held out"]
        if not test:
            raise BadInput(f"{source} has too few texts of each label to hold a fifth out: add "
                           "more, or a test.jsonl beside a train.jsonl")
    classes = sorted({label for _, label in train if label is not None})
    for _, label in test:
        if label not in (classes or [None]):
            raise BadInput(f"{named['test']} has the label {label!r}, which no training text has: "
                           f"they have {', '.join(classes) or 'none'}")
    if "dev" in named:
        told.append(f"not used: {len(jsonl_rows(named['dev']))} development texts")
    return classes, train, test, told


def _tweets(files: list[Path]) -> Lists:
    """TweetEval's emotion set: texts and class numbers line by line, the names in mapping.txt."""
    found = {file.stem: lines(file) for file in files}
    names = dict(line.split("\t", 1) for line in found["mapping"])

    def split(name: str) -> Rows:
        pairs = zip(found[f"{name}_text"], found[f"{name}_labels"], strict=True)
        return [(text, names[label]) for text, label in pairs]

    told = [f"not used: {len(split('val'))} development texts"]
    return list(names.values()), split("train"), split("test"), told


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


def _pydocs(files: list[Path]) -> Lists:
    """Docstrings labelled by the package that they come from, without that package's own name."""
    label_of = {module: label for label, modules in PYDOCS.items() for module in modules}
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    rows = {}
    for file in files:
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
    return sorted(PYDOCS), *divide(list(rows.items()), 0.7), []
