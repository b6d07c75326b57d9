"""What a step costs, and the same step with transformers; with --gpu-check all that proves a GPU.

    python -m experiments.bench --peer              # on a CPU: results/bench.md and .json
    python -m experiments.bench --gpu-check --peer  # on a GPU: results/gpu.md and .json

`distill.pretrain` and `finetune.train` run as they are, with the programs' settings, on ViT-B/16
and RoBERTa-base: torch calls back after every step, and enough of them end the loop. gpu_check.py
has what else is checked of a GPU. It is meant to take ten minutes, with --peer some more.

Letters: B batch, N examples, S side.
"""
import argparse
import gc
import importlib.util
import itertools
import math
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import distill
import finetune
from experiments import gpu_check, pages, runs
from experiments.peers import BATCHES, Peer
from support import draws, fetch, program, recipes, settings
from support.run import Run, write_json
from support.settings import Config
from support.texts import Texts

STAGES = ("further pre-training", "self-distillation", "fine-tuning")
# What a step needs, in GFLOP, two a multiply-add: a 224 px picture by ViT-B/16 with γ = 0.75, and a
# text of 72 tokens by RoBERTa-base (0.56, 1.08 and 0.52 a token). What is trained costs thrice its
# forward pass (encoder 35.1, of a quarter of the patches 8.6, decoder 10.5; a token 0.175); a
# remembered teacher costs nothing.
GFLOP = {"image": (58, 164, 105), "text": (40, 78, 37)}
USUAL = {"image": 64, "text": 128}  # the paper's batches; fine-tuning has 32
TURNS = 7  # so often a step is measured
# dense bf16 peaks with float32 sums, TFLOP/s
PEAKS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "RTX 3090": 71, "RTX 4090": 165}

# ----------------------------------------------------------------------------- our steps


def begin(config: Config, tiny: bool = False) -> tuple[nn.Module, Config, object]:
    """A model of the paper's size or the bundled one's, final settings, and random examples.

    Texts have 16 to 128 tokens. Every example is seen often, so that a teacher is remembered.
    """
    kind, N = runs.MODELS[config.modality], BATCHES * config.batch_size
    sizes = kind.from_pretrained("tiny").config
    model = kind(sizes if tiny else type(sizes)(), draws.generator("bench"))
    config, draw = settings.final(config, model, N), draws.generator("bench inputs")
    if config.modality == "image":
        shape = N, 3, model.config.image_size, model.config.image_size
        return model, config, torch.randint(256, shape, dtype=torch.uint8, generator=draw)
    lengths = torch.randint(16, 129, (N,), generator=draw)  # [N]
    offsets = nn.functional.pad(lengths.cumsum(0), (1, 0))  # [N+1]
    ids = torch.randint(4, sizes.vocab_size - 1, (int(offsets[-1]),), generator=draw)
    ids[offsets[:-1]], ids[offsets[1:] - 1] = 0, 2  # <s>, </s>
    return model, config, Texts(ids, offsets, sizes.pad_id)


def carry_out(stage: str, config: Config, tiny: bool = False) -> None:
    """The project's own loop over the steps of a stage."""
    model, config, inputs = begin(config, tiny)
    if stage == "fine-tuning":
        tuned = finetune.new_classifier(model, list("0123456789"), config)
        finetune.train(tuned, inputs, torch.arange(len(inputs)) % 10, config, Run(), stage)
        return
    learner, teacher = distill.learner(model, config), None
    if stage == "self-distillation":
        teacher = model.to(settings.device(config)).eval().requires_grad_(False)
    distill.pretrain(learner, teacher, inputs, config, 1 if teacher else 0, Run())


class Enough(Exception):
    """So many steps were taken as were asked for."""


def now() -> float:
    """Seconds, once a GPU has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def by_turns(loop: Callable[[], None], turns: int, steps: int,
             others: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of a step of a loop, and of others that do as many in turn with it, turn by turn.

    A turn has so many steps; one more than is told comes first and only warms up.
    """
    taken, done, busy, began = {name: [] for name in ("ours", *others)}, 0, False, now()

    def note(name: str) -> None:
        nonlocal began
        taken[name].append((now() - began) / steps)
        began = now()

    def after_step(*_: object) -> None:
        nonlocal done, busy
        done += not busy  # else it was another's optimiser
        if busy or done % steps:
            return
        busy = True
        note("ours")
        for name, other in others.items():
            for _ in range(steps):
                other()
            note(name)
        busy = False
        if len(taken["ours"]) > turns:
            raise Enough

    hook = register_optimizer_step_post_hook(after_step)
    try:
        loop()
    except Enough:
        return {name: values[1:] for name, values in taken.items()}
    finally:
        hook.remove()


