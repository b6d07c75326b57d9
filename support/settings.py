"""A run's settings: the flags and their defaults, which are the paper's, and what they mean here.

Section 5 gives few of the hyper-parameters; `DEFAULTS` has them all.
"""
import argparse
import contextlib
import errno
import functools
import math
import os
import re
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import get_args

import torch

from support import fetch, parallel

# ----------------------------------------------------------------------------- hyper-parameters
# (modality, size, stage): the paper's where it says (§5, their code; see the README's table);
# "tiny" is for the bundled models. `warmup` is a share of steps, `clip` a gradient norm (0: none).

DEFAULTS = {
    ("image", "base", "pretrain"): dict(
        steps=20_000, batch_size=64, lr=1.5e-4, weight_decay=0.01, betas=(0.9, 0.95), warmup=0.0,
        clip=0.0, mask_prob=0.75),
    ("image", "base", "finetune"): dict(
        steps=10_000, batch_size=32, lr=1e-4, weight_decay=0.01, warmup=0.05, clip=1.0, dropout=0.1,
        recadam_cof=5000.0, recadam_t0=250, mars_radius=8.0, r3f_eps=1e-5),
    ("image", "tiny", "pretrain"): dict(
        steps=400, batch_size=64, lr=1e-3, weight_decay=0.01, betas=(0.9, 0.95), warmup=0.0,
        clip=0.0, mask_prob=0.5),
    ("image", "tiny", "finetune"): dict(
        steps=300, batch_size=32, lr=1e-3, weight_decay=0.01, warmup=0.05, clip=1.0, dropout=0.0,
        mars_radius=1.0, r3f_eps=0.1),
    ("text", "base", "pretrain"): dict(
        epochs=100, batch_size=128, lr=1e-4, weight_decay=0.01, betas=(0.9, 0.999), warmup=0.06,
        clip=1.0, mask_prob=0.15),
    ("text", "base", "finetune"): dict(
        epochs=10, batch_size=32, lr=2e-5, weight_decay=0.01, warmup=0.06, clip=1.0, dropout=0.1,
        recadam_cof=5000.0, recadam_t0=100, mars_radius=8.0, r3f_eps=1e-5),
    ("text", "tiny", "pretrain"): dict(
        epochs=2, batch_size=32, lr=5e-4, weight_decay=0.01, betas=(0.9, 0.999), warmup=0.06,
        clip=1.0, mask_prob=0.15),
    ("text", "tiny", "finetune"): dict(
        epochs=2, batch_size=32, lr=2e-3, weight_decay=0.01, warmup=0.06, clip=1.0, dropout=0.0,
        mars_radius=1.0, r3f_eps=0.01),
}
SMOKE = dict(steps=4, batch_size=8, finetune_steps=4, finetune_batch_size=8)
AS_RELEASED = {"match": "cls", "masking": "fixed"}
# what a setting lies between, and whether it may be the lower value itself
RANGES = {"mask_prob": (0, 1, False)} | dict.fromkeys(
    ("lr", "finetune_lr", "recadam_k"), (0, 10**9, False)) | dict.fromkeys(
    ("steps", "batch_size", "accumulate", "finetune_steps", "finetune_batch_size", "train_size"),
    (1, 10**9, True)) | dict.fromkeys(
    ("rounds", "weight_decay", "mae_weight", "recadam_cof", "recadam_t0", "mars_radius", "r3f_eps",
     "r3f_weight"), (0, 10**9, True))
TOYS = {"toybirds": "tiny", "pydocs": "tiny"}
HUB = {"image": "facebook/vit-mae-base", "text": "FacebookAI/roberta-base"}
TEXTS = ("chemprot", "acl_arc", "scierc", "twitter_emotion", "pydocs")
IMAGES = ("aircraft", "cub", "chest_xray", "dtd", "dogs", "flower", "cifar100", "toybirds")


def _flag(default: object, help: str, programs: str = "", choices: tuple[str, ...] = ()) -> object:
    """A field that is a flag of the named programs (of all, where none is named)."""
    return field(default=default, metadata={"help": help, "programs": programs, "choices": choices})


_TUNE = "distill finetune baselines"  # the programs that fine-tune


