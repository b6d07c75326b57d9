"""What a step costs: seconds, arithmetic and memory, and the same written with transformers.

    python -m experiments.bench --peer                  # ViT-B/16 and RoBERTa-base
    python -m experiments.bench --size tiny --steps 3   # models of the bundled sizes, in minutes

writes results/bench.md and .json (bench-tiny.*); a run on a GPU keeps what a CPU measured.
`distill.pretrain` and `finetune.train` run as they are: torch calls a `Turns` after every step.

Letters: B batch, K positions, D width, N examples, S side.
"""
import argparse
import importlib.util
import multiprocessing
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.flop_counter import FlopCounterMode

import distill
import finetune
import mae
import mlm
from experiments import repeat
from experiments.paper import MODELS
from support import draws, program, settings
from support.loop import batch
from support.run import Run, read_json, write_json
from support.texts import Texts

STAGES = ("further pre-training", "self-distillation, teacher live",
          "self-distillation, teacher remembered", "fine-tuning")
CLASSES = 100

# ----------------------------------------------------------------------------- our steps


class Case(NamedTuple):
    """What is measured: a stage of a model, and how many steps of it."""

    modality: str
    size: str  # base: the paper's model; tiny: as the bundled weights
    stage: str
    steps: int


def begin(case: Case, seed: int = 0) -> tuple[nn.Module, settings.Config, object]:
    """A model with random weights, the programs' settings for it, and the examples.

    Pictures are random, and texts of 16 to 128 tokens. The batch is the paper's on a GPU, else 8. A
    teacher is remembered where every example is seen at least once: N decides.
    """
    kind, image = MODELS[case.modality], case.modality == "image"
    tiny = kind.from_pretrained("tiny").config
    model = kind(tiny if case.size == "tiny" else type(tiny)(), draws.generator("bench", seed))
    B = 32 if case.stage == "fine-tuning" else 64 if image else 128
    B = B if torch.cuda.is_available() else 8
    N = case.steps * B + (case.stage == STAGES[1])
    config = settings.final(settings.Config(
        steps=case.steps, finetune_steps=case.steps, batch_size=B, finetune_batch_size=B,
        mask_prob=0.75 if image else 0.15), model, N)
    draw = draws.generator("bench inputs")
    if image:
        shape = N, 3, model.config.image_size, model.config.image_size
        return model, config, torch.randint(256, shape, dtype=torch.uint8, generator=draw)
    lengths = torch.randint(16, 129, (N,), generator=draw)  # [N]
    offsets = nn.functional.pad(lengths.cumsum(0), (1, 0))  # [N+1]
    ids = torch.randint(4, tiny.vocab_size - 1, (int(offsets[-1]),), generator=draw)
    ids[offsets[:-1]], ids[offsets[1:] - 1] = 0, 2  # <s>, </s>
    return model, config, Texts(ids, offsets, tiny.pad_id)


def carry_out(case: Case) -> None:
    """The project's own loop over the case's steps."""
    model, config, inputs = begin(case)
    if case.stage == "fine-tuning":
        model.encoder.dropout.p, labels = config.dropout, torch.arange(len(inputs)) % CLASSES
        tuned = finetune.Classifier(model.encoder, CLASSES).to(settings.device(config))
        finetune.train(tuned, inputs, labels, config, Run(), case.stage)
    elif case.stage == "further pre-training":
        distill.pretrain(model, None, inputs, config, 0, Run())
    else:
        teacher, _, _ = begin(case, seed=1)
        teacher.to(settings.device(config)).eval().requires_grad_(False)
        distill.pretrain(model, teacher, inputs, config, 1, Run())


# ----------------------------------------------------------------------------- taking turns


class Turns:
    """After every few of our steps, reads a clock and lets the others do as many.

    clock: seconds, or FLOPs, since some time. taken: what a step took, turn by turn.
    """

    def __init__(self, clock: Callable[[], float], turn: int,
                 others: dict[str, Callable[[int], object]]) -> None:
        self.clock, self.turn, self.others, self.step, self.busy = clock, turn, others, 0, False
        self.taken, self.began = {name: [] for name in ("ours", *others)}, clock()

    def __call__(self, *_: object) -> None:
        self.step += not self.busy  # else it was another's optimiser
        if not self.busy and self.step % self.turn == 0:
            self.busy = True
            self.note("ours")
            for name, other in self.others.items():
                for step in range(self.step - self.turn, self.step):
                    other(step)
                self.note(name)
            self.busy = False

    def note(self, name: str) -> None:
        self.taken[name].append((self.clock() - self.began) / self.turn)
        self.began = self.clock()