# ----------------------------------------------------------------------------- what is measured


def measure(stage: str, config: Config, turns: int, compare: bool, tiny: bool = False) -> dict:
    """A row: seconds of a step, the GFLOP that it needs, and the most of a GPU's memory.

    compare: with transformers, set as ours is and, on a GPU, first as most people run it.
    """
    gpu, plain = config.device == "cuda", replace(config, precision="fp32", compile=False)
    steps = 10 if gpu else 1  # waiting for a GPU after each would hide what it gains
    gc.collect()  # what earlier rows left behind is not this one's
    if gpu:
        torch.cuda.reset_peak_memory_stats()

    def loop() -> None:
        carry_out(stage, config, tiny)

    row = {"model": config.modality, "step": stage, "batch": config.batch_size,
           "products": settings.products(config) + ", compiled" * config.compile,
           "seconds": by_turns(loop, 1 if compare else turns, steps, {}),
           "gflop": GFLOP[config.modality][STAGES.index(stage)] * config.batch_size,
           "bytes": torch.cuda.max_memory_allocated() if gpu else 0}
    if compare:
        ways = {"eager, float32": (plain, "eager")} if gpu else {}
        ways |= {"sdpa, as ours": (config, "sdpa")}
        others = {name: Peer(stage, *begin(how, tiny), attention)
                  for name, (how, attention) in ways.items()}
        row["seconds"] = by_turns(loop, turns, steps, others)
    print(*list(row.values())[:4], f"{middle(row['seconds']['ours'])} s", flush=True)
    return row


def measured(device: str, compare: bool) -> list[dict]:
    """All rows: batches of 8, on a GPU the paper's and four times as much, eager and compiled."""
    rows = []
    for (modality, usual), stage in itertools.product(USUAL.items(), STAGES):
        usual, ways = 32 if stage == "fine-tuning" else usual, [(8, False)]
        if device == "cuda":
            ways = itertools.product((usual, 4 * usual), (False, True))
        for size, compiled in ways:
            config = Config(gpu_check.TOYS[modality], device=device, compile=compiled,
                            batch_size=size, finetune_batch_size=size)
            beside = compare and (size, compiled) in ((8, False), (usual, True))
            try:
                rows.append(measure(stage, config, TURNS, beside))
            except torch.OutOfMemoryError:
                print(f"{modality}, {stage}: no memory for batches of {size}")
    return rows


def peak() -> float:
    """TFLOP/s of the GPU by its name; where that is not known, of a large product of matrices."""
    for name, rate in PEAKS.items():
        if name in torch.cuda.get_device_name():
            return rate
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)  # [n, n]
    a.mm(a)  # warms up
    began = now()
    for _ in range(10):
        a.mm(a)
    return 10 * 2e-12 * 8192**3 / (now() - began)


# ----------------------------------------------------------------------------- the page

RULES = """\
Steps of `distill.pretrain` and `finetune.train` with the programs' settings, on random weights,
pictures and texts; in turn with them the same with transformers, so that ratios compare neighbours
in time. Medians over the turns, with quartiles. TFLOP/s count what a step needs, whatever else is
computed: 58 GFLOP a picture of further pre-training, 164 of self-distillation with a remembered
teacher, 105 of fine-tuning; 0.56, 1.08 and 0.52 a token."""


def middle(values: list[float]) -> str:
    """Median and, of three values and more, the quartiles."""
    if len(values) < 3:
        return f"{statistics.median(values):.3g}"
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{median:.3g} ({low:.3g}–{high:.3g})"


