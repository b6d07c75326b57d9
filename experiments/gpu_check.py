"""What only a GPU can show: `python -m experiments.bench --gpu-check`.

A check returns what it measured on a device, and raises where that is not as it should be; the page
tells of both. On a CPU all of them run, too, and show that the code is right but for CUDA.
"""
import contextlib
import functools
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import baselines
import distill
import finetune
from experiments import runs
from support import fetch, settings
from support.data import Data
from support.loop import Stage
from support.recall import Recall
from support.run import Run

TOYS, STEPS = {"image": "toybirds", "text": "pydocs"}, 24  # of every stage of a toy
# What sums in another order and other exponentials make of losses and gradients, with AdamW's steps
# between: on a CPU up to 3e-5. A wrong mask, draw or kernel is off by a tenth.
ROUNDING = 1e-3

# ----------------------------------------------------------------------------- the programs' steps


@functools.cache
def begun(modality: str) -> tuple[nn.Module, Data, settings.Config]:
    """A small untrained model and 66 drawn birds or docstrings."""
    return runs.begin(TOYS[modality], init="random", train_size=66)


def toy(device: str, modality: str, **given: object) -> tuple[nn.Module, Data, settings.Config]:
    """The same with final settings, of float32 if nothing else is given."""
    model, data, config = begun(modality)
    usual = dict(device=device, precision="fp32", lr=1e-3, steps=STEPS, batch_size=16,
                 finetune_steps=STEPS, finetune_batch_size=16)
    return model, data, settings.final(replace(config, **usual | given), model, len(data.train))


def read_log(folder: str | Path) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


def algorithm_1(device: str, modality: str, folder: str = "",
                **given: object) -> tuple[nn.Module, list[dict]]:
    """The student and the log."""
    model, data, config = toy(device, modality, **given)
    with tempfile.TemporaryDirectory() as temporary:
        run = Run(Path(folder or temporary), config)
        return distill.self_distill(model, data.train, config, run=run)[-1], read_log(run.folder)


def ways(device: str) -> Iterator[tuple[str, list[dict]]]:
    """Every --match and every --method, in bf16: its name and its log."""
    for modality in TOYS:
        with tempfile.TemporaryDirectory() as folder:
            for match in ("cls", "hidden", "prediction", "l2", "mars"):
                taught = {} if match == "cls" else {"teacher": f"{folder}/cls/further.safetensors"}
                yield f"{modality}, {match}", algorithm_1(
                    device, modality, f"{folder}/{match}", precision="bf16", match=match,
                    **taught)[1]
            model, data, config = toy(device, modality, precision="bf16")
            for name, method in baselines.METHODS.items():
                classifier = finetune.new_classifier(model, data.classes, config)
                run = Run(Path(folder, name), config)
                finetune.train(classifier, data.train, data.train_labels, config, run, name, method)
                yield f"{modality}, {name}", read_log(run.folder)


def apart(log: list[dict], other: list[dict]) -> float:
    """The largest relative difference between the losses and gradients' lengths of two logs."""
    assert [line["step"] for line in log] == [line["step"] for line in other]
    pairs = [(line[name], again[name]) for line, again in zip(log, other)
             for name in line if "loss" in name or name == "grad_norm"]
    return max(abs(a - b) / max(abs(a), abs(b)) for a, b in pairs)


# ----------------------------------------------------------------------------- the checks


def within(told: dict[str, float], bound: float = ROUNDING) -> dict[str, float]:
    """What was measured, all of it below a bound."""
    assert max(told.values()) < bound, f"{told} should be below {bound}"
    return told


def check_float32(device: str) -> dict[str, float]:
    """in float32 Algorithm 1's losses and gradients' lengths are a CPU's, step by step"""
    return within({modality: apart(*(algorithm_1(there, modality)[1] for there in (device, "cpu")))
                   for modality in TOYS})


def check_bf16(device: str) -> dict[str, float]:
    """in bf16 every --match and --method trains: losses are finite and fall, to this share"""
    told = {}
    for name, log in ways(device):
        losses = [sum(value for key, value in line.items() if "loss" in key) for line in log
                  if line["stage"] != "further pre-training"]
        told[name] = statistics.mean(losses[-3:]) / statistics.mean(losses[:3])
    return within(told, 1)


