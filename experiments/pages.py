"""The pages of paper.py: what runs measured, beside the paper's numbers, as Markdown and figures.

A record is what results/<name>.json holds. Everything here is computed from it alone, so a page can
be made again without the runs.
"""
import itertools
import statistics
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from support import recipes

# ----------------------------------------------------------------------------- what the paper says

IMAGES, TEXTS = recipes.IMAGES[:6], recipes.TEXTS[:4]  # Tables 1 and 7, 2 and 8, in their order
NAMES = {"aircraft": "Aircraft", "cub": "CUB", "chest_xray": "Chest X-ray", "dtd": "DTD",
         "dogs": "Dogs", "flower": "Flower", "cifar100": "CIFAR-100", "chemprot": "Chemprot",
         "acl_arc": "ACL-ARC", "scierc": "SCIERC", "twitter_emotion": "Twitter-Emotion",
         "toybirds": "toybirds", "pydocs": "pydocs"}  # these two are not the paper's
# training and test examples and classes, as the data sets' own sources have them; what Tables 7
# and 8 had is lost but for Flower and CIFAR-100
PUBLISHED = {
    "aircraft": (6667, 3333, 100), "cub": (5994, 5794, 200), "chest_xray": (5216, 624, 2),
    "dtd": (3760, 1880, 47), "dogs": (12000, 8580, 120), "flower": (2040, 6149, 102),
    "cifar100": (50000, 10000, 100), "chemprot": (4169, 3469, 13), "acl_arc": (1688, 139, 6),
    "scierc": (3219, 974, 7), "twitter_emotion": (3257, 1421, 4),
    "toybirds": (800, 1000, 20), "pydocs": (1722, 733, 11)}
# Table 1 as far as the text that this was written from still has it
PAPER = {"table1": {
    row: dict(zip(IMAGES, values)) for row, values in {
        "fine-tuning": ("? ± 1.13", "55.55 ± 0.54", "77.15 ± 0.52", "67.56 ± 0.52", "62.53 ± 0.57",
                        "88.78 ± 0.65"),
        "RecAdam": ("70.76 ± 1.25", "55.22 ± 1.29", "77.29 ± 1.32", "67.59 ± 1.03",
                    "61.65 ± 0.92", "88.97 ± 0.44"),
        "MARS": ("72.74 ± 0.57", "55.35 ± 0.73", "77.28 ± 1.80", "66.79 ± 0.90", "62.24 ± 0.96",
                 "87.93 ± 1.21"),
        "R3F": ("72.95 ± 0.46", "55.91 ± 0.79", "76.86 ± 0.97", "65.32 ± 1.25", "62.15 ± 0.48",
                "88.92 ± 0.78"),
        "further pre-training": ("73.38 ± 0.64", "55.72 ± 0.46", "77.79 ± 2.06", "65.55 ± 1.12",
                                 "62.34 ± 0.39", "88.63 ± 0.35")}.items()}}
# Appendix B's cost of a stage on CUB with one RTX 3090, in seconds
SECONDS = {"fine-tuning": 32 * 60 + 18, "further pre-training": 89 * 60 + 33,
           "self-distillation": 313 * 60 + 22}
PAPER["time"] = {row: {"cub": str(seconds)} for row, seconds in SECONDS.items()}

# ----------------------------------------------------------------------------- numbers

AXES = {"score": "test score, %", "gap": "test loss - training loss, nats",
        "distance": "‖θ_init - θ‖₂ after fine-tuning"}
DIGITS = {"score": 2, "seconds": 1}
ALL = {"score": "score, %", "mae_train": "L_MAE train", "mae_test": "L_MAE test", "gap": "gap",
       "distance": "distance"}  # the columns of a page that shows all of a run
RATIO = "‖∂L_Distill/∂θ‖ : ‖∂L_MAE/∂θ‖ at the end, without λ"
TABLE6 = ("The paper has 0 < λ ≤ 1; the rest is ours. AdamW forgets a common factor, so that "
          "where nothing is clipped λ = D is L_Distill's mean over the D channels and, with "
          "`--match hidden`, λ = 1 + K its mean over positions.")


