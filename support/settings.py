"""A run's settings: the flags, what each may be, and what they mean for a model on this machine."""
import contextlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from torch import nn

from support import fetch, parallel, texts
from support.fetch import BadInput
from support.recipes import AS_RELEASED, DEFAULTS, SMALL, SMOKE, TEXTS

# ----------------------------------------------------------------------------- the flags

# what a setting lies between, and whether it may be the lower value itself
RANGES = {"mask_prob": (0, 1, False), "pretrain_dropout": (0, 1, True)} | dict.fromkeys(
    ("lr", "finetune_lr", "recadam_k"), (0, 1e9, False)) | dict.fromkeys(
    ("steps", "batch_size", "accumulate", "finetune_steps", "finetune_batch_size", "train_size"),
    (1, 1e9, True)) | dict.fromkeys(
    ("seed", "rounds", "weight_decay", "mae_weight", "recadam_cof", "recadam_t0", "mars_radius",
     "r3f_eps", "r3f_weight"), (0, 1e9, True))
PRETRAINS, TUNES = "distill", "distill finetune baselines"  # programs, by what they do


def _flag(group: str, default: object, help: str, choices: tuple[str, ...] = (),
          programs: str = "") -> object:
    """A field that is a flag of the named programs (of all, where none is named)."""
    return field(default=default, metadata={
        "group": group, "help": help, "choices": choices, "programs": programs})


_data = partial(_flag, "data and weights")
_pre = partial(_flag, "pre-training", programs=PRETRAINS)
_read = partial(_flag, "readings and ablations", programs=PRETRAINS)
_tune = partial(_flag, "fine-tuning", programs=TUNES)
_base = partial(_flag, "baselines", programs="baselines")
_how = partial(_flag, "where and how", programs=TUNES)


