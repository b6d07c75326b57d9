"""One step measured: the project's own loops in turns with transformers and matrix products.

The loops run as they are (`distill.pretrain`, `finetune.train`, `finetune.predict`). A subclass of
`support.run.Run` takes the time of each step and, between two turns, lets the others do theirs.

Letters: B batch, K positions, Z masked ones, D width, P values in a patch, C classes, N examples,
S side.
"""
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
import bench_page
import bench_peer

import distill
import finetune
import mae
import mlm
from support import run, settings, texts

STAGES = ("further pre-training", "self-distillation", "fine-tuning", "evaluation")
TUNING = STAGES[2:]  # those with a classification head
EVALUATED = 256  # examples a batch in `finetune.predict`


@dataclass
class Case:
    """A model with its data: what is measured at every stage."""

    name: str
    config: mae.Config | mlm.Config
    weights: tuple[Path, Path]  # the student's and the teacher's
    inputs: Tensor | texts.Texts
    batch: int
    classes: int

    @property
    def text(self) -> bool:
        return isinstance(self.config, mlm.Config)

    @property
    def labels(self) -> Tensor:
        return torch.arange(len(self.inputs)) % self.classes  # [N]

    def first(self, count: int) -> "Case":
        """The same with so many of its examples."""
        few = torch.arange(count)
        whole = isinstance(self.inputs, Tensor)
        return replace(self, inputs=self.inputs[few] if whole else self.inputs.take(few))


# ----------------------------------------------------------------------------- FLOPs by formula


def layers(tokens: Tensor, depth: int, width: int, mlp: int) -> Tensor:
    """FLOPs of transformer layers on texts or pictures of so many tokens [B], each row alone.

    A token's linear maps are 4D² + 2D·mlp multiply-adds, its QKᵀ and weighted sum of V 2KD.
    """
    return 2 * depth * tokens * (4 * width**2 + 2 * width * mlp + 2 * tokens * width)  # [B]


def flops(config: mae.Config | mlm.Config, stage: str, K: Tensor, Z: Tensor, classes: int,
          peer: bool = False) -> float:
    """FLOPs of the matrix products that a step needs, of B rows of K [B] tokens, Z [B] masked.

    A backward pass costs two forward ones, but one for the patch embedding, whose input needs no
    gradient. The teacher is left out: it is frozen and sees the same every epoch. `peer`: what
    transformers computes: all positions predicted, texts padded, the teacher in every step.
    """
    K, Z, D = K.double(), Z.double(), config.width
    distils, passes = stage == "self-distillation", 1 if stage == "evaluation" else 3
    if isinstance(config, mlm.Config):
        if peer:
            K = K.max().expand(len(K))
            Z = K
        encoder, head = layers(K, config.depth, D, config.mlp), 2 * Z * D * (D + config.vocab_size)
        if stage in TUNING:
            head = 2 * D * (D + classes)
        return (passes * (encoder + head) + distils * (3 + peer) * encoder).sum().item()
    P, inner, seen = 3 * config.patch_size**2, config.decoder_width, K - Z
    patches, encoder = 2 * K * P * D, layers(1 + K, config.depth, D, config.mlp)  # [B] of all
    if stage in TUNING:
        return (min(passes, 2) * patches + passes * (encoder + 2 * D * classes)).sum().item()
    decoder = layers(1 + K, config.decoder_depth, inner, config.decoder_mlp) + 2 * inner * (
        (1 + seen) * D + (1 + K if peer else Z) * P)  # [B]
    if not peer:  # what comes after the last attention is for masked patches alone
        decoder -= 4 * inner * config.decoder_mlp * (1 + seen)  # [B]
    total = 3 * (layers(1 + seen, config.depth, D, config.mlp) + decoder)  # [B]
    total += 2 * (patches if distils or peer else 2 * seen * P * D)
    return (total + distils * (3 * encoder + peer * (3 * patches + encoder))).sum().item()


# ----------------------------------------------------------------------------- taking turns


class Timed(run.Run):
    """Times our steps in turns of a few and, between two turns, those of others, one by one."""

    def __init__(self, turn: int, where: torch.device,
                 others: dict[str, Callable[[int], object]] | None = None) -> None:
        super().__init__()
        self.turn, self.where, self.others, self.logged = turn, where, others or {}, {}
        self.seconds = {name: [] for name in ("ours", *self.others)}  # a step, turn by turn
        self.began = self.now()

    def now(self) -> float:
        """Seconds, once the device has done all that it was given."""
        if self.where.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def stage(self, *about: object) -> Iterator[int]:
        """The loop's own steps, timed; what the loop does before them is `before`."""
        self.before = self.now() - self.began
        return self.turns(super().stage(*about))

    def turns(self, steps: Iterable[int]) -> Iterator[int]:
        """Yields the steps given."""
        for step in steps:
            if step % self.turn == 0:
                began = self.now()
            yield step
            if (step + 1) % self.turn == 0:
                self.seconds["ours"].append((self.now() - began) / self.turn)
                for name, other in self.others.items():
                    began = self.now()
                    for i in range(step + 1 - self.turn, step + 1):
                        other(i)
                    self.seconds[name].append((self.now() - began) / self.turn)

    def log(self, index: Tensor, **values: Tensor) -> None:
        """Keep the first step's losses; in a long run few steps are logged."""
        self.logged = self.logged or {name: float(value) for name, value in values.items()}