def check_waits(device: str, set_mode: Callable = torch.cuda.set_sync_debug_mode) -> dict[str, int]:
    """from a stage's second step on none of these waits for the GPU, but to be logged"""
    prepare, read, steps = Stage._prepare, Stage._read, []

    def begin_step(stage: Stage) -> None:
        prepare(stage)
        if stage.step:
            steps.append(stage.step)
            set_mode("error")

    def may_wait(stage: Stage) -> dict:
        set_mode("default")
        return read(stage)

    try:
        with mock.patch.multiple(Stage, _prepare=begin_step, _read=may_wait):
            return {"ways": len(list(ways(device))), "steps": len(steps)}
    finally:
        set_mode("default")


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """Within it torch takes kernels that give the same bits twice, where it has them."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def check_resume(device: str) -> dict[str, float]:
    """carried on from a checkpoint, Algorithm 1 ends in the same bits, where it does so twice"""
    told, given = {}, dict(precision="auto", save_every=str(2 * STEPS // 3))
    for modality in TOYS:
        with exact(), tempfile.TemporaryDirectory() as folder:
            whole, again = (algorithm_1(device, modality, f"{folder}/{name}", **given)[0]
                            for name in "ab")
            Path(folder, "a", "distilled-1.safetensors").unlink()  # its checkpoint is still there
            resumed, _ = algorithm_1(device, modality, f"{folder}/a", **given)
            timing = Path(folder, "a", "timing.jsonl").read_text().splitlines()
        left = STEPS - 2 * STEPS // 3
        assert json.loads(timing[-1])["steps"] == left, "it carries on from its checkpoint"
        told |= {f"{modality}: {name}": all(torch.equal(a, b) for a, b in zip(
            whole.state_dict().values(), other.state_dict().values()))
            for name, other in (("twice", again), ("resumed", resumed))}
        assert told[f"{modality}: resumed"] or not told[f"{modality}: twice"], told
    return told


def check_recall(device: str) -> dict[str, float]:
    """a remembered teacher says what a live one does"""
    told = {}
    for modality, match in itertools.product(TOYS, ("cls", "hidden")):
        _, remembered = algorithm_1(device, modality, match=match)
        with mock.patch.object(Recall, "_remember", lambda self: None):
            _, live = algorithm_1(device, modality, match=match)
        told[f"{modality}, {match}"] = apart(remembered, live)
    return within(told)


def check_compile(device: str) -> dict[str, float]:
    """--compile computes what goes without it"""
    return within({modality: apart(*(algorithm_1(device, modality, compile=compiled)[1]
                                     for compiled in (False, True))) for modality in TOYS})


def check_processes(device: str) -> dict[str, float]:
    """torchrun on all GPUs computes what one does"""
    several = min(torch.cuda.device_count(), 8) if device == "cuda" else 2
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={several}"]
    with tempfile.TemporaryDirectory() as folder:
        for name, words in (("one", []), ("all", launch)):
            words = [*words, "distill.py", "--smoke", "--device", device, "--precision", "fp32",
                     "--out", f"{folder}/{name}"]
            subprocess.run([sys.executable, *words], cwd=fetch.ROOT, check=True,
                           capture_output=True)
        logs = (read_log(f"{folder}/{name}") for name in ("one", "all"))
        return within({f"{several} processes": apart(*logs)})


CHECKS = (check_float32, check_bf16, check_waits, check_resume, check_recall, check_compile,
          check_processes)


def attempt(check: Callable[[str], dict], device: str) -> dict:
    """A check's line: what it measured, or why it failed."""
    line = {"name": check.__name__, "what": check.__doc__, "told": {}, "failed": ""}
    try:
        line["told"] = check(device)
    except Exception as error:  # whatever it is, the page tells it
        line["failed"] = f"{type(error).__name__}: {fetch.brief(error)}"
    print(line["name"], line["failed"] or line["told"], flush=True)
    return line