def by_turns(case: Case, clock: Callable[[], float], turn: int,
             others: dict[str, Callable[[int], object]]) -> dict[str, list[float]]:
    """What a step of ours and of the others took, turn by turn; the first only warms up."""
    turns = Turns(clock, turn, others)
    hook = register_optimizer_step_post_hook(turns)
    carry_out(case)
    hook.remove()
    return {name: values[1:] for name, values in turns.taken.items()}


def now() -> float:
    """Seconds, once the device has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(case: Case) -> int:
    """Bytes that a case takes at most, on the GPU or of this process; 0 if nobody tells."""
    carry_out(case)
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")  # of Linux
    found = re.search(r"VmHWM:\s+(\d+)", status.read_text() if status.exists() else "VmHWM: 0")
    return 1024 * int(found[1])


def measure(case: Case, turn: int, with_peer: bool = False) -> dict:
    """A row: what a step of ours and of transformers takes, and the machine's FLOP/s, by turns."""
    model, config, _ = begin(case)
    where, others = settings.device(config), {"transformers": Peer(case)} if with_peer else {}
    n = 8192 if where.type == "cuda" else 4 * model.config.width
    dtype = torch.bfloat16 if settings.uses_bf16(config) else torch.float32
    a, b, c = (torch.randn(n, n, device=where).to(dtype) for _ in range(3))  # [n, n]
    seconds = by_turns(case, now, turn, {**others, "product": lambda _: torch.mm(a, b, out=c)})
    # fused attention is not counted everywhere; written out it is
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        flops = by_turns(case, counter.get_total_flops, turn, others)
    print(f"{case.modality}, {case.stage}: {middle(seconds['ours'])} s a step", flush=True)
    return {"model": case.modality, "stage": case.stage, "batch": config.batch_size,
            "peak": [2 * n**3 / s for s in seconds["product"]],
            **{name: {"seconds": seconds[name], "flops": flops[name]} for name in flops}}


# ----------------------------------------------------------------------------- transformers


