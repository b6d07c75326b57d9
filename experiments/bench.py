"""What a step costs: against transformers, and against the machine's own matrix products.

    python experiments/bench.py --peer                 # ViT-B/16 and RoBERTa-base
    python experiments/bench.py --size tiny --steps 3  # models of the bundled sizes, in minutes

writes results/bench.md and .json (bench-tiny.*): steps of every stage, the loading of pictures, how
a step's cost grows, and the paper's CUB column projected from steady steps. Each part can be
measured anew without the others, and a run on a GPU keeps what a CPU measured.

Letters: B batch, K positions, N examples, S side.
"""
import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
import bench_page
import bench_peer
import repeat
from bench_step import STAGES, Case, measure

import mae
import mlm
from support import fetch, images, run, settings, texts

PARTS = ("steps", "loading", "growth", "column")

# ----------------------------------------------------------------------------- the parts


def write_weights(config: mae.Config | mlm.Config, folder: Path, name: str,
                  with_peer: bool) -> tuple[Path, Path]:
    """Two random models of these sizes; transformers writes them where it is to read them."""
    paths = tuple(folder / f"{name}-{seed}" / "model.safetensors" for seed in (0, 1))
    for seed, path in enumerate(paths):
        if with_peer:
            bench_peer.save(config, path.parent, seed)
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
    """Fill a folder with N JPEG files of 500 × 375, CUB's usual size: its pictures, or drawn birds.

    Copies of CUB that one may pass on are smaller; a file's size decides what decoding costs.
    """
    files = sorted((data_dir / "CUB_200_2011" / "images").rglob("*.jpg"))
    chosen = torch.randperm(len(files), generator=run.generator("bench files"))[:N].tolist()
    folder.mkdir()
    found = (images.Image.open(files[i]) for i in chosen) if chosen else (
        images.Image.fromarray(bird.permute(1, 2, 0).numpy())
        for bird in images.toybirds("train", -(-N // 20), 80)[0][:N])
    for i, picture in enumerate(found):  # one open file at a time
        picture.convert("RGB").resize((500, 375)).save(folder / f"{i}.jpg", quality=95)
    size = sum(file.stat().st_size for file in folder.iterdir()) / N / 1000
    return (f"{N} {'pictures of CUB' if chosen else 'drawn birds'} brought to 500 × 375, "
            f"{size:.0f} kB each")


def loading(pictures: Path, about: str, side: int, turns: int, with_peer: bool,
            folder: Path) -> dict:
    """Seconds until all pictures of a folder were delivered as batches: ours, then their loader."""
    where, files = settings.device(settings.Config()), sorted(pictures.iterdir())

    def deliver() -> Tensor:
        data = images.load(str(pictures), folder, side)
        for index in reversed(torch.arange(len(files)).split(64)):  # to end with the first
            x = run.batch(data.train, index, where)
        return x

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
                batch.to(where) for batch in bench_peer.loader(files, side, 64, workers)][0])
    apart = max(((delivered["later start"] - theirs).abs().max().item()
                 for name, theirs in delivered.items() if "workers" in name), default=0.0)
    assert apart < 1e-4, f"the two deliver other pixels, {apart} apart"
    processor = type(bench_peer.installed().ViTImageProcessor()).__name__ if with_peer else ""
    return {"about": about, "side": side, "pictures": len(files), "seconds": seconds,
            "processor": processor}


def processes(weights: Path, pictures: Path, batch: int, count: int, folder: Path) -> dict | None:
    """Further pre-training by distill.py on so many processes; None where it cannot be run."""
    out, threads = folder / f"processes-{count}", max(1, torch.get_num_threads() // count)
    command = ["-m", "torch.distributed.run", "--nproc-per-node", str(count), "distill.py",
               "--dataset", str(pictures), "--data-dir", str(folder), "--init", str(weights),
               "--steps", "8", "--batch-size", str(batch), "--rounds", "0", "--out", str(out),
               "--seed", str(count)]  # or the second would take over what the first made
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
                            (STAGES[1], whole), (STAGES[2], whole)):
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
        versions["transformers"] = bench_peer.installed().__version__
    where = settings.device(settings.Config())
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
