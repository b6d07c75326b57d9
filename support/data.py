"""Data by name: a data set's splits as one tensor each, cached on disk, checked and cut to size.

`look` lists what is there, before weights are fetched; `load` decodes it as the model takes it.
"""
import contextlib
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import PIL
import torch
from torch import Tensor, nn

from support import fetch, images, texts, toybirds, weights
from support.draws import generator
from support.fetch import BadInput, Lists
from support.settings import Config

Examples = Tensor | images.Small | texts.Texts
Made = tuple[dict[str, Tensor], dict]  # what is cached: tensors, and facts about them
SPLITS = ("train", "test", "unlabelled")
READERS = images.READERS | texts.READERS | {"toybirds": toybirds.lists}


@dataclass
class Data:
    """One data set, as the models take it.

    train, test, unlabelled: uint8 pixels [N, 3, S, S], `images.Small` or `texts.Texts`; labels:
    Long[N], None without. metric: how §5 scores it. fingerprint: hash of the content. note: where
    it came from, one line.
    """

    name: str
    train: Examples
    train_labels: Tensor | None
    test: Examples | None
    test_labels: Tensor | None
    classes: list[str]
    metric: str
    fingerprint: str
    note: str
    unlabelled: Examples | None = None

    @property
    def labelled(self) -> bool:
        """Whether both splits have labels, so that a classifier can be trained and measured."""
        return self.train_labels is not None and self.test_labels is not None

    @property
    def n_unlabelled(self) -> int:
        """How many examples D_u has beside those of the training split."""
        return 0 if self.unlabelled is None else len(self.unlabelled)

    @cached_property
    def pool(self) -> Examples:
        """D_u, the training examples and the unlabelled ones."""
        a, b = self.train, self.unlabelled
        if b is None or torch.is_tensor(a):
            return a if b is None else torch.cat([a, b])
        offsets = torch.cat([a.offsets, b.offsets[1:] + len(a.ids)])  # [N + 1]
        return texts.Texts(torch.cat([a.ids, b.ids]), offsets, a.pad_id)


# ----------------------------------------------------------------------------- a name to lists


def look(config: Config) -> Lists:
    """What --dataset holds, cut to size; BadInput for what cannot be found or learnt from."""
    name, published = config.dataset, config.dataset in fetch.datasets()
    root = fetch.dataset(name, config.data_dir) if published else Path(name).absolute()
    read = partial(READERS[name], root) if name in READERS else partial(_own, config, root)
    try:
        found = read() if name != "pydocs" else Lists(**cached(  # a second's work
            config, (sys.version,), [], lambda: ({}, read()._asdict()))[1])
        if published and not (found.train and found.test):
            raise ValueError("a split is empty")
        for split in ("train", "test"):
            _labels(found, split)  # are all of the classes'?
    except Exception as error:  # lists, .mat and binary files fail in as many ways
        if not published or isinstance(error, MemoryError):
            raise
        raise BadInput(f"{root} does not hold {name} as it is published ({fetch.brief(error)}): "
                       "move it away to have it fetched anew") from error
    if len(found.classes) == 1:
        raise BadInput(f"{name} has one class, {found.classes[0]!r}: have two or more, or none (no "
                       "folders, no labels) to pre-train alone")
    return _cut(found, config)