@dataclass(frozen=True)
class Config:
    """Every setting of a run; None is filled in by `final`. BadInput for a value without sense."""

    dataset: str = _data("toybirds", "data set by name (the README lists them), a folder of "
        "pictures, or a .jsonl, .csv, .tsv or .txt file or folder of texts")
    data_dir: str | None = _data(None, "folder that holds the data sets; default $DATA_DIR, else "
        "datasets")
    train_size: int | None = _data(None, "use only so many training examples, the same number of "
        "each class, with and without labels (Figure 3), beside all of unlabelled/; default all",
        programs=TUNES)
    text_key: str = _data("text", "own texts: the key, or column, of the text",
        programs="mlm distill finetune baselines")
    label_key: str = _data("label", "own texts: the key, or column, of the label",
        programs="mlm distill finetune baselines")
    init: str | None = _data(None, "initial weights θ_init, φ_init: a .safetensors file, a "
        "folder, a hub id, 'tiny' (bundled) or 'random'; default: tiny for toybirds and pydocs, "
        "else facebook/vit-mae-base or FacebookAI/roberta-base as in the paper")
    teacher: str | None = _data(None, "take θ_0 from this file instead of further pre-training "
        "(Algorithm 1, line 1); only the student is then fine-tuned", programs=PRETRAINS)

    steps: int | None = _pre(None, "optimiser steps of further pre-training and of each round "
        "(paper: 20000 for images, 100 epochs for text); more fits the unlabelled data closer")
    batch_size: int | None = _pre(None, "examples a step (paper: 64 images, 128 texts)")
    lr: float | None = _pre(None, "learning rate α; lower it when the loss jumps")
    weight_decay: float | None = _pre(None, "more pulls the weights to 0")
    mask_prob: float | None = _pre(None, "mask probability γ; more hides more and makes the task "
        "harder", programs="mae mlm distill")
    pretrain_dropout: float | None = _pre(None, "dropout of whom is trained, in both of its "
        "passes; the teacher has none. More keeps a student of texts farther from its teacher")
    rounds: int = _pre(1, "rounds T' of self-distillation (paper: 1); 0 is further pre-training "
        "alone")

    match: str = _read("cls", "what line 11 compares: the class token's hidden state, those at "
        "all positions, predictions, or weights by l2 or MARS (Table 3)",
        choices=("cls", "hidden", "prediction", "l2", "mars"))
    masking: str = _read("bernoulli", "bernoulli: each position on its own (the paper); fixed: "
        "MAE's exact count (released code, images); 80-10-10: RoBERTa's recipe (text)",
        choices=("bernoulli", "fixed", "80-10-10"))
    pixels: str = _read("norm", "target of the image loss: pixels normalised within their patch "
        "(released code), or raw", choices=("norm", "raw"), programs="mae distill")
    mae_weight: float = _read(1.0, "weight λ of L_MAE during self-distillation (Table 6; 0 leaves "
        "it out)")
    as_released: bool = _read(False, "what the authors' release does: --match cls --masking fixed "
        "--pixels norm --precision fp32")

    finetune_steps: int | None = _tune(None, "optimiser steps (paper: 10000 for images, 10 epochs "
        "for text); more fits the labels closer")
    finetune_batch_size: int | None = _tune(None, "examples a step (paper: 32)")
    finetune_lr: float | None = _tune(None, "learning rate; lower it when the loss jumps")
    probe: bool = _tune(False, "also score frozen features: by a linear head, and by their "
        "nearest neighbours", programs="distill finetune")
    predict: str | None = _tune(None, "do not train: write the classes and probabilities that the "
        "classifier of --init (a run's finetuned-….safetensors) gives a folder of pictures, or "
        "the texts of a .txt or .jsonl file, as a .csv into --out, default the classifier's folder",
        programs="finetune")

    method: str = _base("all", "one of the paper's baselines, or all side by side",
        choices=("all", "fine-tuning", "recadam", "mars", "r3f"))
    recadam_cof: float | None = _base(None, "RecAdam's pull γ towards the pre-trained weights "
        "(small models: 0.5 / lr); more pulls harder, and lr times it must stay below 2")
    recadam_t0: int | None = _base(None, "step at which RecAdam weighs task and pull alike; later "
        "holds longer")
    recadam_k: float = _base(0.5, "how sharply RecAdam turns from pull to task around t0; less "
        "turns more gently")
    mars_radius: float | None = _base(None, "MARS: how far, in L1, a row of weights may leave its "
        "start; smaller binds more")
    r3f_eps: float | None = _base(None, "R3F: standard deviation of the Gaussian noise on the "
        "input; more asks for a smoother classifier")
    r3f_weight: float = _base(1.0, "R3F: weight of the symmetric KL term; more smooths more")

    out: str | None = _how(None, "run folder; default runs/<program>-<dataset>-<init>-…-seed<seed>",
        programs="mae distill finetune baselines")
    export: str | None = _how(None, "also write what was made into this folder, as Hugging Face's "
        "transformers reads it: the classifier or, of distill.py, the last student and, in "
        "classifier/, its classifier", programs="distill finetune")
    seed: int = _how(0, "seed of every draw: order, masks, initialisation, augmentation, dropout, "
        "noise", programs="")
    device: str = _how("auto", "where to compute; auto takes the GPU if there is one",
        choices=("auto", "cpu", "cuda", "mps"))
    precision: str = _how("auto", "of products: fp32 is the paper's; auto is bf16 where a GPU has "
        "it. Use fp32 when a loss turns NaN", choices=("auto", "fp32", "tf32", "bf16"))
    compile: bool = _how(False, "compile the model's layers: slower to start, faster per step on "
        "a GPU")
    accumulate: int = _how(1, "work on a mini-batch in so many parts and add up their gradients: "
        "less memory, the same result but for rounding and dropout")
    save_every: str = _how("1m", "save a checkpoint every so many steps (500) or minutes (5m)")
    smoke: bool = _how(False, "a few steps on a few examples: shows that everything works, learns "
        "nothing", programs="")

    # no flags: in `DEFAULTS` only
    betas: tuple[float, float] | None = None
    warmup: float | None = None
    clip: float | None = None
    finetune_weight_decay: float | None = None
    finetune_warmup: float | None = None
    finetune_clip: float | None = None
    dropout: float | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            value, choices = getattr(self, item.name), item.metadata.get("choices")
            if value is None and item.default is None:
                continue
            if choices and value not in choices:
                raise BadInput(f"{item.name} is {value!r}{fetch.nearest(str(value), choices)}: use "
                               f"{', '.join(choices)}")
            if item.name in RANGES:
                low, high, itself = RANGES[item.name]
                kinds = (int,) if int in (item.type, *get_args(item.type)) else (int, float)
                if not isinstance(value, kinds) or not low <= value < high or (
                        value == low and not itself):
                    raise BadInput(f"{item.name} is {value!r}: use {'at least' * itself}"
                                   f"{'more than' * (not itself)} {low} and less than {high:g}")
        if not re.fullmatch(r"[1-9]\d{,8}|\d{,9}\.?\d{1,9}m", self.save_every, re.ASCII):
            raise BadInput(f"save_every is {self.save_every!r}: give steps (500) or minutes (5m)")
        if self.teacher and not self.rounds:
            raise BadInput("teacher is given, but there are no rounds to teach in: leave one out")
        usual = Config.__dataclass_fields__
        for name, value in AS_RELEASED.items() if self.as_released else ():
            if getattr(self, name) not in (usual[name].default, value):
                raise BadInput(f"as_released means {name} {value}, not {getattr(self, name)}: "
                               "leave one out")

    @property
    def modality(self) -> str:
        """"image" or "text", as the data set's name or files tell."""
        text = self.dataset in TEXTS or texts.holds(Path(self.dataset).expanduser())
        return "text" if text else "image"