def products(where: torch.device, width: int) -> dict[str, tuple[float, Callable[[int], Tensor]]]:
    """Matrix products large for a model's width, by name: their FLOPs, and a function for one."""
    found, gpu = {}, where.type == "cuda"
    for dtype in (torch.float32, torch.bfloat16)[:1 + gpu]:
        for n in (4096, 8192) if gpu else (2 * width, 4 * width):
            a, b, c = (torch.randn(n, n, device=where).to(dtype) for _ in range(3))
            name = f"{str(dtype).removeprefix('torch.')} {n}"
            found[name] = 2.0 * n**3, lambda _, a=a, b=b, c=c: torch.mm(a, b, out=c)
    return found


# ----------------------------------------------------------------------------- one stage


def load(case: Case, teacher: bool = False) -> nn.Module:
    """The student as it starts, or the teacher."""
    return (mlm.MLM if case.text else mae.MAE).from_pretrained(case.weights[teacher])


def configured(case: Case, model: nn.Module, steps: int, exact: bool, compiled: bool
               ) -> settings.Config:
    """The program's own defaults; exact: whatever lets two sides compute the same number."""
    config = settings.Config(
        steps=steps, batch_size=case.batch, finetune_steps=steps, finetune_batch_size=case.batch,
        mask_prob=None if case.text else 0.75, compile=compiled, dropout=0.0 if exact else None,
        masking="fixed" if exact and not case.text else "bernoulli",
        precision="fp32" if exact else "auto")
    return settings.fill(config, model, len(case.inputs))


def classifier(case: Case, model: nn.Module, config: settings.Config) -> finetune.Classifier:
    model.encoder.dropout.p = config.dropout
    return finetune.Classifier(model.encoder, case.classes, run.generator(config.seed, "head"))


def carry_out(case: Case, stage: str, this: Timed, steps: int, exact: bool = False,
              compiled: bool = False) -> Tensor | None:
    """Run the project's own loop, its steps passing through `this`; returns evaluation's logits."""
    model, logits = load(case), None
    config = configured(case, model, steps, exact, compiled)
    where = settings.device(config)
    if exact:
        model.encoder.dropout.p = 0.0
    if stage in STAGES[:2]:
        teacher = None
        if stage == "self-distillation":
            teacher = load(case, teacher=True).to(where).eval().requires_grad_(False)
        this.began = this.now()
        distill.pretrain(model, teacher, case.inputs, config, int(teacher is not None), this)
    else:
        tuned = classifier(case, model, config).to(where)
        if stage == "fine-tuning":
            finetune.train(tuned, case.inputs, case.labels, config, this, stage)
        else:
            run.compiled(tuned, config)
            for _ in this.turns(range(steps)):
                logits = finetune.predict(tuned, case.inputs, config)
    return logits


def drawn(case: Case, stage: str, model: nn.Module, config: settings.Config,
          step: int) -> bench_peer.Batch:
    """The batch and mask that the project's loop draws for a step, on the device."""
    where, text = settings.device(config), case.text
    t, stream = int(stage == "self-distillation"), "order"
    if stage == "fine-tuning":
        stream = "labelled order"
    index = run.draw_batch(len(case.inputs), case.batch, config.seed, stream, t, step)  # [B]
    if stage == "evaluation":
        index = torch.arange(len(case.inputs)).split(EVALUATED)[step]  # [B]
    x = run.batch(case.inputs, index, where)  # [B, 3, S, S] or [B, K]
    if stage in TUNING:
        if not text and stage == "fine-tuning":
            flip = torch.rand(len(x), generator=run.generator(config.seed, "flip", 0, step)) < 0.5
            x = torch.where(flip.to(where)[:, None, None, None], x.flip(3), x)
        return {"x": x, "labels": case.labels[index].to(where)}
    draws = run.generator(config.seed, "mask", t, step)
    mask, known = distill.mask_input(model, x, config, draws)  # [B, K]
    return {"x": x, "mask": mask} | ({"corrupted": known["corrupted"]} if text else {})


