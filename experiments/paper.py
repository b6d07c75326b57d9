"""Any table or figure of the paper by its name: its runs, then results/<name>.md, .json and .png.

    DATA_DIR=/path/to/datasets python experiments/paper.py table1 --scale laptop
    python experiments/paper.py table1 --dry-run            # the commands and their estimated time
    python experiments/paper.py figure4 --datasets flower --seeds 3

Names: table1 table2 table3 table6 figure1 figure3 figure4 figure5a figure5b figure5c time datasets.
Every run is an ordinary command, which can be given by hand. What has finished is not done again,
and teachers, students and fine-tuned rows are shared between the commands that agree on them, so a
sweep that was stopped carries on.

laptop: the bundled tiny weights, few steps, whatever data are on disk; the settings were chosen by
tune.py on a held-out tenth of the training sets. paper: the paper's weights, steps and data.
"""
import argparse
import copy
import functools
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
import pages
import repeat

import finetune
import mae
import mlm
from support import fetch, run, settings

# ----------------------------------------------------------------------------- settings

RUNS = "runs"  # under the root, a folder for each command
# the paper's are the programs' defaults; the laptop's: results/tuning-image.md, tuning-text.md
SETTINGS = {
    ("paper", "image"): {}, ("paper", "text"): {},
    ("laptop", "image"): dict(
        init="tiny", steps=150, batch_size=64, lr=5e-4, finetune_steps=150, finetune_batch_size=32,
        finetune_lr=1e-3),
    ("laptop", "text"): dict(
        init="tiny", steps=30, batch_size=32, lr=2e-4, finetune_steps=250, finetune_batch_size=16,
        finetune_lr=5e-4)}
OWN = {  # what a baseline adds
    ("laptop", "image"): {"recadam": dict(recadam_t0=40), "mars": dict(mars_radius=0.5),
                          "r3f": dict(r3f_eps=0.3)},
    ("laptop", "text"): {"recadam": dict(recadam_t0=40), "mars": dict(mars_radius=0.5),
                         "r3f": dict(r3f_eps=0.1)}}
# milliseconds an example: fine-tuning, further pre-training, self-distillation. laptop: one core
# of an AMD EPYC; paper: its times on an RTX 3090, where a text is taken to cost what a picture does
MILLISECONDS = {("laptop", "image"): (2.4, 1.8, 4.5), ("laptop", "text"): (8.0, 11.0, 24.0),
                ("paper", "image"): (6.1, 4.2, 14.7), ("paper", "text"): (6.1, 4.2, 14.7)}


def modality(dataset: str) -> str:
    return "text" if dataset in settings.TEXTS else "image"


def command(program: str, dataset: str, scale: str, seed: int, **changes: object
            ) -> tuple[str, ...]:
    """One run as the words of an ordinary command, with a folder of its own."""
    chosen = SETTINGS[scale, modality(dataset)] | changes
    words = [program, "--dataset", dataset]
    for name, value in chosen.items():
        if program == "finetune.py" and name in ("steps", "batch_size", "lr"):
            continue  # pre-training's
        words += ["--" + name.replace("_", "-"), f"{value:g}" if isinstance(value, float)
                  else str(value)]
    told = "".join(f"-{name.replace('_', '-')}={value}" for name, value in changes.items())
    told = told.replace(f"{RUNS}/", "").replace("/", "-").replace(".safetensors", "")
    out = f"{RUNS}/{scale}-{program.removesuffix('.py')}-{dataset}{told}-seed{seed}"
    return (*words, "--seed", str(seed), "--out", out)


@functools.cache
def filled(words: tuple[str, ...]) -> settings.Config:
    """A command's settings with the defaults filled in, for the published number of examples."""
    config = settings.parse(words[0].removesuffix(".py"), "", list(words[1:]))
    width = 128 if "laptop-" in words[-1] else 768  # of the weights; the folder names the scale
    model = SimpleNamespace(modality=config.modality, config=SimpleNamespace(width=width))
    return settings.fill(config, model, pages.PUBLISHED[config.dataset][0])