def _own(config: Config, root: Path) -> Lists:
    """One's own data, and what is published in the same form: divided where there is no test."""
    kind, keys, published = images, (), config.dataset in fetch.datasets()
    if config.modality == "text":
        kind, keys = texts, (config.text_key, config.label_key)
    parts, unused = kind.parts(root)
    if published:  # val is not to stand in for a test split that is missing
        parts = {split: path for split, path in parts.items() if path.stem == split}
    train, test, free = (kind.rows(parts[split], *keys) if split in parts else []
                         for split in SPLITS)
    others = Counter(path.suffix.lower() or path.name for path in fetch.files(root))
    unused += [f"{count} {name}" for name, count in others.items() if name not in kind.SUFFIXES]
    told = [f"not used: {', '.join(unused)}"] if unused else []
    classes = sorted({label for _, label in train} - {None})
    if kind is texts and not classes:
        _, record = next(texts.records(parts["train"], config.text_key))
        told.append(f"no labels (--label-key): {parts['train'].name} has {', '.join(record)}")
    if classes and not test and not published:
        told.append("no test split: a fifth of each class, by a hash of the content, is held out")
        _, index = cached(config, (), train, lambda: ({}, kind.held_out(train)))
        train, test = ([train[i] for i in index[split]] for split in ("train", "test"))
        if not test:
            raise BadInput(f"{parts['train']} has too few of each class to hold a fifth out: add "
                           "more, or have test beside train")
    return Lists(classes, train, test, [(source, None) for source, _ in free], told)


def _labels(found: Lists, split: str) -> Tensor | None:
    """Long[N], or None without labels; BadInput for one that is none of the classes."""
    number = {label: i for i, label in enumerate(found.classes)} or {None: 0}
    labels = [label for _, label in getattr(found, split)]
    if alien := [label for label in labels if label not in number]:
        raise BadInput(f"the {split} split has the label {alien[0]!r}, but the classes are "
                       f"{', '.join(found.classes) or 'none'}: have the same in all")
    return torch.tensor([number[label] for label in labels]) if found.classes and labels else None


def _cut(found: Lists, config: Config) -> Lists:
    """The lists with --train-size training examples; under --smoke with few of all splits."""
    size, N = config.train_size, len(found.train)
    if config.smoke:
        size = size or min(max(80, len(found.classes)), N)
        for split in ("test", "unlabelled"):
            rows = getattr(found, split)
            few = torch.randperm(len(rows), generator=generator(config.seed, "smoke"))[:64]
            found = found._replace(**{split: [rows[i] for i in few]})
    if size is None or size == N:
        return found
    if size > N:
        raise BadInput(f"--train-size is {size}, but {config.dataset} has {N} training examples: "
                       "use fewer or leave it out")
    few = balanced(_labels(found, "train"), N, size, generator(config.seed, "subset"))
    return found._replace(train=[found.train[i] for i in few])


def balanced(labels: Tensor | None, examples: int, size: int, draws: torch.Generator) -> Tensor:
    """Indices Long[size] in rising order, as equal a number from every class as there are examples.

    They are shuffled, then taken in turn: each class's first, each class's second, and so on.
    """
    shuffled = torch.randperm(examples, generator=draws)
    if labels is None:
        return shuffled[:size].sort().values
    classes = labels.unique()
    if size < len(classes):
        raise BadInput(f"--train-size {size} is less than the {len(classes)} classes: use at least "
                       "one each")
    turn = torch.empty(examples, dtype=torch.long)
    for label in classes:
        members = shuffled[labels[shuffled] == label]
        turn[members] = torch.arange(len(members))
    # ties (the same turn, different classes) go by the shuffled order
    return shuffled[turn[shuffled].argsort(stable=True)][:size].sort().values


# ----------------------------------------------------------------------------- lists to tensors


def load(config: Config, model: nn.Module, found: Lists | None = None) -> Data:
    """What --dataset holds, or `look` has found, as the model takes it; BadInput if unreadable."""
    found, name, metric = found or look(config), config.dataset, "accuracy"
    if model.modality == "text":
        metric = "micro_f1" if name == "chemprot" else "macro_f1"
        if model.tokenizer is None:
            raise BadInput("the weights have no tokenizer.json beside them: put it there to read "
                           "texts")
    splits, seen, content, told = {}, dict.fromkeys(SPLITS, ()), "", list(found.told)
    for split in [split for split in SPLITS if getattr(found, split)]:
        splits[split], facts = _decoded(config, model, found, split)
        seen[split] = facts["hashes"]
        content += facts["content"]
        told += facts["told"]
    known = {*seen["train"], *seen["unlabelled"]}
    if shared := sum(example in known for example in seen["test"]):
        told.append(f"also to be learnt from: {shared} of {len(seen['test'])} test examples")
    note = fetch.datasets()[name]["source"] if name in fetch.datasets() else name
    return Data(name, splits["train"], _labels(found, "train"), splits.get("test"),
                _labels(found, "test"), found.classes, metric,
                hashlib.sha256(content.encode()).hexdigest(),
                note + "".join(map(fetch.warn, told)), splits.get("unlabelled"))