def table(rows: list[dict], peak: float) -> list[str]:
    """Rows as Markdown; with shares of a GPU's peak and its memory, where there is one."""
    others = list(dict.fromkeys(name for row in rows for name in row["seconds"] if name != "ours"))
    heads, lines = ["model", "step", "batch", "computed in", "s", "TFLOP/s"], []
    heads += ["share, %", "GiB"] if peak else []
    for row in rows:
        ours = row["seconds"]["ours"]
        rate = row["gflop"] / 1000 / statistics.median(ours)
        cells = [row["model"], row["step"], str(row["batch"]), row["products"], middle(ours),
                 f"{rate:.3g}"]
        cells += [f"{100 * rate / peak:.3g}", f"{row['bytes'] / 2**30:.3g}"] if peak else []
        for name in others:
            theirs = row["seconds"].get(name, [])
            faster = [b / a for a, b in zip(ours, theirs)]
            cells += [middle(theirs), f"{middle(faster)} ×"] if theirs else ["–", "–"]
        lines.append(cells)
    for name in others:
        heads += [f"transformers, {name}: s", "ours is faster"]
    return pages.grid(heads, lines)


def column(rows: list[dict]) -> list[str]:
    """The paper's run on CUB by the fastest steps at its batches, beside the paper's minutes."""
    lines, recipe = [], recipes.DEFAULTS["image", "paper"]
    for stage, theirs in pages.SECONDS.items():
        prefix = "finetune_" * (stage == "fine-tuning")
        steps, size = recipe[f"{prefix}steps"], recipe[f"{prefix}batch_size"]
        ours = min([statistics.median(row["seconds"]["ours"]) for row in rows
                    if (row["model"], row["step"], row["batch"]) == ("image", stage, size)],
                   default=math.nan)
        lines.append([stage, f"{steps} of {size}", f"{steps * ours / 60:.1f}",
                      f"{theirs / 60:.1f}"])
    return pages.grid(["", "steps", "here, min", "the paper, RTX 3090, min"], lines)


def page(record: dict) -> str:
    """The Markdown page, from nothing but the record."""
    lines = [f"# {record['name']}", "", f"`{record['command']}`: {record['machine']}, "
             f"{record['minutes']:.0f} minutes.", ""]
    if record["checks"]:
        checks = [[f"`{line['name']}`", line["what"], "; ".join(
            f"{name} {value:.2g}" for name, value in line["told"].items()) or
            f"**FAILS**: {line['failed']}"] for line in record["checks"]]
        lines += [*pages.grid(["check", "what holds", "measured"], checks), ""]
    lines += [RULES + f" Shares are of {record['peak']:.0f} TFLOP/s." * bool(record["peak"]), "",
              *table(record["rows"], record["peak"])]
    if record["checks"]:
        lines += ["", "What this makes of the paper's run on CUB:", "", *column(record["rows"])]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu-check", action="store_true", help="all that only a GPU can show")
    parser.add_argument("--peer", action="store_true", help="the same with transformers, too")
    args = parser.parse_args()
    if args.gpu_check and not torch.cuda.is_available():
        raise fetch.BadInput("--gpu-check needs a GPU that CUDA sees, and torch sees none")
    if args.peer and not importlib.util.find_spec("transformers"):
        raise fetch.BadInput("--peer compares with transformers: pip install it, or leave it out")
    name, device = ("gpu", "cuda") if args.gpu_check else ("bench", "cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the start: the same bits
    torch._dynamo.config.recompile_limit = 64  # of one layer's code, for all sizes of models
    began, machine = time.monotonic(), runs.machine()
    checks = [gpu_check.attempt(check, device) for check in gpu_check.CHECKS * args.gpu_check]
    rows = measured(device, args.peer)
    if args.peer:
        machine += f", transformers {sys.modules['transformers'].__version__}"
    record = {"name": name, "command": f"python -m experiments.bench {shlex.join(sys.argv[1:])}",
              "machine": machine, "minutes": (time.monotonic() - began) / 60, "checks": checks,
              "peak": peak() if args.gpu_check else 0, "rows": rows}
    path = fetch.ROOT / "results" / f"{name}.md"
    write_json(record, path.with_suffix(".json"))
    path.write_text(page(record), encoding="utf-8")
    print(f"\n{page(record)}\nwrote {path}")
    if failed := [check["name"] for check in checks if check["failed"]]:
        raise OSError(f"{', '.join(failed)} failed, and {path} says why")


if __name__ == "__main__":
    program.run(main)