# ----------------------------------------------------------------------------- the cells


class Cell(NamedTuple):
    """One number for one seed: where it stands, the command that measures it, its row there."""

    row: str
    dataset: str
    x: float | None  # of a figure's axis
    seed: int
    command: tuple[str, ...]
    method: str


def methods(dataset: str, scale: str, seed: int) -> list[Cell]:
    """Tables 1 and 2: a command for fine-tuning and both pre-trainings, one for each baseline."""
    full, cells = command("distill.py", dataset, scale, seed), []
    own = OWN.get((scale, modality(dataset)), {})
    for row in ("fine-tuning", "RecAdam", "MARS", "R3F", "further pre-training",
                "self-distillation"):
        words, method = full, row.lower()
        if method in finetune.ROWS:
            words = command("finetune.py", dataset, scale, seed, method=method,
                            **own.get(method, {}))
        cells.append(Cell(row, dataset, None, seed, words, row))
    return cells


def further_and_student(dataset: str, scale: str, seed: int) -> list[Cell]:
    """Figures 5a and 5b."""
    return [cell for cell in methods(dataset, scale, seed) if cell.command[0] == "distill.py"]


def ablations(dataset: str, scale: str, seed: int) -> list[Cell]:
    """Table 3, row by row."""
    twice = 2 * filled(command("distill.py", dataset, scale, seed)).steps
    rows = {"full model": {}, "without L_MAE": dict(mae_weight=0),
            "without L_Distill": dict(rounds=0),
            "further pre-training × 2": dict(rounds=0, steps=twice),
            "prediction-matching": dict(match="prediction"),
            "weight-matching, L2": dict(match="l2"), "weight-matching, MARS": dict(match="mars")}
    return [Cell(row, dataset, None, seed, command("distill.py", dataset, scale, seed, **changes),
                 "further pre-training" if "rounds" in changes else "self-distillation")
            for row, changes in rows.items()]


def mae_weights(dataset: str, scale: str, seed: int) -> list[Cell]:
    """Table 6: λ of λ·L_MAE + L_Distill."""
    return [Cell(f"λ = {weight:g}", dataset, None, seed, command(
        "distill.py", dataset, scale, seed, **({} if weight == 1 else {"mae_weight": weight})),
        "self-distillation") for weight in (1, 0.5, 0.1, 0)]


