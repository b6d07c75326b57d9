"""What a step costs: against transformers, and against the machine's own matrix products.

    python experiments/bench.py --peer                # ViT-B/16 and RoBERTa-base; results/bench.md
    python experiments/bench.py --size tiny --steps 3 # models of the bundled sizes, in seconds

The project's own loops run as they are (`distill.pretrain`, `finetune.train`, `finetune.predict`).
A subclass of `support.run.Run` takes the time of each step and, between two of them, lets
transformers do the same step (`--peer`) and the machine a few plain matrix products: a slow moment
of the machine meets them all, and ratios are taken turn by turn. Each part of the page can be
measured anew without the others, and one made on a GPU keeps what a CPU measured.

Letters: B batch, K positions, Z masked ones, D width, M inner width, P values in a patch, C classes,
V vocabulary, N examples.
"""
import argparse
import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
import bench_page
import peer
import repeat

import distill
import finetune
import mae
import mlm
from support import fetch, images, run, texts

STAGES = ("further pre-training", "self-distillation", "fine-tuning", "evaluation")
PARTS = ("steps", "loading", "growth", "column")


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

    4D² + 2DM multiply-adds a token for the linear maps, 2KD for QKᵀ and the weighted sum of V.
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
    train, distils = 1 if stage == "evaluation" else 3, stage == "self-distillation"
    tuning, full = stage in STAGES[2:], 2 * train * len(K) * D * classes
    if isinstance(config, mlm.Config):
        if peer:
            K = K.max().expand(len(K))
            Z = K
        body = layers(K, config.depth, D, config.mlp)  # [B]
        if tuning:
            return (train * body.sum() + 2 * train * len(K) * D * D + full).item()
        head = 2 * Z * (D * D + D * config.vocab_size)  # [B]
        return (3 * (head + body) + (3 + peer) * distils * body).sum().item()
    P, width = 3 * config.patch_size**2, config.decoder_width
    patches, body = 2 * K * P * D, layers(1 + K, config.depth, D, config.mlp)  # [B]
    if tuning:
        return ((2 if train == 3 else 1) * patches + train * body).sum().item() + full
    seen = K - Z
    decoder = layers(1 + K, config.decoder_depth, width, config.decoder_mlp) + 2 * width * (
        (1 + seen) * D + (1 + K if peer else Z) * P)  # [B]
    embedded = 2 * K * P * D if distils or peer else 2 * seen * P * D  # [B]
    total = 2 * embedded + 3 * (layers(1 + seen, config.depth, D, config.mlp) + decoder)  # [B]
    if distils:
        total = total + 3 * body + peer * (2 * patches + patches + body)  # [B]
    return total.sum().item()


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

    def stage(self, *settings: object) -> Iterator[int]:
        """The loop's own steps, timed; what the loop does before them is `before`."""
        self.before = self.now() - self.began
        return self.turns(super().stage(*settings))

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

    def log(self, **values: Tensor) -> None:
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


def load(case: Case) -> tuple[nn.Module, nn.Module]:
    """The student at its start, and the teacher."""
    kind = mlm.MLM if case.text else mae.MAE
    student, teacher = (kind.from_pretrained(path) for path in case.weights)
    return student, teacher


def settings(case: Case, model: nn.Module, steps: int, exact: bool, compiled: bool) -> run.Config:
    """The program's own defaults; exact: whatever lets two sides compute the same number."""
    config = run.Config(
        steps=steps, batch_size=case.batch, finetune_steps=steps, finetune_batch_size=case.batch,
        mask_prob=None if case.text else 0.75, compile=compiled, dropout=0.0 if exact else None,
        masking="fixed" if exact and not case.text else "bernoulli",
        precision="fp32" if exact else "auto")
    return run.fill(config, model, len(case.inputs))


def classifier(case: Case, model: nn.Module, config: run.Config) -> finetune.Classifier:
    model.encoder.dropout.p = config.dropout
    return finetune.Classifier(model.encoder, case.classes, run.generator(config.seed, "head"))


