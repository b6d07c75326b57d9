"""Data by name: a data set's splits as one tensor each, cached on disk and cut to size."""
import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from support import images, texts, weights
from support.draws import generator
from support.fetch import BadInput
from support.settings import Config


@dataclass
class Data:
    """One data set, as the models take it.

    train, test: uint8 pixels [N, 3, S, S] or `texts.Texts`; labels: Long[N], None where unlabelled.
    metric: how §5 scores it. fingerprint: hash of the content. note: where it came from, one line.
    """

    name: str
    train: object
    train_labels: torch.Tensor | None
    test: object | None
    test_labels: torch.Tensor | None
    classes: list[str]
    metric: str
    fingerprint: str
    note: str

    @property
    def labelled(self) -> bool:
        """Whether both splits have labels, so that a classifier can be trained and measured."""
        return self.train_labels is not None and self.test_labels is not None


def cached(name: str, data_dir: str | Path,
           make: Callable[[], tuple[dict[str, torch.Tensor], dict]]
           ) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors and facts of make(), from the second time on mapped from a file.

    name has to tell all that they depend on. The file lies in data_dir/cache or, where that cannot
    be written, in the user's own cache; one that cannot be read is made anew.
    """
    folders = Path(data_dir) / "cache", Path(os.path.expanduser("~/.cache/self-distillation"))
    paths = [folder / f"{name}.safetensors" for folder in folders]
    for path in filter(os.path.exists, paths):  # Path's own raises where a folder is closed
        with contextlib.suppress(BadInput, KeyError):
            tensors, kept = weights.read(path)
            return tensors, kept["facts"]
    tensors, facts = make()
    for path in paths:
        with contextlib.suppress(OSError):
            weights.write(tensors, path, {"facts": facts})
            return weights.read(path)[0], facts
    return tensors, facts


def balanced(labels: torch.Tensor | None, examples: int, size: int,
             draws: torch.Generator) -> torch.Tensor:
    """Indices Long[size] in rising order, as equal a number from every class as there are examples.

    The examples are shuffled, then taken in turn: each class's first, each class's second, and so
    on.
    """
    shuffled = torch.randperm(examples, generator=draws)
    if labels is None:
        return shuffled[:size].sort().values
    classes = labels.unique()
    if size < len(classes):
        raise BadInput(f"--train-size {size} is less than the {len(classes)} classes: "
                             "use at least one each")
    turn = torch.empty(examples, dtype=torch.long)
    for label in classes:
        members = shuffled[labels[shuffled] == label]
        turn[members] = torch.arange(len(members))
    # ties (the same turn, different classes) go by the shuffled order
    return shuffled[turn[shuffled].argsort(stable=True)][:size].sort().values


def load(config: Config, model: torch.nn.Module) -> Data:
    """The data set that --dataset names, cut to --train-size, as the model takes it."""
    if model.modality == "image":
        data = images.load(config.dataset, config.data_dir, model.config.image_size)
    else:
        data = texts.load(config.dataset, config.data_dir, model.tokenizer,
                          model.config.max_length)
    if config.smoke and config.train_size is None:
        few = max(80, len(data.classes))
        config = replace(config, train_size=min(few, len(data.train)))
    if config.smoke and data.test is not None:
        few = torch.randperm(len(data.test), generator=generator(config.seed, "smoke"))[:64]
        data = replace(
            data, test=data.test[few] if model.modality == "image" else data.test.take(few),
            test_labels=None if data.test_labels is None else data.test_labels[few],
            fingerprint=f"{data.fingerprint}-smoke")
    if config.train_size is None or config.train_size == len(data.train):
        return data
    if config.train_size > len(data.train):
        raise BadInput(f"--train-size is {config.train_size}, but {config.dataset} has "
                             f"{len(data.train)} training examples: use fewer or leave it out")
    chosen = balanced(data.train_labels, len(data.train), config.train_size,
                      generator(config.seed, "subset"))
    return replace(
        data, train=data.train[chosen] if model.modality == "image" else data.train.take(chosen),
        train_labels=None if data.train_labels is None else data.train_labels[chosen],
        fingerprint=f"{data.fingerprint}-{config.train_size}-{config.seed}")