def pretraining_steps(dataset: str, scale: str, seed: int) -> list[Cell]:
    """Figure 1: 0 steps (plain fine-tuning), then a quarter to twice the usual number."""
    full = command("distill.py", dataset, scale, seed, rounds=0)
    cells = [Cell("further pre-training", dataset, 0, seed, full, "fine-tuning")]
    usual = filled(full).steps
    for steps in (usual // 4, usual // 2, usual, 2 * usual):
        words = full if steps == usual else command(
            "distill.py", dataset, scale, seed, rounds=0, steps=steps)
        cells.append(Cell("further pre-training", dataset, steps, seed, words,
                          "further pre-training"))
    return cells


def train_sizes(dataset: str, scale: str, seed: int) -> list[Cell]:
    """Figure 3: fewer examples, labelled and unlabelled alike."""
    return [Cell(row, dataset, size, seed,
                 command("distill.py", dataset, scale, seed, train_size=size), row)
            for size in (1000, 2500, 5000, 10000, 25000, 50000)
            for row in ("fine-tuning", "further pre-training", "self-distillation")]


def rounds(dataset: str, scale: str, seed: int) -> list[Cell]:
    """Figures 4 and 5c: T' rounds, of which 0 is further pre-training."""
    cells = []
    for t in range(4):
        words = command("distill.py", dataset, scale, seed, **({} if t == 1 else {"rounds": t}))
        cells.append(Cell("self-distillation", dataset, t, seed, words,
                          "self-distillation" if t else "further pre-training"))
    return cells


class Result(NamedTuple):
    """A table or figure: its cells, its data sets, what is read from a run, how it is shown."""

    title: str
    cells: Callable[[str, str, int], list[Cell]] | None
    datasets: tuple[str, ...]
    value: str = "score"
    x: str = ""


RESULTS = {
    "table1": Result("Table 1: image classification", methods, pages.IMAGES),
    "table2": Result("Table 2: text classification", methods, pages.TEXTS),
    "table3": Result("Table 3: ablations", ablations, ("cub", "scierc")),
    "table6": Result("Table 6: weight λ of L_MAE", mae_weights, ("cub",)),
    "figure1": Result("Figure 1: steps of further pre-training", pretraining_steps, ("dtd",),
                      x="steps of further pre-training"),
    "figure3": Result("Figure 3: fewer examples", train_sizes, ("cifar100",),
                      x="training examples, labelled and unlabelled"),
    "figure4": Result("Figure 4: rounds of self-distillation", rounds, ("flower",), x="round T'"),
    "figure5a": Result("Figure 5a: generalization gap", further_and_student,
                       pages.IMAGES + pages.TEXTS, "gap"),
    "figure5b": Result("Figure 5b: distance from θ_init", further_and_student,
                       pages.IMAGES + pages.TEXTS, "distance"),
    "figure5c": Result("Figure 5c: distance after each round", rounds, ("flower",), "distance",
                       "round T'"),
    "time": Result("Time", further_and_student, ("cub",), "seconds"),
    "datasets": Result("Tables 7 and 8: the data", None, (*pages.IMAGES, "cifar100", *pages.TEXTS))}


def one_checkpoint(cell: Cell, scale: str) -> Cell:
    """The same number from seed 0's pre-training, as the authors: seeds differ in fine-tuning."""
    if cell.seed == 0 or cell.command[0] == "finetune.py":
        return cell
    first = filled(cell.command)
    source = {}
    if cell.method != "fine-tuning":
        kind = "further" if cell.method == "further pre-training" else f"distilled-{first.rounds}"
        folder = first.out.removesuffix(f"seed{cell.seed}") + "seed0"
        source = {"init": f"{folder}/{kind}.safetensors"}
    words = command("finetune.py", cell.dataset, scale, cell.seed, **source)
    return cell._replace(command=words, method="fine-tuning")


# ----------------------------------------------------------------------------- the runs


def folder(words: tuple[str, ...]) -> Path:
    return ROOT / words[-1]


def stages(words: tuple[str, ...]) -> Iterable[tuple[tuple, str, float]]:
    """What a command trains: what it is, its kind, how many examples; equal things are shared."""
    config = filled(words)
    where = (config.dataset, config.init, config.train_size)
    pick = [name for name in settings.Config.__dataclass_fields__
            if name.startswith(("finetune_", f"{config.method}_"))]
    tuned = (config.seed, config.method, *(getattr(config, name) for name in pick))
    train, test, _ = pages.PUBLISHED[config.dataset]
    # a look at every example without a backward pass costs a third
    examples = (config.finetune_steps * config.finetune_batch_size * (1 + (config.method == "r3f"))
                + (min(train, config.train_size or train) + test) / 3)
    yield ("row", where, tuned), "fine-tuning", examples
    if words[0] == "distill.py":
        model = ("further", where, *(getattr(config, name) for name in run.FURTHER))
        teach = tuple(getattr(config, name) for name in run.FURTHER + run.STUDENT)
        yield model, "further pre-training", config.steps * config.batch_size
        yield ("row", model, tuned), "fine-tuning", examples
        for t in range(1, config.rounds + 1):
            model = ("student", t, where, teach)
            yield model, "self-distillation", config.steps * config.batch_size
        if config.rounds:
            yield ("row", model, tuned), "fine-tuning", examples


def finished(words: tuple[str, ...]) -> bool:
    """Whether the command's folder has its results; `BadInput` if they are of other settings."""
    if not (folder(words) / "results.json").exists():
        return False
    told = json.loads((folder(words) / "config.json").read_text(encoding="utf-8"))["settings"]
    if names := run.changed(told, run.recorded(filled(words))):
        raise fetch.BadInput(f"{words[-1]} holds a run with another {', '.join(names)}: "
                             "move the folder away")
    return True


def plan(cells: list[Cell], scale: str) -> list[tuple[tuple[str, ...], float | None]]:
    """The commands in order, each with its estimated seconds; None where it is finished."""
    commands, known, planned = list(dict.fromkeys(cell.command for cell in cells)), set(), []
    there = {words for words in commands if finished(words)}
    for words in there:
        known |= {what for what, _, _ in stages(words)}
    for words in commands:
        if words in there:
            planned.append((words, None))
            continue
        costs = dict(zip(pages.PAPER_SECONDS, MILLISECONDS[scale, filled(words).modality]))
        new = {what: costs[kind] / 1000 * examples for what, kind, examples in stages(words)
               if what not in known}
        known |= set(new)
        planned.append((words, sum(new.values()) + 5))  # 5 s to start
    return planned


def on_disk(dataset: str) -> tuple[int, int, int]:
    """Training and test examples and classes; `BadInput` where the data are not on disk."""
    config = settings.check(settings.Config(dataset=dataset, init="tiny"))
    data_dir = Path(config.data_dir).expanduser().absolute()
    if dataset in fetch.DATASETS and not (data_dir / fetch.DATASETS[dataset][0]).is_dir():
        raise fetch.BadInput(f"no folder {fetch.DATASETS[dataset][0]} in the data directory")
    kind = mlm.MLM if modality(dataset) == "text" else mae.MAE
    try:
        data = run.load_data(config, run.load_model(kind, config))
    except fetch.BadInput as error:
        raise fetch.BadInput(str(error).replace(f"{data_dir}/", "")) from error
    return len(data.train), len(data.test), len(data.classes)


def carry_out(left: list[tuple[tuple[str, ...], float]]) -> list[str]:
    """Run the commands one after the other; returns those that failed."""
    failed = []
    for number, (words, seconds) in enumerate(left, 1):
        print(f"[{number}/{len(left)}, about {duration(seconds)}] python {shlex.join(words)}",
              flush=True)
        done = subprocess.run([sys.executable, *words], cwd=ROOT)
        if done.returncode in (130, -2):
            raise KeyboardInterrupt
        if done.returncode:
            failed.append(f"python {shlex.join(words)}: status {done.returncode}")
    return failed


def duration(seconds: float) -> str:
    """Such as 45 s, 12 min, 3.5 h or 2.1 days."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.{0 if unit == 'min' else 1}f} {unit}"
    return f"{seconds:.0f} s"


# ----------------------------------------------------------------------------- what they measured


def stage_seconds(path: Path, stage: str, steps: int) -> float | None:
    """The time that a whole stage took; None where it was taken from elsewhere or interrupted."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((told["seconds"] for told in map(json.loads, lines)
                 if (told["stage"], told["steps"]) == (stage, steps)), None)