def carry_out(case: Case, stage: str, this: Timed, steps: int, exact: bool = False,
              compiled: bool = False) -> Tensor | None:
    """Run the project's own loop, its steps passing through `this`; returns evaluation's logits."""
    model, teacher = load(case)
    config, logits = settings(case, model, steps, exact, compiled), None
    where = run.device(config)
    if exact:
        model.encoder.dropout.p = 0.0
    if stage in STAGES[:2]:
        distils = stage == "self-distillation"
        teacher = teacher.to(where).eval().requires_grad_(False) if distils else None
        this.began = this.now()
        distill.pretrain(model, teacher, case.inputs, config, int(distils), this)
    else:
        tuned = classifier(case, model, config).to(where)
        if stage == "fine-tuning":
            finetune.train(tuned, case.inputs, case.labels, config, this, stage)
        else:
            run.compiled(tuned.encoder, config)
            for _ in this.turns(range(steps)):
                logits = finetune.predict(tuned, case.inputs, config)
    return logits


def drawn(case: Case, stage: str, model: nn.Module, config: run.Config, step: int) -> peer.Batch:
    """The batch and mask that the project's loop draws for a step, on the device."""
    where, text = run.device(config), case.text
    t, stream = int(stage == "self-distillation"), "order"
    if stage == "fine-tuning":
        stream = "labelled order"
    index = run.draw_batch(len(case.inputs), case.batch, config.seed, stream, t, step)  # [B]
    if stage == "evaluation":
        index = torch.arange(step * case.batch, min(len(case.inputs), (step + 1) * case.batch))
    x = run.batch(case.inputs, index, where)  # [B, 3, S, S] or [B, K]
    if stage in STAGES[2:]:
        if not text and stage == "fine-tuning":
            flip = torch.rand(len(x), generator=run.generator(config.seed, "flip", 0, step)) < 0.5
            x = torch.where(flip.to(where)[:, None, None, None], x.flip(3), x)
        return {"x": x, "labels": case.labels[index].to(where)}
    draws = run.generator(config.seed, "mask", t, step)
    if text:
        mask = model.draw_mask(x, config.mask_prob, draws)  # [B, K]
        return {"x": x, "mask": mask, "corrupted": x.masked_fill(mask, case.config.mask_id)}
    draw = mae.fixed_mask if config.masking == "fixed" else mae.bernoulli_mask
    return {"x": x, "mask": model.draw_mask(x, config.mask_prob, draws, draw)}


def work(case: Case, stage: str, batch: peer.Batch) -> tuple[float, float, float]:
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


def agree(case: Case, stage: str, other: peer.Peer) -> float:
    """|ours - theirs| / max(1, |theirs|) of a step's loss, or the largest one of the logits.

    Ours is what the real loop logs at its first step, in float32 and without dropout. Theirs is the
    mean over the examples one by one, as we normalise each by its own masks. Above 1e-4 it fails.
    """
    case = case.first(case.batch)
    model, _ = load(case)
    config = settings(case, model, 1, True, False)
    if stage in STAGES[2:]:
        other.take_head(classifier(case, model, config).head())
    batch = drawn(case, stage, model, config, 0)
    this = Timed(1, run.device(config))
    ours = carry_out(case, stage, this, 1, exact=True)
    other.model.eval()
    with torch.no_grad():
        if stage == "evaluation":
            theirs = other.scores(batch).float().cpu()  # [B, C]
        else:
            rows = [{name: values[b:b + 1] for name, values in batch.items()}
                    for b in range(case.batch)]
            # nothing masked is 0 for us and 0 / 0 for them
            theirs = torch.stack([other.loss(row) for row in rows]).nan_to_num().mean().cpu()
            ours = torch.tensor(sum(v for name, v in this.logged.items() if "loss" in name))
    other.model.train()
    apart = ((ours - theirs).abs() / theirs.abs().clamp(min=1)).max().item()
    assert apart < 1e-4, f"{case.name}, {stage}: {ours} here, {theirs} with transformers"
    return apart


