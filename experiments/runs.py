"""Runs of the programs: carried out one after another, found finished, and read."""
import datetime
import functools
import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

import distill
import mae
import mlm
from support import draws, fetch, program, run, settings
from support.data import Data, load
from support.loop import batch

ROOT = fetch.ROOT
MODELS = {"image": mae.MAE, "text": mlm.MLM}
our_code = functools.cache(run.code)

Words = tuple[str, ...]  # a command: its program, --dataset, a name, more flags, --out, its folder


def machine() -> str:
    """Processor, versions and date, as they belong beside every figure."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), name)
    cores = torch.get_num_threads()
    if torch.cuda.is_available():
        name += f", {torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    return (f"{cores} core{'s' * (cores > 1)} of {name}, torch {torch.__version__}, Python "
            f"{platform.python_version()}, {datetime.date.today()}")


def begin(dataset: str, **given: object) -> tuple[nn.Module, Data, settings.Config]:
    """A data set, the bundled model that reads it, and settings that are not final yet."""
    config = program.located(settings.Config(**{"init": "tiny"} | given, dataset=dataset))
    model = program.load_model(MODELS[config.modality], config)
    return model, load(config, model), config


# ----------------------------------------------------------------------------- carried out


def carry_out(commands: list[Words]) -> list[Words]:
    """Run commands one after the other; returns those that failed.

    What reads from a failed command's folder fails unrun, as anything may lie there.
    """
    failed = []
    for number, words in enumerate(commands, 1):
        print(f"[{number}/{len(commands)}] python {shlex.join(words)}", flush=True)
        if any(word.startswith(f"{bad[-1]}/") for bad in failed for word in words):
            why = "another that failed was to make its teacher"
        elif status := wait_for([sys.executable, *words]):
            why = f"status {status}"
        else:
            continue
        print(f"failed, {why}: python {shlex.join(words)}", file=sys.stderr)
        failed.append(words)
    return failed


def wait_for(command: list[str]) -> int:
    """The status that a program ends with; it is stopped with us, and saves what it has."""
    child = subprocess.Popen(command, cwd=ROOT)
    try:
        return child.wait()
    except BaseException:
        child.terminate()
        child.wait()
        raise


# ----------------------------------------------------------------------------- read


def finished(words: Words) -> bool:
    """Whether a command's folder has its results, by the code as it is now.

    What is not finished is left to the program, which refuses a folder of something else.
    """
    folder = ROOT / words[-1]
    if not (folder / "results.json").exists() or not (folder / "config.json").exists():
        return False
    told, asked = run.read_json(folder / "config.json"), f"python {shlex.join(words)}"
    return (told.get("command"), told.get("facts", {}).get("code")) == (asked, our_code())


def measured(words: Words, method: str) -> dict:
    """A row of a finished run, with its data's sizes and the seconds of its stage.

    None are told of a stage that was interrupted.
    """
    folder = ROOT / words[-1]
    found, told = (run.read_json(folder / f"{name}.json") for name in ("results", "config"))
    row = next(row for row in found["rows"] if row["method"] == method)
    steps = told["settings"]["finetune_steps" if method == "fine-tuning" else "steps"]
    timing = (folder / "timing.jsonl").read_text(encoding="utf-8").splitlines()
    whole = {stage["stage"]: stage["seconds"] for stage in map(json.loads, timing)
             if stage["steps"] == steps}
    names = ("dataset", "n_train", "n_test", "num_classes")
    return {**row, **{name: found[name] for name in names}, "seconds": whole.get(method),
            "command": shlex.join(words)}


def gradient_ratio(words: Words) -> float:
    """‖∂L_Distill/∂θ‖ : ‖∂L_MAE/∂θ‖ of a run's student, on the first examples of D_u.

    --match is cls or hidden.
    """
    config = program.parse("distill", "", list(words[1:]))
    folder, kind = ROOT / words[-1], MODELS[config.modality]
    student = kind.from_pretrained(folder / "distilled-1.safetensors")
    teacher = kind.from_pretrained(ROOT / (config.teacher or folder / "further.safetensors"))
    data = load(config, student)
    config = settings.final(config, student, len(data.train))
    x = batch(data.train, torch.arange(config.batch_size), torch.device("cpu"))
    masked = distill.mask_input(student, x, config, draws.generator("ratio"))
    l1, hidden = student(x, unmasked=True, **masked)  # [B], [B, positions, D]
    compared = slice(1 if config.match == "cls" else None)
    l2 = distill.distillation_loss(hidden[:, compared], teacher.encoder(x)[:, compared])  # [B]
    weights = [p for p in student.encoder.parameters() if p.requires_grad]
    lengths = [nn.utils.get_total_norm(torch.autograd.grad(loss.mean(), weights, retain_graph=True))
               for loss in (l2, l1)]
    return (lengths[0] / lengths[1]).item()