def work(case: Case, stage: str, batch: bench_peer.Batch) -> tuple[float, float, float]:
    """Pictures or real tokens of a batch; FLOPs that we need, and that transformers computes."""
    x = batch["x"]
    if case.text:
        K = (x != case.config.pad_id).sum(1).cpu()  # [B]
    else:
        K = torch.full((len(x),), x.shape[2] * x.shape[3] // case.config.patch_size**2)  # [B]
    Z = batch["mask"].sum(1).cpu() if "mask" in batch else torch.zeros(len(x))  # [B]
    counted = [flops(case.config, stage, K, Z, case.classes, other) for other in (False, True)]
    if not case.text:  # theirs masks an exact count
        Z = torch.full((len(x),), int(K[0]) - int(K[0] * 0.25))  # [B]
        counted[1] = flops(case.config, stage, K, Z, case.classes, True)
    return float(K.sum()) if case.text else float(len(x)), *counted


def agree(case: Case, stage: str, other: bench_peer.Peer) -> float:
    """|ours - theirs| / max(1, |theirs|) of a step's loss, or the largest one of the logits.

    Ours is what the real loop logs at its first step, in float32 and without dropout. Theirs is the
    mean over the examples one by one, as we normalise each by its own masks. Above 1e-4 it fails.
    """
    case = case.first(case.batch)
    model = load(case)
    config = configured(case, model, 1, True, False)
    if stage in TUNING:
        other.take_head(classifier(case, model, config).head())
    batch = drawn(case, stage, model, config, 0)
    this = Timed(1, settings.device(config))
    ours = carry_out(case, stage, this, 1, exact=True)
    other.model.eval()
    with torch.no_grad():
        if stage == "evaluation":
            theirs = other.scores(batch).float().cpu()  # [B, C]
        else:
            rows = [{name: values[b:b + 1] for name, values in batch.items()}
                    for b in range(case.batch)]
            theirs = torch.stack([other.loss(row) for row in rows]).mean().cpu()
            ours = torch.tensor(sum(v for name, v in this.logged.items() if "loss" in name))
    other.model.train()
    apart = ((ours - theirs).abs() / theirs.abs().clamp(min=1)).max().item()
    assert apart < 1e-4, f"{case.name}, {stage}: {ours} here, {theirs} with transformers"
    return apart


def measure(case: Case, stage: str, turns: int, with_peer: bool = False,
            compiled: bool = False) -> dict:
    """A row: seconds, FLOPs and examples a step, turn by turn, of ours, the others, the machine."""
    model = load(case)
    where = settings.device(settings.Config())
    gpu = where.type == "cuda"
    if stage == "evaluation" and not gpu:
        case = case.first(2 * case.batch)
    if stage == "fine-tuning" and gpu:
        case = replace(case, batch=32)  # the paper's
    config = configured(case, model, 1, False, compiled)
    turn, warm = (10, 2) if gpu and stage != "evaluation" else (1, 1)  # waiting at each hides gain
    steps = (warm + turns) * turn
    if stage == "self-distillation":  # few enough to be seen once: the teacher is remembered
        case = case.first(min(len(case.inputs), steps * case.batch))
    count = -(-len(case.inputs) // EVALUATED) if stage == "evaluation" else steps
    batches = [drawn(case, stage, model, config, step) for step in range(count)]
    done = [work(case, stage, batch) for batch in batches]
    if stage == "evaluation":  # one look at all examples is a step
        done = [tuple(map(sum, zip(*done)))] * steps
    others, peers = products(where, case.config.width), {}
    kinds = {"eager, float32": False, "sdpa, bf16, compiled": True} if gpu else {
        "sdpa, float32": True}
    for name, best in kinds.items() if with_peer else ():
        other = bench_peer.Peer(stage, case.weights, case.text, case.classes, config, where, best)
        peers[name] = {"apart": agree(case, stage, other)}
        if stage == "evaluation":
            others[name] = 0.0, lambda _, other=other: other.evaluate(batches)
        else:
            others[name] = 0.0, lambda step, other=other: other.step(batches[step])
    this = Timed(turn, where, {name: act for name, (_, act) in others.items()})
    carry_out(case, stage, this, steps, compiled=compiled)
    taken = {name: values[warm:] for name, values in this.seconds.items()}
    per_turn = [[sum(column) / turn for column in zip(*done[i:i + turn])]
                for i in range(warm * turn, steps, turn)]
    items, needed, theirs = zip(*per_turn)

    def peak(dtype: str) -> list[float]:  # FLOP/s of the best product, turn by turn
        speeds = [[size / s for s in taken[name]] for name, (size, _) in others.items()
                  if name.startswith(dtype)]
        return [max(found) for found in zip(*speeds)]

    for name in peers:
        peers[name] |= {"seconds": taken[name], "flops": theirs,
                        "peak": peak("bfloat16" if "bf16" in name else "float32")}
    print(f"{case.name}, {stage}: {bench_page.middle(taken['ours'])} s a step", flush=True)
    return {"model": case.name, "stage": stage, "batch": case.batch, "compiled": compiled,
            "unit": "tokens" if case.text else "images", "examples": len(case.inputs),
            "before": getattr(this, "before", 0.0), "items": items, "seconds": taken["ours"],
            "flops": needed, "peak": peak("bfloat16" if settings.uses_bf16(config) else "float32"),
            "peers": peers}
