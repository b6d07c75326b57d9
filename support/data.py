"""Data by name: a data set's splits as one tensor each, cached on disk, checked and cut to size."""
import contextlib
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import PIL
import torch
from torch import Tensor, nn

from support import fetch, images, texts, toybirds, weights
from support.draws import generator
from support.fetch import BadInput
from support.settings import Config

Made = tuple[dict[str, Tensor], dict]  # what is cached: tensors, and facts about them


@dataclass
class Data:
    """One data set, as the models take it.

    train, test: uint8 pixels [N, 3, S, S] or `texts.Texts`; labels: Long[N], None where unlabelled.
    metric: how §5 scores it. fingerprint: hash of the content. note: where it came from, one line.
    """

    name: str
    train: Tensor | texts.Texts
    train_labels: Tensor | None
    test: Tensor | texts.Texts | None
    test_labels: Tensor | None
    classes: list[str]
    metric: str
    fingerprint: str
    note: str

    @property
    def labelled(self) -> bool:
        """Whether both splits have labels, so that a classifier can be trained and measured."""
        return self.train_labels is not None and self.test_labels is not None


def load(config: Config, model: nn.Module) -> Data:
    """The data set that --dataset names, as the model takes it, cut to --train-size or --smoke.

    BadInput for what cannot be found, read or learnt from.
    """
    name, published = config.dataset, config.dataset in fetch.datasets()
    root = fetch.dataset(name, config.data_dir) if published else Path(name).absolute()
    read = _pictures if model.modality == "image" else _texts
    try:
        found, facts = read(config, model, root)
        if published and not {"train", "test"} <= found.keys():
            raise ValueError("a split is empty")
    except Exception as error:  # lists, .mat and binary files fail in as many ways
        if not published or isinstance(error, BadInput | MemoryError | RuntimeError):
            raise
        raise BadInput(f"{root} does not hold {name} as it is published ({error}): move it away to "
                       "have it fetched anew") from error
    note = fetch.datasets()[name][1] if published else name
    note += "".join(map(fetch.warn, facts.pop("told")))
    found = {part: found.get(part) for part in ("train", "train_labels", "test", "test_labels")}
    C = len(facts["classes"])
    for labels in (found["train_labels"], found["test_labels"]):
        if labels is not None and not 0 <= labels.min() <= labels.max() < C:
            raise BadInput(f"{name} has labels from {labels.min()} to {labels.max()}, but {C} "
                           f"classes, which are 0 to {C - 1}: mend its files")
    if C == 1:
        raise BadInput(f"{name} has one class, {facts['classes'][0]!r}: have two or more, or none "
                       "(no folders, no labels) to pre-train alone")
    return _cut(Data(name=name, note=note, **found, **facts), config)


def _pictures(config: Config, model: nn.Module, root: Path) -> Made:
    """What `Data` holds of pictures, and a list of what to tell."""
    side = model.config.image_size
    make = partial(images.read, config.dataset, root, side)
    if config.dataset == "toybirds":
        make = partial(toybirds.read, side)
    key = PIL.__version__, side, images.state(root)
    tensors, facts = cached(config, key, partial(_described, make, "pictures"))
    return tensors, facts | {"metric": "accuracy"}


def _texts(config: Config, model: nn.Module, root: Path) -> Made:
    """What `Data` holds of texts, and a list of what to tell."""
    name, tokenizer, most = config.dataset, model.tokenizer, model.config.max_length
    if tokenizer is None:
        raise BadInput("the weights have no tokenizer.json beside them: put it there to read texts")
    files, content = texts.files(name, root), []
    for file in files:
        content += [file.name, file.read_bytes()]
    fingerprint = texts.digest(*content)
    make = partial(texts.read, name, files, tokenizer, most)
    key = tokenizer.to_str(), most, fingerprint
    tensors, facts = cached(config, key, partial(_described, make, "texts"))
    for split in {"train", "test"} & tensors.keys():
        tensors[split] = texts.Texts(tensors[split], tensors[f"{split}_offsets"],
                                     tokenizer.token_to_id("<pad>"))
    metric = "micro_f1" if name == "chemprot" else "macro_f1"
    return tensors, facts | {"metric": metric, "fingerprint": fingerprint}


def _described(make: Callable[[], Made], kind: str) -> Made:
    """What make() returns, its hash, and how many test examples are also training examples."""
    tensors, facts = make()
    hashes, seen = "", {"train": [], "test": []}
    for split in [split for split in seen if split in tensors]:
        examples, labels = tensors[split], tensors.get(f"{split}_labels", torch.empty(0))
        content = hashlib.sha256(examples.numpy())
        content.update(labels.numpy())
        hashes += content.hexdigest()
        if kind == "texts":
            examples = examples.split(tensors[f"{split}_offsets"].diff().tolist())
        seen[split] = [hashlib.sha256(example.numpy()).digest() for example in examples]
    known = set(seen["train"])
    if shared := sum(example in known for example in seen["test"]):
        facts["told"].append(f"also among the training {kind}: {shared} of {len(seen['test'])} "
                             f"test {kind}")
    return tensors, facts | {"fingerprint": hashlib.sha256(hashes.encode()).hexdigest()}


def cached(config: Config, key: tuple, make: Callable[[], Made]) -> Made:
    """The tensors and facts of make(), from the second time on mapped from a file.

    key has to tell all that they depend on but the code. The file lies in data_dir/cache or, where
    that cannot be written, in the user's own cache; one that cannot be read is made anew.
    """
    code = [fetch.digest(fetch.ROOT / f"support/{file}.py")  # other code, another cache
            for file in ("data", "images", "texts", "toybirds")]
    name = f"{Path(config.dataset).stem[:50]}-{texts.digest(*code, ascii(key))[:16]}.safetensors"
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


def _cut(data: Data, config: Config) -> Data:
    """The data set with --train-size training examples; under --smoke with few of both splits."""
    size, N = config.train_size, len(data.train)
    if config.smoke and size is None:
        size = min(max(80, len(data.classes)), N)
    if config.smoke and data.test is not None:
        few = torch.randperm(len(data.test), generator=generator(config.seed, "smoke"))[:64]
        data = _take(data, "test", few, "smoke")
    if size is None or size == N:
        return data
    if size > N:
        raise BadInput(f"--train-size is {size}, but {data.name} has {N} training examples: use "
                       "fewer or leave it out")
    few = balanced(data.train_labels, N, size, generator(config.seed, "subset"))
    return _take(data, "train", few, f"{size}-{config.seed}")


def _take(data: Data, split: str, index: Tensor, mark: str) -> Data:
    """The data set with only the examples at index [n] of one split, and a mark that tells so."""
    examples, labels = getattr(data, split), getattr(data, f"{split}_labels")
    part = examples.take(index) if isinstance(examples, texts.Texts) else examples[index]
    return replace(data, fingerprint=f"{data.fingerprint}-{mark}", **{
        split: part, f"{split}_labels": None if labels is None else labels[index]})


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