def _decoded(config: Config, model: nn.Module, found: Lists, split: str) -> tuple[Examples, dict]:
    """A split as the model takes it; hashes of all and of each example, and what to tell."""
    rows, sizes, text = getattr(found, split), model.config, model.modality == "text"

    def make() -> Made:
        sources, tensors, told = [source for source, _ in rows], {}, []
        if text:
            x, offsets, cut = texts.tokenise(sources, model.tokenizer, sizes.max_length)
            each, tensors = x.split(offsets.diff().tolist()), {"offsets": offsets}
            if cut:
                told.append(f"longer than {sizes.max_length} tokens and cut: {cut} of "
                            f"{len(sources)} {split} texts")
        elif config.dataset == "toybirds":
            x = each = toybirds.toybirds(split, toybirds.EACH[split], sizes.image_size)[0][sources]
        else:
            x = each = images.decode_all(sources, sizes.image_size, split)
        content = hashlib.sha256(x.numpy())
        if split != "unlabelled" and found.classes:
            content.update(_labels(found, split).numpy())
        hashes = [hashlib.sha256(example.numpy()).hexdigest()[:16] for example in each]
        return tensors | {"x": x}, {"content": content.hexdigest(), "hashes": hashes, "told": told}

    depends = (model.tokenizer.to_str(), sizes.max_length) if text else (
        PIL.__version__, sizes.image_size)
    tensors, facts = cached(config, (split, found.classes, *depends), rows, make)
    x = tensors["x"]
    if text:
        x = texts.Texts(x, tensors["offsets"], model.tokenizer.token_to_id("<pad>"))
    elif x.shape[-1] < sizes.image_size:
        x = images.Small(x, sizes.image_size)
    return x, facts


def _state(source: object) -> object:
    """What differs as soon as a source does."""
    if isinstance(source, Path):
        with contextlib.suppress(OSError):  # where it is missing, reading it will tell
            now = source.stat()  # ctime: what writes other pixels may keep mtime
            return source.name, now.st_size, now.st_mtime_ns, now.st_ctime_ns
    return hashlib.sha256(source).digest() if isinstance(source, np.ndarray) else source


def cached(config: Config, depends: tuple, rows: list[tuple], make: Callable[[], Made]) -> Made:
    """The tensors and facts of make(), from the second time on mapped from a file.

    Beside the code they depend on depends and the rows alone. The file lies in data_dir/cache or,
    where that cannot be written, in the user's own; one that cannot be read is made anew.
    """
    code = [fetch.digest(fetch.ROOT / f"support/{file}.py")  # other code, another cache
            for file in ("data", "fetch", "images", "texts", "toybirds")]
    key = ascii((code, depends, [(_state(source), label) for source, label in rows]))
    key = hashlib.sha256(key.encode()).hexdigest()[:16]
    name = f"{Path(config.dataset).stem[:50]}-{key}.safetensors"
    home = os.path.expanduser("~/.cache/self-distillation")  # Path's own raises where none is known
    folders = Path(config.data_dir) / "cache", Path(home)
    for folder in folders:
        with contextlib.suppress(BadInput, KeyError):  # also of a file that is absent
            tensors, about = weights.read(folder / name)
            return tensors, about["facts"]
    tensors, facts = make()
    for folder in folders:
        with contextlib.suppress(OSError):
            weights.write(tensors, folder / name, {"facts": facts})
            return weights.read(folder / name)[0], facts
    return tensors, facts