def grid(heads: list[str], rows: Iterable[list[str]]) -> list[str]:
    """A Markdown table's lines."""
    first, *rest = (f"| {' | '.join(cells)} |" for cells in (heads, *rows))
    return [first, "|" + "---|" * len(heads), *rest]


def spread(values: Iterable[float], digits: int) -> str:
    """Mean ± sample standard deviation with n; what is missing is a dash."""
    values = list(values)
    if len(values) < 2:
        return f"{values[0]:.{digits}f} (n = 1)" if values else "–"
    return (f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f} "
            f"(n = {len(values)})")


def numbers(record: dict, kind: str = "") -> dict[tuple, dict[int, float]]:
    """(row, data set, axis value) -> seed -> the number as it is printed: scores in per cent."""
    kind, found = kind or record["value"], {}
    scale = 100 if kind == "score" else 1
    for value in record["values"]:
        if value.get(kind) is not None:
            place = value["row"], value["dataset"], value["x"]
            found.setdefault(place, {})[value["seed"]] = scale * value[kind]
    return found


def cells(record: dict) -> Counter:
    """How many numbers a page has in each of its cells."""
    if "counts" in record:
        return Counter(list(record["counts"]))
    return Counter({place: len(seeds) for place, seeds in numbers(record).items()})


# ----------------------------------------------------------------------------- the pages


def column(record: dict, kind: str, dataset: str, x: float | None = None) -> list[str]:
    """A cell for each row of a record."""
    found = numbers(record, kind)
    return [spread(found.get((row, dataset, x), {}).values(), DIGITS.get(kind, 3))
            for row in record["rows"]]


def table(record: dict) -> list[str]:
    """Rows × data sets, the paper's numbers beside ours; axis values × rows; rows × all."""
    rows, value, name, columns = record["rows"], record["value"], record["name"], {}
    if record["x"]:
        places = dict.fromkeys((dataset, x) for _, dataset, x in numbers(record))
        return grid([record["x"], *rows], (
            [f"{NAMES[dataset]}, {x:g}", *column(record, value, dataset, x)]
            for dataset, x in places))
    for dataset in record["datasets"]:
        if name == dataset:
            columns |= {ALL[kind]: column(record, kind, dataset) for kind in ALL}
        else:
            columns[NAMES[dataset]] = column(record, value, dataset)
        if name in PAPER:
            columns[f"{NAMES[dataset]}, paper"] = [PAPER[name].get(row, {}).get(dataset, "–")
                                                   for row in rows]
    if numbers(record, "ratio"):
        columns[RATIO] = column(record, "ratio", record["datasets"][0])
    return grid(["", *columns], (list(cells) for cells in zip(rows, *columns.values())))


def differences(record: dict) -> list[str]:
    """Self-distillation against two others, seed by seed, where all were measured."""
    found, digits, lines = numbers(record), DIGITS.get(record["value"], 3), []
    for other in ("fine-tuning", "further pre-training"):
        for dataset in record["datasets"]:
            ours, theirs = (found.get((row, dataset, None), {})
                            for row in ("self-distillation", other))
            apart = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
            if apart:
                lines.append([NAMES[dataset], other, spread(apart, digits),
                              f"{sum(a > 0 for a in apart)} of {len(apart)}"])
    return lines and ["", "Self-distillation minus another row, seed by seed:", "",
                      *grid(["", "minus", "difference", "seeds above 0"], lines)]


def counts(record: dict) -> list[str]:
    """Examples and classes of each data set, as counted and as published."""
    lines = []
    for dataset in record["datasets"]:
        here = record["counts"].get(dataset, ("–", "–", "–"))
        pairs = zip(here, PUBLISHED[dataset])
        lines.append([NAMES[dataset], *map(str, itertools.chain(*pairs))])
    return grid(["", "training", "published", "test", "published", "classes", "published"], lines)