# ----------------------------------------------------------------------------- what they mean here


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


def products(config: Config) -> str:
    """What a forward pass computes its products in."""
    return "bf16 products" if uses_bf16(config) else {"tf32": "tf32 products"}.get(
        config.precision, "float32")


def autocast(config: Config) -> contextlib.AbstractContextManager:
    """bf16 matrix products or, as the paper has it, float32 throughout."""
    return torch.autocast(device(config).type, dtype=torch.bfloat16, enabled=uses_bf16(config))


@contextlib.contextmanager
def matrix_products(config: Config) -> Iterator[None]:
    """Within it, float32 products on a GPU keep 10 bits (--precision tf32) or all."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if config.precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def recipe(model: nn.Module) -> str:
    """"small" or "paper": which hyper-parameters a model takes where none are given."""
    size = sum(parameter.numel() for parameter in model.encoder.parameters())
    return "small" if size < SMALL else "paper"


def final(config: Config, model: nn.Module, examples: int, unlabelled: int = 0) -> Config:
    """The settings with every None replaced by `DEFAULTS` for this model and number of examples.

    unlabelled: how many more D_u has. Text's epochs become epochs × ⌈N/B⌉ steps. What is set stays,
    so doing it twice changes nothing. BadInput for a variant that the modality does not have, and
    for batches that cannot be.
    """
    if config.as_released and model.modality == "text":
        raise BadInput("as_released is for images: the authors released no text code")
    config = replace(config, **AS_RELEASED if config.as_released else {})
    if config.masking == {"image": "80-10-10", "text": "fixed"}[model.modality]:
        raise BadInput(f"masking {config.masking} is not for {model.modality}s: use bernoulli or "
                       f"{ {'image': 'fixed', 'text': '80-10-10'}[model.modality] }")
    found = dict(DEFAULTS[model.modality, recipe(model)]) | (SMOKE if config.smoke else {})
    for stage, N in (("", examples + unlabelled), ("finetune_", examples)):
        size = found[f"{stage}batch_size"] = min(found[f"{stage}batch_size"], N)
        if epochs := found.pop(f"{stage}epochs", None):
            size = getattr(config, f"{stage}batch_size") or size
            found.setdefault(f"{stage}steps", epochs * math.ceil(N / size))
    found |= {name: value for name, value in vars(config).items() if value is not None}
    # a small model's learning rate is too high for RecAdam's own γ: lr·γ = 0.5, t0 early in a run
    found.setdefault("recadam_cof", 0.5 / found["finetune_lr"])
    found.setdefault("recadam_t0", max(1, found["finetune_steps"] // 40))
    config = replace(config, **found)
    _check_batches(config, examples, unlabelled)
    return config


def _check_batches(config: Config, examples: int, unlabelled: int) -> None:
    """BadInput where a batch is larger than the data or smaller than its parts."""
    parts = config.accumulate * parallel.world()
    for name, N in (("batch_size", examples + unlabelled), ("finetune_batch_size", examples)):
        size = getattr(config, name)
        if size > N and size != SMOKE[name]:
            raise BadInput(f"{name} is {size}, but there are {N} training examples: use at most as "
                           "many")
        if size < parts:
            raise BadInput(f"{name} is {size}, which cannot be shared out among {parallel.world()} "
                           f"processes with accumulate {config.accumulate}: use fewer or a larger "
                           "batch")
    if parallel.here() > max(1, torch.cuda.device_count()) and device(config).type != "cpu":
        raise BadInput(f"device {device(config)}: {parallel.here()} processes want a GPU each, "
                       f"this machine has {torch.cuda.device_count()}: start as many, or use cpu")