def distance_from_start(cell: Cell, scale: str) -> float:
    """‖θ_init - θ‖ of a classifier that was fine-tuned from a checkpoint, to θ_init itself."""
    config = filled(command("distill.py", cell.dataset, scale, cell.seed))
    start = run.load_model(mlm.MLM if config.modality == "text" else mae.MAE, config).encoder
    tensors, _ = fetch.read_weights(folder(cell.command) / "finetuned-fine-tuning.safetensors")
    tuned = copy.deepcopy(start)
    tuned.load_state_dict({name: tensors[f"encoder.{name}"] for name in start.state_dict()})
    return finetune.distance(start, tuned)


def collect(cells: list[Cell], scale: str) -> list[dict]:
    """Every finished cell with what its run measured, seed by seed."""
    values = []
    for cell in cells:
        path, config = folder(cell.command) / "results.json", filled(cell.command)
        if not path.exists():
            continue
        steps = config.finetune_steps if cell.row == "fine-tuning" else config.steps
        found = json.loads(path.read_text(encoding="utf-8"))
        row = next(row for row in found["rows"] if row["method"] == cell.method)
        if ".safetensors" in " ".join(cell.command):
            row["distance"] = distance_from_start(cell, scale)
        values.append({
            **row, "row": cell.row, "dataset": cell.dataset, "x": cell.x, "seed": cell.seed,
            "seconds": stage_seconds(path.with_name("timing.jsonl"), cell.row, steps),
            **{name: found[name] for name in ("n_train", "n_test", "num_classes")},
            "command": shlex.join(cell.command)})
    return values