@dataclass(frozen=True)
class Config:
    """Every setting of a run; None means the value in `DEFAULTS` that fits the model (`fill`)."""

    dataset: str = _flag(
        "toybirds", "data set by name (the README lists them), a folder of images, or a .jsonl "
        "file or folder of text")
    data_dir: str | None = _flag(
        None, "folder that holds the data sets; default $DATA_DIR, else datasets")
    init: str | None = _flag(
        None, "initial weights θ_init, φ_init: a .safetensors file, a folder, a hub id, 'tiny' "
        "(bundled) or 'random'; default: tiny for toybirds and pydocs, else "
        f"{HUB['image']} or {HUB['text']} as in the paper")
    out: str | None = _flag(
        None, "run folder; default runs/<program>-<dataset>-<init>-…-seed<seed>", f"mae {_TUNE}")
    seed: int = _flag(
        0, "seed of every draw: order, masks, initialisation, augmentation, dropout, noise")
    device: str = _flag("auto", "where to compute; auto takes the GPU if there is one", _TUNE,
                        ("auto", "cpu", "cuda", "mps"))
    accumulate: int = _flag(
        1, "work on a mini-batch in so many parts and add up their gradients: less memory, the "
        "same result but for rounding and dropout", _TUNE)
    precision: str = _flag(
        "auto", "of the forward pass: fp32 is the paper's; auto is bf16 where a GPU has it. Use "
        "fp32 when a loss turns NaN", _TUNE, ("auto", "fp32", "bf16"))
    compile: bool = _flag(
        False, "compile the model's layers: slower to start, faster per step on a GPU", _TUNE)
    save_every: str = _flag(
        "1m", "save a checkpoint every so many steps (500) or minutes (5m): less is lost when a "
        "run dies, more is written", _TUNE)
    smoke: bool = _flag(
        False, "a few steps on a few examples: shows that everything works, learns nothing")

    steps: int | None = _flag(
        None, "optimiser steps of further pre-training and of each round (paper: 20000 for images, "
        "100 epochs for text); more fits the unlabelled data closer", "distill")
    batch_size: int | None = _flag(
        None, "examples a step while pre-training (paper: 64 images, 128 texts); lower it when "
        "memory runs out", "distill")
    lr: float | None = _flag(
        None, "learning rate α of pre-training (released code: 1.5e-4 for images); lower it when "
        "the loss jumps", "distill")
    weight_decay: float | None = _flag(
        None, "of pre-training (released code: 0.01); more pulls the weights to 0", "distill")
    mask_prob: float | None = _flag(
        None, "mask probability γ (released code: 0.75 for images; 0.15 for text); more hides more "
        "and makes the task harder", "mae mlm distill")
    rounds: int = _flag(
        1, "rounds T' of self-distillation (paper: 1); 0 is further pre-training alone", "distill")
    train_size: int | None = _flag(
        None, "use only so many training examples, the same number of each class, with and without "
        "labels (Figure 3); default all", _TUNE)

    finetune_steps: int | None = _flag(
        None, "optimiser steps of fine-tuning (paper: 10000 for images, 10 epochs for text); more "
        "fits the labels closer", _TUNE)
    finetune_batch_size: int | None = _flag(
        None, "examples a step of fine-tuning (paper: 32)", _TUNE)
    finetune_lr: float | None = _flag(
        None, "learning rate of fine-tuning (released code: 1e-4 for images); lower it when the "
        "loss jumps", _TUNE)
    method: str = _flag(
        "all", "how to fine-tune: plainly or with one of the paper's baselines",
        "baselines", ("all", "fine-tuning", "recadam", "mars", "r3f"))
    recadam_cof: float | None = _flag(
        None, "RecAdam's pull γ towards the pre-trained weights (its default 5000; tiny models: "
        "0.5 / lr); more pulls harder, and lr times it must stay below 2", _TUNE)
    recadam_t0: int | None = _flag(
        None, "step at which RecAdam weighs task and pull alike (its default 250); later holds "
        "longer", _TUNE)
    recadam_k: float = _flag(
        0.5, "how sharply RecAdam turns from pull to task around t0 (its default 0.5); less turns "
        "more gently", _TUNE)
    mars_radius: float | None = _flag(
        None, "MARS: how far, in L1, a row of weights may leave its start; smaller binds more",
        _TUNE)
    r3f_eps: float | None = _flag(
        None, "R3F: standard deviation of the Gaussian noise on the input (its default 1e-5; tiny "
        "models: more, or float32 would not feel it); more asks for a smoother classifier", _TUNE)
    r3f_weight: float = _flag(
        1.0, "R3F: weight of the symmetric KL term (its default 1); more smooths more", _TUNE)

    predict: str | None = _flag(
        None, "do not train: write the classes and probabilities that the classifier of --init (a "
        "run's finetuned-….safetensors) gives a folder of pictures, or the texts of a .txt (one a "
        "line) or .jsonl file, as a .csv into --out, default the classifier's folder", "finetune")

    match: str = _flag(
        "hidden", "what the distillation term compares: hidden states at all positions (the "
        "paper), the class token's alone (released code), predictions, or weights by l2 or MARS "
        "(Table 3)", "distill", ("hidden", "cls", "prediction", "l2", "mars"))
    masking: str = _flag(
        "bernoulli", "bernoulli: each position on its own (the paper); fixed: MAE's exact count "
        "(released code, images); 80-10-10: RoBERTa's recipe (text)",
        "distill", ("bernoulli", "fixed", "80-10-10"))
    pixels: str = _flag(
        "norm", "target of the image loss: pixels normalised within their patch (released code), "
        "or raw", "mae distill", ("norm", "raw"))
    mae_weight: float = _flag(
        1.0, "weight λ of L_MAE during self-distillation (Table 6; 0 leaves it out)", "distill")
    as_released: bool = _flag(
        False, "what the authors' release does where it differs from the paper's text: "
        "--match cls --masking fixed", "distill")

    # no flags: in `DEFAULTS` only
    betas: tuple[float, float] | None = None
    warmup: float | None = None
    clip: float | None = None
    finetune_weight_decay: float | None = None
    finetune_warmup: float | None = None
    finetune_clip: float | None = None
    dropout: float | None = None

    @property
    def modality(self) -> str:
        """"image" or "text", as the data set's name or files tell."""
        path = Path(os.path.expanduser(self.dataset))
        jsonl = path.suffix == ".jsonl" or (
            os.path.isdir(path) and any(path.glob("*.jsonl")))  # its isdir takes any name
        return "text" if self.dataset in TEXTS or jsonl else "image"


