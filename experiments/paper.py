"""Any table or figure of the paper by its name: its runs, then results/<name>.md, .json and .png.

    DATA_DIR=/path/to/datasets python -m experiments.paper table1 --scale laptop
    python -m experiments.paper table1 --dry-run            # the commands that it takes
    python -m experiments.paper figure4 --datasets flower --seeds 3

Names: table1 table2 table3 table6 figure1 figure3 figure4 figure5a figure5b figure5c time datasets,
and toybirds and pydocs, which are not the paper's. Every run is an ordinary command. What has
finished is not done again, so a sweep that was stopped carries on. Where only the student differs,
its command is given the teacher that an earlier one has made. A page in results/ is replaced only
by one that has all of its numbers; another goes beside the runs.

laptop: the bundled tiny weights, few steps, whatever data are on disk, and the settings that
tune.py chose on a held-out tenth of training sets. paper: the paper's weights, steps and data,
which the programs download, and in Tables 1 and 2 both readings of line 11.
"""
import argparse
import math
import shlex
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from experiments import pages, runs
from experiments.runs import Words
from support import fetch, program, recipes, run, settings

# ----------------------------------------------------------------------------- commands

OWN = {"RecAdam": "recadam_t0", "MARS": "mars_radius", "R3F": "r3f_eps"}  # what a baseline adds


class At(NamedTuple):
    """What a number is measured at."""

    dataset: str
    scale: str
    seed: int

    @property
    def modality(self) -> str:
        return "text" if self.dataset in recipes.TEXTS else "image"

    @property
    def settings(self) -> dict:
        """Those of the scale; the paper's are the programs' defaults."""
        path = fetch.ROOT / "results" / f"tuning-{self.modality}.json"
        return {"init": "tiny"} | run.read_json(path)["chosen"] if self.scale == "laptop" else {}


def command(file: str, at: At, teacher: str = "", note: str = "", **changes: object) -> Words:
    """One run of a program's file, in a folder named by what is not usual: changes and note."""
    usual = at.settings
    idle = {name for name in usual if name in OWN.values() or (
        file != "distill.py" and name in ("steps", "batch_size", "lr"))}
    words = [file, "--dataset", at.dataset]
    for name, value in (usual | changes).items():
        if name in changes or name not in idle:
            words += [program.flag(name), f"{value:g}" if isinstance(value, float) else str(value)]
    words += ["--teacher", teacher] if teacher else []
    told = "".join(f"-{name.replace('_', '-')}={value}" for name, value in changes.items()) + note
    out = f"runs/{at.scale}-{file.removesuffix('.py')}-{at.dataset}{told}-seed{at.seed}"
    return (*words, "--seed", str(at.seed), "--out", out)


def student(at: At, **changes: object) -> Words:
    """A student by other settings, of the teacher that the usual command makes."""
    usual = command("distill.py", at)
    return command("distill.py", at, f"{usual[-1]}/further.safetensors", **changes)


def usual_steps(at: At) -> int:
    """Steps of further pre-training, where nothing else is asked for, on the published data."""
    usual = recipes.DEFAULTS[at.modality, "paper"] | at.settings
    if "steps" in usual:
        return usual["steps"]
    return usual["epochs"] * math.ceil(pages.PUBLISHED[at.dataset][0] / usual["batch_size"])


# ----------------------------------------------------------------------------- the cells


class Cell(NamedTuple):
    """One number for one seed: its row on the page, the command that measures it, its row there."""

    row: str
    command: Words
    method: str
    x: int | None = None  # of a figure's axis


def algorithm_1(at: At, **changes: object) -> list[Cell]:
    """Figures 5a and 5b: what the usual command measures."""
    words = command("distill.py", at, **changes)
    return [Cell(row, words, row)
            for row in ("fine-tuning", "further pre-training", "self-distillation")]


def methods(at: At) -> list[Cell]:
    """Tables 1 and 2: the same, and a command for each baseline; at full size every reading."""
    cells, usual = algorithm_1(at), at.settings
    for row, own in OWN.items():
        changes = {own: usual[own]} if own in usual else {}
        words = command("baselines.py", at, method=row.lower(), **changes)
        cells.insert(-2, Cell(row, words, row))
    if at.scale == "paper":
        words = student(at, match="hidden")
        cells.append(Cell("self-distillation, all positions", words, "self-distillation"))
        if at.modality == "image":
            words = command("distill.py", at, **recipes.AS_RELEASED)
            cells.append(Cell("self-distillation, as released", words, "self-distillation"))
    return cells