def page(record: dict) -> str:
    """The Markdown page of a record, from nothing but the record."""
    name, values = record["name"], record["values"]
    told = "Mean ± sample standard deviation over seeds."
    if name == "datasets":
        told, main = "Counted on disk, beside what is published.", counts(record)
    else:
        main = table(record) + ([] if record["x"] or name == "time" else differences(record))
    lines = [f"# {record['title']}", "", f"`{record['command']}`", "", f"{record['machine']}. "
             f"{told}", "", *main]
    if name.startswith("figure"):
        lines += ["", f"![{record['title']}]({name}.png)"]
    lines += [f"\n{record['note']}"] if "note" in record else []
    lines += [f"\n{TABLE6}"] if name == "table6" else []
    if values:
        data = {value["dataset"]: f"{NAMES[value['dataset']]} {value['n_train']} training and "
                f"{value['n_test']} test examples, {value['num_classes']} classes, "
                f"{value['metric'].replace('_', ' ')}" for value in values}
        lines += ["", f"Data: {'; '.join(data.values())}."]
    lines += [f"\nEmpty: {NAMES[dataset]} ({reason})."
              for dataset, reason in record["absent"].items()]
    lines += [f"\nFailed, and so missing: `{words}`." for words in record["failed"]]
    if record["scale"] == "laptop" and values and name not in NAMES:
        lines += ["", "Laptop size: tiny weights and few steps; every method has the same settings "
                  "but for its own, chosen on a held-out tenth of training sets: "
                  "[images](../results/tuning-image.md), [texts](../results/tuning-text.md). "
                  "[README](../results/README.md): what the paper says, and what this says of it."]
    first = list(dict.fromkeys(value["command"] for value in values if value["seed"] == 0))
    if first:
        lines += ["", "The runs of seed 0:", "", "```sh", *(f"python {words}" for words in first),
                  "```"]
    return "\n".join(lines) + "\n"


# ----------------------------------------------------------------------------- the figures


def plot(path: Path, title: str, x: str, y: str, panels: dict[str, dict[str, tuple]]) -> None:
    """Panels of named series (places, values, errors): lines over an axis x, or bars without it."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, len(panels), layout="constrained", squeeze=False, figsize=(
        (4.5 if x else 1.7) * len(panels) + 1, 3.6))
    for axis, (name, series) in zip(axes[0], panels.items()):
        for number, (label, (places, values, errors)) in enumerate(series.items()):
            if x:
                axis.errorbar(places, values, errors, marker="os^"[number], capsize=3, label=label,
                              markersize=9 - 2 * number)  # none hides another
                axis.set_xscale("log" if max(places) > 9999 else "linear")
                axis.set(xlabel=x, xticks=places)
            else:  # values of data sets differ in size
                axis.bar([number], values, yerr=errors, label=label, capsize=3)
                axis.set_xticks([])
        axis.set_title(name)
    axes[0, 0].set_ylabel(y)
    labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(*labels, loc="outside lower center", ncols=len(labels[0]))
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw(record: dict, path: Path) -> None:
    """A figure of the paper, a panel for each data set."""
    panels, kind = {}, record["value"]
    for (row, dataset, x), seeds in numbers(record).items():
        series = panels.setdefault(NAMES[dataset], {}).setdefault(row, ([], [], []))
        error = statistics.stdev(seeds.values()) if len(seeds) > 1 else 0
        for values, value in zip(series, (x, statistics.mean(seeds.values()), error)):
            values.append(value)
    metrics = {value["metric"].replace("_", " ") for value in record["values"]}
    y = f"test {metrics.pop()}, %" if kind == "score" and len(metrics) == 1 else AXES[kind]
    seeds = len({value["seed"] for value in record["values"]})
    plot(path, f"{record['title']}\nmean ± standard deviation, {seeds} seeds", record["x"], y,
         panels)