def measure(case: Case, stage: str, turns: int, with_peer: bool = False,
            compiled: bool = False) -> dict:
    """A row: seconds, FLOPs and examples a step, turn by turn, of ours, the others, the machine."""
    model, _ = load(case)
    config = settings(case, model, 1, False, compiled)
    where = run.device(config)
    gpu = where.type == "cuda"
    turn, warm = (10, 2) if gpu and stage != "evaluation" else (1, 1)  # waiting at each hides gain
    steps = (warm + turns) * turn
    count = -(-len(case.inputs) // case.batch) if stage == "evaluation" else steps
    batches = [drawn(case, stage, model, config, step) for step in range(count)]
    done = [work(case, stage, batch) for batch in batches]
    if stage == "evaluation":  # one look at all examples is a step
        done = [tuple(map(sum, zip(*done)))] * steps
    others, peers = products(where, case.config.width), {}
    kinds = {"eager, float32": False, "sdpa, bf16, compiled": True} if gpu else {
        "sdpa, float32": True}
    for name, best in kinds.items() if with_peer else ():
        given = {"classes": case.classes, "dropout": config.dropout, **(
            dict(lr=config.lr, weight_decay=config.weight_decay, clip=config.clip)
            if stage in STAGES[:2] else dict(lr=config.finetune_lr, clip=config.finetune_clip,
                                             weight_decay=config.finetune_weight_decay))}
        other = peer.Peer(stage, case.weights, case.text, given, where, best)
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
    for name in peers:
        peers[name] |= {"seconds": taken[name], "flops": theirs}
    speeds = {name: [size / s for s in taken[name]] for name, (size, _) in others.items() if size}
    peak = {dtype: [max(found) for found in zip(*(
        speed for name, speed in speeds.items() if name.startswith(dtype)))]
        for dtype in ("float32", "bfloat16")[:1 + gpu]}
    print(f"{case.name}, {stage}: {bench_page.middle(taken['ours'])} s a step", flush=True)
    return {"model": case.name, "stage": stage, "batch": case.batch, "compiled": compiled,
            "unit": "tokens" if case.text else "images", "examples": len(case.inputs),
            "before": getattr(this, "before", 0.0), "items": items, "seconds": taken["ours"],
            "flops": needed, "peak": peak["bfloat16" if run.uses_bf16(config) else "float32"],
            "peak_float32": peak["float32"], "peers": peers}


# ----------------------------------------------------------------------------- the parts


def write_weights(config: mae.Config | mlm.Config, folder: Path, name: str,
                  with_peer: bool) -> tuple[Path, Path]:
    """Two random models of these sizes; transformers writes them where it is to read them."""
    paths = tuple(folder / f"{name}-{seed}" / "model.safetensors" for seed in (0, 1))
    for seed, path in enumerate(paths):
        if with_peer:
            peer.save(config, path.parent, seed)
        else:
            kind = mlm.MLM if isinstance(config, mlm.Config) else mae.MAE
            kind(config, run.generator(seed, "bench")).save(path)
    return tuple(path.parent for path in paths) if with_peer else paths


def pixels(N: int, side: int) -> Tensor:
    """Random pictures uint8 [N, 3, side, side]."""
    draws = run.generator("bench pictures", side)
    return torch.randint(256, (N, 3, side, side), dtype=torch.uint8, generator=draws)


def words(config: mlm.Config, N: int, K: int) -> Tensor:
    """Random texts [N, K] without padding."""
    ids = torch.randint(4, config.vocab_size - 1, (N, K), generator=run.generator("bench", K))
    ids[:, 0], ids[:, -1] = 0, 2  # <s>, </s>
    return ids


def real_texts(config: mlm.Config, N: int, data_dir: Path, folder: Path) -> tuple[str, texts.Texts]:
    """N of SciERC's training texts or, where they are not on disk, of pydocs."""
    there = (data_dir / "scierc").is_dir()
    tokenizer = mlm.MLM.from_pretrained("tiny").tokenizer
    data = texts.load(str(data_dir / "scierc") if there else "pydocs", folder, tokenizer,
                      config.max_length)
    chosen = torch.randperm(len(data.train), generator=run.generator("bench texts"))[:N]
    return "SciERC" if there else "pydocs", data.train.take(chosen)


def make_cases(size: str, gpu: bool, data_dir: Path, folder: Path, with_peer: bool) -> list[Case]:
    """ViT, then RoBERTa on real texts and on full rows of two lengths."""
    vit, roberta = mae.Config(), mlm.Config()
    names = "ViT-B/16", "RoBERTa-base"
    if size == "tiny":
        vit, roberta = (kind.from_pretrained("tiny").config for kind in (mae.MAE, mlm.MLM))
        names = "tiny ViT", "tiny RoBERTa"
    batches, N = ((64, 128), 1024) if gpu else ((8, 8), 64)
    weights = [write_weights(config, folder, name.replace("/", "-"), with_peer)
               for config, name in zip((vit, roberta), names)]
    side, lengths = vit.image_size, (128, 512) if size == "base" else (64, 128)
    source, real = real_texts(roberta, N, data_dir, folder)
    cases = [Case(f"{names[0]}, {side} px", vit, weights[0], pixels(N, side), batches[0], 200),
             Case(f"{names[1]}, {source}", roberta, weights[1], real, batches[1], 7)]
    for K in lengths:  # as many tokens a batch
        batch = batches[1] * lengths[0] // K
        cases.append(Case(f"{names[1]}, {K} tokens", roberta, weights[1],
                          words(roberta, 8 * batch, K), batch, 7))
    return cases


def steps(cases: list[Case], turns: int, with_peer: bool, gpu: bool) -> list[dict]:
    """Every stage of every case; on a GPU, training also compiled."""
    return [measure(case, stage, turns, with_peer, compiled)
            for compiled in (False, True)[:1 + gpu] for case in cases
            for stage in STAGES[:4 - compiled]]


def take_pictures(data_dir: Path, folder: Path, N: int) -> str:
    """Fill a folder with N pictures of CUB or, where it is not on disk, with drawn birds."""
    files = sorted((data_dir / "CUB_200_2011" / "images").rglob("*.jpg"))
    chosen = torch.randperm(len(files), generator=run.generator("bench files"))[:N].tolist()
    folder.mkdir()
    for i in chosen:
        shutil.copyfile(files[i], folder / files[i].name)
    if not chosen:
        for i, bird in enumerate(images.toybirds("train", -(-N // 20), 80)[0][:N]):
            images.Image.fromarray(bird.permute(1, 2, 0).numpy()).save(folder / f"{i}.jpg")
    size = sum(file.stat().st_size for file in folder.iterdir()) / N / 1000
    return f"{N} {'pictures of CUB' if chosen else 'drawn birds'}, {size:.1f} kB each"


def loading(pictures: Path, about: str, side: int, turns: int, with_peer: bool,
            folder: Path) -> dict:
    """Seconds until all pictures of a folder were delivered as batches: ours, then their loader."""
    where, files = run.device(run.Config()), sorted(pictures.iterdir())

    def deliver() -> Tensor:
        data = images.load(str(pictures), folder, side)
        return [run.batch(data.train, index, where)
                for index in torch.arange(len(files)).split(64)][0]

    seconds, delivered = {}, {}

    def timed(name: str, act: Callable[[], Tensor]) -> None:
        began = time.perf_counter()
        delivered[name] = act()
        seconds.setdefault(name, []).append(time.perf_counter() - began)

    for _ in range(turns):
        shutil.rmtree(folder / "cache", ignore_errors=True)
        timed("first start", deliver)
        timed("later start", deliver)
        for workers in sorted({0, os.cpu_count()}) if with_peer else ():
            timed(f"transformers, {workers} workers", lambda: [
                batch.to(where) for batch in peer.loader(files, side, 64, workers)][0])
    apart = max(((delivered["later start"] - theirs).abs().max().item()
                 for name, theirs in delivered.items() if "workers" in name), default=0.0)
    assert apart < 1e-4, f"the two deliver other pixels, {apart} apart"
    processor = type(peer.library().ViTImageProcessor()).__name__ if with_peer else ""
    return {"about": about, "side": side, "pictures": len(files), "seconds": seconds,
            "processor": processor}


def processes(weights: Path, pictures: Path, batch: int, count: int, folder: Path) -> dict | None:
    """Further pre-training by distill.py on so many processes; None where it cannot be run."""
    out, threads = folder / f"processes-{count}", max(1, torch.get_num_threads() // count)
    command = ["-m", "torch.distributed.run", "--nproc-per-node", str(count), "distill.py",
               "--dataset", str(pictures), "--data-dir", str(folder), "--init", str(weights),
               "--steps", "8", "--batch-size", str(batch), "--rounds", "0", "--out", str(out)]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    path = out / "timing.jsonl"
    if done.returncode or not path.exists():
        return None
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    told = next(line for line in lines if line["stage"] == "further pre-training")
    return {"seconds": told["seconds"] / told["steps"], "threads": threads, "steps": told["steps"]}


def growth(cases: list[Case], turns: int, gpu: bool, pictures: Path, folder: Path) -> dict:
    """A step of further pre-training as one quantity grows, the others kept."""
    vit, text, turns = cases[0], cases[2], min(turns, 3)
    side, base = vit.config.image_size, vit.batch
    sides = {round(side * share / vit.config.patch_size) * vit.config.patch_size
             for share in (0.5, 0.75, 1, 1.5)}
    longest = text.config.max_length
    grown = {
        "batch size, images": [(B, replace(vit, batch=B)) for B in (
            (16, 64, 128, 256, 512) if gpu else (1, 2, 4, 8, 16))],
        "image size, px": [(S, replace(vit, inputs=pixels(2 * base, S))) for S in sorted(sides)],
        "sequence length, tokens": [
            (K, replace(text, inputs=words(text.config, 2 * text.batch, K)))
            for K in (longest // 16, longest // 8, longest // 4, longest // 2, longest)],
        "number of examples": [(N, replace(vit, inputs=pixels(N, side)))
                               for N in (2 * base, 16 * base, 128 * base)]}
    rows = {what: [{"value": value, **measure(case, STAGES[0], turns)} for value, case in found]
            for what, found in grown.items()}
    most = torch.cuda.device_count() if gpu else 2
    weights = vit.weights[0]
    return {"rows": rows, "processes": [
        {"value": count, "batch": base, **(processes(weights, pictures, base, count, folder) or {})}
        for count in sorted({1, most})]}


def column(vit: Case, turns: int) -> list[dict]:
    """The paper's CUB column: 300 steady steps and more of each stage at its own batch size."""
    rows = []
    for compiled in (False, True):
        whole = replace(vit, inputs=pixels(5994, vit.config.image_size))
        for stage, case in ((STAGES[0], whole), (STAGES[0], whole.first(whole.batch)),
                            (STAGES[1], whole), (STAGES[2], replace(whole, batch=32))):
            row = measure(case, stage, max(30, turns), compiled=compiled)
            rows.append({**row, "steps": 10_000 if stage == "fine-tuning" else 20_000})
    return rows


# ----------------------------------------------------------------------------- the program


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="store_true",
                        help="compare with transformers, which has to be installed")
    parser.add_argument("--size", choices=("base", "tiny"), default="base",
                        help="base: the paper's models; tiny: of the bundled weights' sizes")
    parser.add_argument("--steps", type=int, default=7,
                        help="turns that count, a step each (10 steps on a GPU); more steadies the "
                        "medians (default 7)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS,
                        help="what to measure; the others stay as they were measured last")
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("DATA_DIR", "datasets"),
                        help="folder of the data sets: CUB's pictures and SciERC's texts, if there")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the page")
    args = parser.parse_args()
    if args.steps < 1:
        raise fetch.BadInput(f"--steps is {args.steps}: use at least 1")
    versions = {"torch": torch.__version__}
    if args.peer:
        versions["transformers"] = peer.library().__version__
    where = run.device(run.Config())
    gpu, path = where.type == "cuda", args.out / f"bench{'-tiny' * (args.size == 'tiny')}.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    mine = record.setdefault(where.type, {})
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        cases = make_cases(args.size, gpu, args.data_dir, folder, args.peer)
        pictures = folder / "pictures"
        about = take_pictures(args.data_dir, pictures, 512 if args.size == "base" else 64)
        make = {
            "steps": lambda: steps(cases, args.steps, args.peer, gpu),
            "loading": lambda: loading(pictures, about, cases[0].config.image_size, args.steps,
                                       args.peer, folder),
            "growth": lambda: growth(cases, args.steps, gpu, pictures, folder),
            "column": lambda: column(cases[0], args.steps) if gpu else None}
        for part in args.parts:
            mine[part] = {"command": f"python experiments/bench.py {shlex.join(sys.argv[1:])}",
                          "machine": repeat.machine(), "versions": versions,
                          "threads": torch.get_num_threads(), "found": make[part]()}
            args.out.mkdir(parents=True, exist_ok=True)
            run.write_json(record, path)
            path.with_suffix(".md").write_text(bench_page.page(record), encoding="utf-8")
    print(f"\n{bench_page.page(record)}\nwrote {path.with_suffix('.md')}")


if __name__ == "__main__":
    run.program(main)