def parse(program: str, doc: str, argv: list[str] | None = None) -> Config:
    """The settings of a program's command line; `BadInput` for a mistake in it."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog=f"{program}.py", description=doc, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = _refuse  # in one line: argparse's own prints the usage, too
    for item in fields(Config):
        if "help" not in item.metadata or program not in (item.metadata["programs"] or program):
            continue
        name, kind = _flag_name(item.name), (*get_args(item.type), item.type)[0]
        if kind is bool:
            parser.add_argument(name, action="store_true", default=argparse.SUPPRESS,
                                help=item.metadata["help"])
        else:
            shown = "" if item.default is None else f" (default {item.default})"
            choices = item.metadata["choices"]
            parser.add_argument(
                name, type=functools.partial(_one_of, choices) if choices else kind,
                default=argparse.SUPPRESS, metavar="{" + ",".join(choices) + "}" if choices
                else None, help=item.metadata["help"] + shown)
    known, unknown = parser.parse_known_args(argv)
    given = vars(known)
    if unknown:
        word = unknown[0].partition("=")[0]
        others = word in [_flag_name(item.name) for item in fields(Config)]
        near = fetch.nearest(word, re.findall(r"--[\w-]+", parser.format_usage()))
        raise fetch.BadInput(f"{word} is {'a flag, but not one' if others else 'no flag'} of "
                             f"{program}.py{'' if others else near}")
    words = [word.partition("=")[0] for word in argv]
    for name, value in given.items():
        if words.count(_flag_name(name)) > 1:
            raise fetch.BadInput(f"{_flag_name(name)} is given twice: leave one out")
        if value in ("", []):  # [] is what some versions of argparse make of --flag=--
            raise fetch.BadInput(f"{_flag_name(name)} is empty: give it a value or leave it out")
    config = Config(**({"dataset": "pydocs"} if program == "mlm" else {}) | given)
    idle = _idle(program, config)
    for name in given:
        if name in idle:
            raise fetch.BadInput(f"{_flag_name(name)} does nothing {idle[name]}: leave it out")
    config = check(config)
    if config.modality != {"mae": "image", "mlm": "text"}.get(program, config.modality):
        other = {"mae": "mlm.py", "mlm": "mae.py"}[program]
        raise fetch.BadInput(f"--dataset {config.dataset} is {config.modality}: use {other}")
    return config


def _refuse(message: str) -> None:
    raise fetch.BadInput(message)


def _flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def _one_of(choices: tuple[str, ...], value: str) -> str:
    if value not in choices:
        raise argparse.ArgumentTypeError(
            f"{value!r} is none of {', '.join(choices)}{fetch.nearest(value, choices)}")
    return value


def _idle(program: str, config: Config) -> dict[str, str]:
    """The settings that change nothing beside the others, and when that is so."""
    idle = {}
    if program in ("distill", "finetune"):  # baselines.py runs all methods
        for method in ("recadam", "mars", "r3f"):
            idle |= {item.name: f"without --method {method}" for item in fields(Config)
                     if item.name.startswith(f"{method}_") and config.method != method}
    if config.predict:
        idle |= {item.name: "with --predict" for item in fields(Config)
                 if item.name not in ("predict", "init", "out", "device", "precision")}
    if not config.rounds:
        idle |= dict.fromkeys(("match", "mae_weight"), "with --rounds 0")
    if config.modality == "text":
        idle |= {"pixels": "for text"}
    if config.as_released:
        idle |= {name: f"with --as-released, which means --{name} {value}"
                 for name, value in AS_RELEASED.items() if getattr(config, name) != value}
    return idle


def _variant(config: Config, modality: str) -> Config:
    """--as-released spelled out; `BadInput` for a variant that the modality does not have."""
    if config.as_released:
        if modality == "text":
            raise fetch.BadInput("--as-released is for images: the authors released no text code")
        if config.match not in ("hidden", "cls") or config.masking == "80-10-10":
            raise fetch.BadInput(f"--as-released means --match cls --masking fixed, not --match "
                                 f"{config.match} --masking {config.masking}: leave some out")
        config = replace(config, **AS_RELEASED)
    if config.masking == {"image": "80-10-10", "text": "fixed"}[modality]:
        raise fetch.BadInput(f"--masking {config.masking} is not for {modality}s: use bernoulli or "
                             f"{ {'image': 'fixed', 'text': '80-10-10'}[modality] }")
    return config


def check(config: Config) -> Config:
    """The settings with those filled in that others decide; `BadInput` where they make no sense."""
    config = replace(config, **{name: os.path.expanduser(value)
                                for name in ("dataset", "init", "out", "data_dir")
                                if (value := getattr(config, name))})
    for name in ("dataset", "init", "out", "data_dir", "predict"):
        try:
            os.stat(getattr(config, name) or "")
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise fetch.BadInput(f"{_flag_name(name)} is longer than a file's name may be: use "
                                     "a shorter one") from error
    modality = config.modality
    config = _variant(config, modality)
    names = (*IMAGES, *TEXTS)
    if config.dataset not in names and not os.path.exists(config.dataset):
        raise fetch.BadInput(
            f"no data set {config.dataset!r}{fetch.nearest(config.dataset, names)}: give a folder "
            f"of pictures, a .jsonl file or folder of text, or {', '.join(names)}")
    for name in ("out", "data_dir"):
        if os.path.isfile(value := getattr(config, name) or ""):
            raise fetch.BadInput(f"{_flag_name(name)} {value} is a file: name a folder")
    if not re.fullmatch(r"[1-9]\d{,8}|\d{,9}\.?\d{1,9}m", config.save_every, re.ASCII):
        raise fetch.BadInput(f"--save-every is {config.save_every!r}: give steps (500) or minutes "
                             "(5m)")
    for name, (low, high, itself) in RANGES.items():
        value = getattr(config, name)
        if value is not None and not (low < value < high or itself and value == low):
            raise fetch.BadInput(
                f"{_flag_name(name)} is {value}: use {'at least' if itself else 'more than'} {low} "
                f"and less than {high}")
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(config.device, True):
        raise fetch.BadInput(f"--device {config.device}: this machine has none; use auto or cpu")
    if config.smoke:
        config = replace(config, **{name: value for name, value in SMOKE.items()
                                    if getattr(config, name) is None})
    return replace(config, init=config.init or TOYS.get(config.dataset, HUB[modality]),
                   data_dir=config.data_dir or os.environ.get("DATA_DIR") or "datasets")


def device(config: Config) -> torch.device:
    """The device asked for, or the best one that is there."""
    if config.device != "auto":
        return torch.device(config.device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def uses_bf16(config: Config) -> bool:
    """Whether --precision means bf16 here: where asked for, or by itself where a GPU has it."""
    if config.precision != "auto" or device(config).type != "cuda":
        return config.precision == "bf16"
    return torch.cuda.is_bf16_supported(including_emulation=False)


def autocast(config: Config) -> contextlib.AbstractContextManager:
    """bf16 matrix products or, as the paper has it, float32 throughout."""
    return torch.autocast(device(config).type, dtype=torch.bfloat16, enabled=uses_bf16(config))


def fill(config: Config, model: torch.nn.Module, examples: int) -> Config:
    """The settings with every None replaced by `DEFAULTS` for this model and number of examples.

    Text's epochs become epochs × ⌈N/B⌉ steps. What is set stays, so filling twice changes nothing.
    """
    config = _variant(config, model.modality)
    kind = (model.modality, "base" if model.config.width >= 512 else "tiny")
    new = {}
    for stage, prefix in (("pretrain", ""), ("finetune", "finetune_")):
        table = dict(DEFAULTS[*kind, stage])
        table["batch_size"] = min(table["batch_size"], examples)
        size = getattr(config, prefix + "batch_size") or table["batch_size"]
        if "epochs" in table:
            table["steps"] = table.pop("epochs") * math.ceil(examples / size)
        for name, value in table.items():
            name = prefix + name if prefix + name in Config.__dataclass_fields__ else name
            if getattr(config, name) is None:
                new[name] = value
    config = replace(config, **new)
    parts = config.accumulate * parallel.world()
    if min(config.batch_size, config.finetune_batch_size) < parts:
        raise fetch.BadInput(f"a batch of {min(config.batch_size, config.finetune_batch_size)} "
                             f"cannot be shared out among {parallel.world()} processes with "
                             f"--accumulate {config.accumulate}: use fewer or a larger batch")
    if parallel.world() > max(1, torch.cuda.device_count()) and device(config).type != "cpu":
        raise fetch.BadInput(f"{parallel.world()} processes want a GPU each, this machine has "
                             f"{torch.cuda.device_count()}: start as many, or use --device cpu")
    # a tiny model's learning rate is too high for RecAdam's own γ: lr·γ = 0.5, t0 early in a run
    if config.recadam_cof is None:
        config = replace(config, recadam_cof=0.5 / config.finetune_lr)
    if config.recadam_t0 is None:
        config = replace(config, recadam_t0=max(1, config.finetune_steps // 40))
    return config


def check_sizes(program: str, config: Config, data: object) -> None:
    """Refuse settings that the data leave without effect or sense (`BadInput`); before `fill`."""
    for name in ("batch_size", "finetune_batch_size"):
        value = getattr(config, name) or 0
        if value > len(data.train) and not (config.smoke and value == SMOKE[name]):
            raise fetch.BadInput(f"{_flag_name(name)} is {value}, but there are {len(data.train)} "
                                 "training examples: use at most as many")
    if len(data.classes) == 1:
        raise fetch.BadInput(f"{config.dataset} has one class, {data.classes[0]!r}: have two or "
                             "more, or none (no folders, no labels) to pre-train alone")
    if data.train_labels is None or data.test_labels is None:
        if program != "distill":
            raise fetch.BadInput(f"{config.dataset} has no labels to fine-tune on: distill.py "
                                 "takes it")
        usual = check(Config(dataset=config.dataset, smoke=config.smoke))
        for item in fields(Config):
            if item.name.startswith(("finetune_", "method")) and getattr(
                    config, item.name) != getattr(usual, item.name):
                raise fetch.BadInput(f"{_flag_name(item.name)} does nothing, as {config.dataset} "
                                     "has no labels to fine-tune on: leave it out")