# ----------------------------------------------------------------------------- the program


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=RESULTS)
    parser.add_argument("--datasets", nargs="+", choices=pages.NAMES, help="default: the paper's")
    parser.add_argument("--seeds", type=int, default=5, help="how many (default 5, as the paper)")
    parser.add_argument("--scale", choices=("paper", "laptop"), default="laptop")
    parser.add_argument("--dry-run", action="store_true", help="list the runs, do nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the pages")
    parser.add_argument("--one-checkpoint", action="store_true",
                        help="pre-train once and fine-tune with every seed, as the authors did")
    args = parser.parse_args()
    result = RESULTS[args.name]
    datasets = list(dict.fromkeys(args.datasets or result.datasets))
    if args.seeds < 1:
        raise fetch.BadInput(f"--seeds is {args.seeds}: use at least 1")
    if args.one_checkpoint and args.name == "figure3":
        raise fetch.BadInput("figure3 takes other examples with every seed, so that one checkpoint "
                             "cannot serve them all: leave out --one-checkpoint")
    here, missing = {}, {}
    for dataset in datasets:
        try:  # at the paper's size the programs download what is not there
            here[dataset] = (on_disk(dataset) if args.scale == "laptop" or not result.cells
                             else pages.PUBLISHED[dataset])
        except fetch.BadInput as error:
            missing[dataset] = str(error)
            print(f"{pages.NAMES[dataset]}: {error}; its cells stay empty")
    cells = [cell for seed in range(args.seeds) for dataset in here if result.cells
             for cell in result.cells(dataset, args.scale, seed)
             if (filled(cell.command).train_size or 0) <= here[dataset][0]]
    if args.one_checkpoint:
        cells = [one_checkpoint(cell, args.scale) for cell in cells]
    planned = plan(cells, args.scale)
    left = [(words, seconds) for words, seconds in planned if seconds is not None]
    for words, seconds in planned:
        print(f"{'done' if seconds is None else duration(seconds):>8}  python {shlex.join(words)}")
    print(f"{args.name}: {len(planned)} runs, {len(planned) - len(left)} finished, {len(left)} to "
          f"do, about {duration(sum(seconds for _, seconds in left))}", flush=True)
    if args.dry_run:
        return
    failed = carry_out(left)
    words = ["experiments/paper.py", *sys.argv[1:]]
    record = {
        "name": args.name, "title": result.title, "value": result.value, "x": result.x,
        "datasets": datasets, "rows": list(dict.fromkeys(cell.row for cell in cells)),
        "scale": args.scale, "seeds": args.seeds, "one_checkpoint": args.one_checkpoint,
        "command": f"python {shlex.join(words)}", "machine": repeat.machine(), "absent": missing,
        "failed": failed, "values": collect(cells, args.scale)}
    if args.name == "datasets":
        record["counts"] = here
    out = args.out
    out.mkdir(parents=True, exist_ok=True)
    run.write_json(record, out / f"{args.name}.json")
    (out / f"{args.name}.md").write_text(pages.page(record), encoding="utf-8")
    if args.name.startswith("figure") and record["values"]:
        pages.draw(record, out / f"{args.name}.png")
    print(pages.page(record))
    if failed:
        raise OSError("these runs failed, and their cells are empty: " + "; ".join(failed))


if __name__ == "__main__":
    run.program(main)