def ablations(at: At) -> list[Cell]:
    """Table 3, row by row."""
    usual = command("distill.py", at)
    twice = command("distill.py", at, rounds=0, steps=2 * usual_steps(at))
    alone = {"without L_Distill": usual, "further pre-training × 2": twice}
    rows = {"full model": usual, "without L_MAE": student(at, mae_weight=0), **alone}
    for row, match in (("prediction-matching", "prediction"), ("weight-matching, L2", "l2"),
                       ("weight-matching, MARS", "mars")):
        rows[row] = student(at, match=match)
    return [Cell(row, words, "further pre-training" if row in alone else "self-distillation")
            for row, words in rows.items()]


def mae_weights(at: At) -> list[Cell]:
    """Table 6: λ of λ·L_MAE + L_Distill, from inside the paper's interval to far beyond it."""
    rows = {1: command("distill.py", at)}
    rows |= {weight: student(at, mae_weight=weight) for weight in (0.1, 10, 100, 1000, 10_000)}
    return [Cell(f"λ = {weight}", words, "self-distillation") for weight, words in rows.items()]


def pretraining_steps(at: At) -> list[Cell]:
    """Figure 1: 0 steps (plain fine-tuning), then a quarter to twice the usual number: a guess."""
    row, usual = "further pre-training", usual_steps(at)
    runs = {steps: command("distill.py", at, rounds=0, steps=steps)
            for steps in (usual // 4, usual // 2, usual, 2 * usual)}
    return [Cell(row, runs[usual], "fine-tuning", 0),
            *(Cell(row, words, row, steps) for steps, words in runs.items())]


def train_sizes(at: At) -> list[Cell]:
    """Figure 3: fewer examples, labelled and unlabelled alike; 5,000 to 25,000 are a guess."""
    return [cell._replace(x=size) for size in (1000, 2500, 5000, 10000, 25000, 50000)
            for cell in algorithm_1(at, train_size=size)]


def rounds(at: At) -> list[Cell]:
    """Figures 4 and 5c: T' rounds, of which 0 is further pre-training; that 3 are all is a guess.

    Algorithm 1 passes nothing from round to round but θ_0 <- θ_t-1, so round t is run as a first
    round whose teacher is the student before it; its order, masks and dropout are a first round's.
    """
    words = command("distill.py", at)
    cells = [Cell("self-distillation", words, "further pre-training", 0),
             Cell("self-distillation", words, "self-distillation", 1)]
    for t in (2, 3):
        words = command("distill.py", at, f"{words[-1]}/distilled-1.safetensors", f"-round{t}")
        cells.append(Cell("self-distillation", words, "self-distillation", t))
    return cells


def toys(at: At) -> list[Cell]:
    """The programs as they are, on what needs no download: all that they measure."""
    at = at._replace(scale="paper")
    scratch = command("finetune.py", at, init="random")
    return [*algorithm_1(at), Cell("fine-tuning from random weights", scratch, "fine-tuning")]


class Result(NamedTuple):
    """A table or figure: its cells, its data sets, what is read from a run, how it is shown."""

    title: str
    cells: Callable[[At], list[Cell]] | None
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
    "figure5a": Result("Figure 5a: generalization gap", algorithm_1, pages.IMAGES + pages.TEXTS,
                       "gap"),
    "figure5b": Result("Figure 5b: distance from θ_init", algorithm_1, pages.IMAGES + pages.TEXTS,
                       "distance"),
    "figure5c": Result("Figure 5c: distance after each round", rounds, ("flower",), "distance",
                       "round T'"),
    "time": Result("Seconds of a stage; the paper's on one RTX 3090", algorithm_1, ("cub",),
                   "seconds"),
    "datasets": Result("Tables 7 and 8: the data", None, (*pages.IMAGES, "cifar100", *pages.TEXTS)),
    "toybirds": Result("toybirds", toys, ("toybirds",)),
    "pydocs": Result("pydocs", toys, ("pydocs",))}

# ----------------------------------------------------------------------------- the program


def on_disk(dataset: str, data_dir: Path) -> tuple[int, int, int]:
    """Training and test examples and classes; `BadInput` where the data are not on disk."""
    published = fetch.datasets()
    if dataset in published and not (path := data_dir / published[dataset]["folder"]).is_dir():
        raise fetch.BadInput(f"{path} is absent: `python finetune.py --smoke --init tiny --dataset "
                             f"{dataset}` fetches it")
    _, data, _ = runs.begin(dataset, data_dir=str(data_dir))
    return len(data.train), len(data.test), len(data.classes)


def planned(args: argparse.Namespace) -> tuple[dict, dict, list[Cell]]:
    """The data sets that are here with their sizes, why others are not, and the cells to measure.

    A dry run plans with published sizes where data are absent.
    """
    result, here, absent = RESULTS[args.name], {}, {}
    data_dir = Path(program.located(settings.Config()).data_dir).absolute()
    for dataset in args.datasets:
        try:  # at the paper's scale the programs download what is not there
            here[dataset] = (on_disk(dataset, data_dir) if args.scale == "laptop" or
                             not result.cells else pages.PUBLISHED[dataset])
        except fetch.BadInput as error:
            absent[dataset] = str(error)
    known = here | {dataset: pages.PUBLISHED[dataset] for dataset in absent if args.dry_run}
    cells = [cell for seed in range(args.seeds) for dataset in known if result.cells
             for cell in result.cells(At(dataset, args.scale, seed))
             if result.cells != train_sizes or cell.x <= known[dataset][0]]
    if not cells and (result.cells or not known):
        raise fetch.BadInput(f"{args.name} has nothing to measure, and nothing is written: "
                             f"{'; '.join(absent.values())}")
    for dataset, reason in absent.items():
        print(f"{pages.NAMES[dataset]}: {reason}")
        absent[dataset] = reason.replace(f"{data_dir}/", "")  # of this machine, not of the page
    return here, absent, cells


def value(cell: Cell) -> dict:
    """What a cell's finished run has measured."""
    ratio = {"ratio": runs.gradient_ratio(cell.command)} if cell.row.startswith("λ") else {}
    return runs.measured(cell.command, cell.method) | {"row": cell.row, "x": cell.x} | ratio


def report(args: argparse.Namespace, here: dict, absent: dict, cells: list[Cell],
           failed: list[Words]) -> None:
    """Write the page of what was measured; OSError where runs failed.

    It goes beside the runs where in results/ numbers would be lost.
    """
    result, told = RESULTS[args.name], [f"python {shlex.join(words)}" for words in failed]
    record = {
        "name": args.name, "title": result.title, "value": result.value, "x": result.x,
        "datasets": args.datasets, "rows": list(dict.fromkeys(cell.row for cell in cells)),
        "scale": args.scale, "seeds": args.seeds,
        "command": f"python -m experiments.paper {shlex.join(sys.argv[1:])}",
        "machine": runs.machine(), "absent": absent, "failed": told,
        "values": [value(cell) for cell in cells if cell.command not in failed]}
    if not result.cells:
        record["counts"] = here
    if pages.cells(record):
        there, lost = runs.ROOT / "results" / f"{args.name}.json", Counter()
        if there.exists():
            lost = pages.cells(run.read_json(there)) - pages.cells(record)
        path = runs.ROOT / ("runs" if lost else "results") / f"{args.name}.md"
        run.write_json(record, path.with_suffix(".json"))
        path.write_text(pages.page(record), encoding="utf-8")
        if args.name.startswith("figure"):
            pages.draw(record, path.with_suffix(".png"))
        why = f", as results/{path.name} has {lost.total()} numbers that this one lacks"
        print(f"{pages.page(record)}\nwrote {path.relative_to(runs.ROOT)}{why * bool(lost)}")
    if failed:
        raise OSError(f"these runs failed, and their cells are empty: {'; '.join(told)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=RESULTS)
    parser.add_argument("--datasets", nargs="+", choices=pages.NAMES, help="default: the paper's")
    parser.add_argument("--seeds", type=int, default=5, help="how many (default 5, as the paper)")
    parser.add_argument("--scale", choices=("paper", "laptop"), default="laptop")
    parser.add_argument("--dry-run", action="store_true", help="list the runs, do nothing")
    args = parser.parse_args()
    args.datasets = list(dict.fromkeys(args.datasets or RESULTS[args.name].datasets))
    here, absent, cells = planned(args)
    commands = list(dict.fromkeys(cell.command for cell in cells))
    left = [words for words in commands if not runs.finished(words)]
    for words in commands:
        print(f"{'to do' if words in left else 'done':>5}  python {shlex.join(words)}")
    print(f"{args.name}: {len(commands)} runs, {len(left)} to do", flush=True)
    if not args.dry_run:
        report(args, here, absent, cells, runs.carry_out(left))


if __name__ == "__main__":
    program.run(main)