class Peer:
    """The same steps with transformers' models and losses and torch's AdamW, as they are used.

    Every position is predicted, texts are padded, and the teacher runs in every step. Batches and
    masks are ours and at hand, but of pictures exactly three quarters are masked.
    """

    def __init__(self, case: Case) -> None:
        import transformers as hub  # whoever compares has installed it
        self.case, (ours, self.config, inputs) = case, begin(case)
        text, tunes, sizes = case.modality == "text", case.stage == "fine-tuning", ours.config
        if text:
            kind = hub.RobertaForSequenceClassification if tunes else hub.RobertaForMaskedLM
            about = hub.RobertaConfig(vocab_size=sizes.vocab_size, type_vocab_size=1)
        else:
            kind = hub.ViTForImageClassification if tunes else hub.ViTMAEForPreTraining
            about = (hub.ViTConfig if tunes else hub.ViTMAEConfig)(
                image_size=sizes.image_size, patch_size=sizes.patch_size)
        for name, theirs in (mlm if text else mae).HUB_FIELDS.items():
            setattr(about, theirs, getattr(sizes, name))
        about.num_labels, about.norm_pix_loss, about._attn_implementation = CLASSES, True, "sdpa"
        about.hidden_dropout_prob = self.config.dropout if tunes else sizes.dropout
        about.attention_probs_dropout_prob = about.hidden_dropout_prob if text else 0.0
        where = settings.device(self.config)
        self.model, self.teacher = kind(about).to(where), kind(about).to(where).eval()
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.batches = [self.drawn(ours, inputs, step) for step in range(case.steps)]

    def drawn(self, model: nn.Module, inputs: object, step: int) -> tuple[Tensor, dict]:
        """The mini-batch that our loop draws for a step, and what their model is called with."""
        config, tunes = self.config, self.case.stage == "fine-tuning"
        stream, t = "labelled order" if tunes else "order", int(self.case.stage in STAGES[1:3])
        index = draws.batch(len(inputs), config.batch_size, step, config.seed, stream, t)  # [B]
        x = batch(inputs, index, settings.device(config))  # [B, 3, S, S] or [B, K]
        told = {"input_ids": x, "attention_mask": x != 1} if x.ndim == 2 else {"pixel_values": x}
        if tunes:
            return x, told | {"labels": (index % CLASSES).to(x.device)}
        draw = draws.generator(config.seed, "mask", t, step)
        masked = distill.mask_input(model, x, config, draw)
        if x.ndim == 4:
            return x, told | {"noise": masked["mask"].float()}
        return x, told | {"input_ids": masked["corrupted"],
                          "labels": x.masked_fill(~masked["mask"], -100)}

    def hidden(self, model: nn.Module, x: Tensor) -> Tensor:
        """Hidden states [B, 1+K, D] or [B, K, D] of unmasked input, zero at padding."""
        if x.ndim == 2:
            return model.roberta(x, x != 1).last_hidden_state * (x != 1)[..., None]
        order = torch.arange((x.shape[2] // model.config.patch_size)**2, device=x.device)  # [K]
        model.config.mask_ratio, usual = 0.0, model.config.mask_ratio
        states = model.vit(x, noise=order.expand(len(x), -1)).last_hidden_state
        model.config.mask_ratio = usual
        return states

    def __call__(self, step: int) -> None:
        """One step of training."""
        x, told = self.batches[step]
        with settings.autocast(self.config):
            loss = self.model(**told).loss
            if self.case.stage in STAGES[1:3]:
                with torch.no_grad():
                    target = self.hidden(self.teacher, x)
                loss = loss + distill.distillation_loss(self.hidden(self.model, x), target).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()


# ----------------------------------------------------------------------------- the page

RULES = """\
Steps of `distill.pretrain` and `finetune.train` with the programs' settings, on random weights,
pictures and texts; in turn with them the same with transformers, and a large product of matrices,
so that ratios compare neighbours in time. Medians over the turns, with quartiles. FLOPs are those
of all products that were done, as torch counts them; their share is of what the large product
reaches. GiB: the most that two steps take in a process of their own, on a GPU or in all."""


def middle(values: list[float]) -> str:
    """Median and, of three values and more, the quartiles."""
    if len(values) < 3:
        return f"{statistics.median(values):.3g}"
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{median:.3g} ({low:.3g}–{high:.3g})"


def page(record: dict) -> str:
    """The Markdown page, from nothing but the record."""
    lines = ["# bench", "", RULES]
    for device, found in record.items():
        peaks = middle([peak / 1e12 for row in found["rows"] for peak in row["peak"]])
        heads = ["model", "step", "batch", "GiB", "s", "TFLOP", "share, %"]
        if found["peer"]:
            heads += ["transformers: s", "TFLOP", "share, %", "ours is faster"]
        lines += ["", f"## {'GPU' if device == 'cuda' else 'CPU'}", "",
                  f"`{found['command']}`: {found['machine']}{found['peer']}. The large product: "
                  f"{peaks} TFLOP/s.", "", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
        for row in found["rows"]:
            sides = [row[name] for name in ("ours", "transformers") if name in row]
            cells = [row["model"], row["stage"], str(row["batch"]),
                     f"{row['bytes'] / 2**30:.3g}" if row["bytes"] else "–"]
            for side in sides:
                turns = zip(side["flops"], side["seconds"], row["peak"])
                cells += [middle(side["seconds"]), f"{statistics.median(side['flops']) / 1e12:.3g}",
                          middle([100 * f / s / peak for f, s, peak in turns])]
            for ours, theirs in zip(sides, sides[1:]):
                pairs = zip(ours["seconds"], theirs["seconds"])
                cells.append(f"{middle([b / a for a, b in pairs])} ×")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


# ----------------------------------------------------------------------------- the program


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="store_true", help="the same with transformers, too")
    parser.add_argument("--size", choices=("base", "tiny"), default="base", help="of the models")
    parser.add_argument("--steps", type=int, default=7, help="turns; on a GPU one has 10 steps")
    parser.add_argument("--out", type=Path, default=repeat.ROOT / "results", help="of the page")
    args = parser.parse_args()
    if args.peer and not importlib.util.find_spec("transformers"):
        parser.error("--peer compares with transformers: pip install it, or leave out --peer")
    device, rows = settings.device(settings.Config()).type, []
    turn = 10 if device == "cuda" else 1  # waiting for a GPU after each step hides what it gains
    for modality in MODELS:
        for stage in STAGES:
            case = Case(modality, args.size, stage, (1 + args.steps) * turn)
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
                held = fresh.submit(peak_memory, case._replace(steps=2)).result()
            rows.append(measure(case, turn, args.peer) | {"bytes": held})
    peer = f", transformers {sys.modules['transformers'].__version__}" if args.peer else ""
    path = args.out / f"bench{'-tiny' * (args.size == 'tiny')}.json"
    record = read_json(path) if path.exists() else {}
    record[device] = {"command": f"python -m experiments.bench {shlex.join(sys.argv[1:])}",
                      "machine": repeat.machine(), "peer": peer, "rows": rows}
    write_json(record, path)
    path.with_suffix(".md").write_text(page(record), encoding="utf-8")
    print(f"\n{page(record)}\nwrote {path.with_suffix('.md')}")


if __name__ == "__main__":
    program.run(main)
