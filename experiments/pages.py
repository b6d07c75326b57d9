"""The pages of paper.py: what runs measured, beside the paper's numbers, as Markdown and figures.

A record is what results/<name>.json holds. Everything here is computed from it alone, so a page can
be made again without the runs.
"""
import math
import statistics
from pathlib import Path

import repeat

# ----------------------------------------------------------------------------- what the paper says

IMAGES = ("aircraft", "cub", "chest_xray", "dtd", "dogs", "flower")  # Tables 1 and 7, in order
TEXTS = ("chemprot", "acl_arc", "scierc", "twitter_emotion")  # Tables 2 and 8
NAMES = {"aircraft": "Aircraft", "cub": "CUB", "chest_xray": "Chest X-ray", "dtd": "DTD",
         "dogs": "Dogs", "flower": "Flower", "cifar100": "CIFAR-100", "chemprot": "Chemprot",
         "acl_arc": "ACL-ARC", "scierc": "SCIERC", "twitter_emotion": "Twitter-Emotion",
         "toybirds": "toybirds", "pydocs": "pydocs"}
# training and test examples and classes, as the data sets' own sources have them; what Tables 7
# and 8 had is lost but for Flower and CIFAR-100
PUBLISHED = {
    "aircraft": (6667, 3333, 100), "cub": (5994, 5794, 200), "chest_xray": (5216, 624, 2),
    "dtd": (3760, 1880, 47), "dogs": (12000, 8580, 120), "flower": (2040, 6149, 102),
    "cifar100": (50000, 10000, 100), "chemprot": (4169, 3469, 13), "acl_arc": (1688, 139, 6),
    "scierc": (3219, 974, 7), "twitter_emotion": (3257, 1421, 4),
    "toybirds": (800, 1000, 20), "pydocs": (1722, 733, 11)}  # these two are not the paper's
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
# §5.3's cost on CUB with one RTX 3090, in seconds
PAPER_SECONDS = {"fine-tuning": 32 * 60 + 18, "further pre-training": 89 * 60 + 33,
                 "self-distillation": 313 * 60 + 22}
CLAIMS = {
    "table1": "self-distillation is best on all six; further pre-training helps Aircraft and hurts "
              "DTD; RecAdam, MARS and R3F barely help. Its row for self-distillation is lost.",
    "table2": "self-distillation is best on all four but for RecAdam on Chemprot; further "
              "pre-training helps. Its numbers are lost.",
    "table3": "all variants are below the full model, but L_MAE may go on CUB, not on SCIERC. Its "
              "numbers are lost.",
    "table6": "λ in (0, 1] hardly matters on CUB. Its numbers are lost.",
    "figure1": "further pre-training overfits the unlabelled pictures. Only the caption is left of "
               "this figure: its data set and steps here are a guess.",
    "figure3": "self-distillation gains most with few examples: 13 points over fine-tuning at "
               "1,000, 6 at 2,500.",
    "figure4": "the first round gains most, later ones little. Its numbers are lost.",
    "figure5a": "self-distillation has a smaller gap than further pre-training on every data set.",
    "figure5b": "self-distillation ends nearer to θ_init than further pre-training on every data "
                "set.",
    "figure5c": "the first round shrinks the distance most, later ones little (Theorem 2).",
    "time": "32 m 18 s of fine-tuning, 1 h 29 m 33 s of further pre-training and 5 h 13 m 22 s of "
            "self-distillation, on CUB with one RTX 3090."}


# ----------------------------------------------------------------------------- numbers

AXES = {"score": "test score, %", "gap": "test loss - training loss, nats",
        "distance": "‖θ_init - θ‖₂ after fine-tuning"}


def spread(values: list[float], digits: int) -> str:
    """Mean ± sample standard deviation with n; what is missing is a dash."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f} (n = 1)" if values else "–"
    return f"{repeat.cell(values, digits)} (n = {len(values)})"


def shown(values: list[dict], name: str) -> list[float]:
    """One quantity of some cells, as it is printed: scores in per cent."""
    return [100 * value[name] if name == "score" else value[name]
            for value in values if value[name] is not None]


# ----------------------------------------------------------------------------- the pages


def table(record: dict) -> list[str]:
    """Rows × data sets or axis values, with the paper's numbers beside ours."""
    values, kind = record["values"], record["value"]
    digits = {"score": 2, "seconds": 1}.get(kind, 3)
    if record["x"]:
        columns = record["rows"]
        lines = [f"| {record['x']} | " + " | ".join(columns) + " |",
                 "|---|" + "---|" * len(columns)]
        for dataset, x in dict.fromkeys((value["dataset"], value["x"]) for value in values):
            cells = [spread(shown([value for value in values if (
                value["dataset"], value["x"], value["row"]) == (dataset, x, row)], kind), digits)
                for row in columns]
            lines.append(f"| {NAMES[dataset]}, {x:g} | {' | '.join(cells)} |")
        return lines
    paper = PAPER.get(record["name"], {})
    heads = [f"{NAMES[dataset]} | paper" if paper else NAMES[dataset]
             for dataset in record["datasets"]]
    lines = ["| | " + " | ".join(heads) + " |",
             "|---|" + "---|" * len(record["datasets"]) * (1 + bool(paper))]
    for row in record["rows"]:
        cells = []
        for dataset in record["datasets"]:
            chosen = [value for value in values
                      if (value["row"], value["dataset"]) == (row, dataset)]
            cells.append(spread(shown(chosen, kind), digits))
            if paper:
                cells.append(paper.get(row, {}).get(dataset) or "–")
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return lines


def differences(record: dict) -> list[str]:
    """Self-distillation against two others, seed by seed, where all were measured."""
    kind, lines = record["value"], []
    digits = 2 if kind == "score" else 3
    for other in ("fine-tuning", "further pre-training"):
        for dataset in record["datasets"]:
            ours, theirs = ({value["seed"]: shown([value], kind)[0] for value in record["values"]
                             if (value["row"], value["dataset"]) == (row, dataset)}
                            for row in ("self-distillation", other))
            apart = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
            if apart:
                lines.append(f"| {NAMES[dataset]} | {other} | {spread(apart, digits)} | "
                             f"{sum(a > 0 for a in apart)} of {len(apart)} |")
    return lines and ["", "Self-distillation minus another row, seed by seed:", "",
                      "| | minus | difference | seeds above 0 |", "|---|---|---|---|", *lines]


def times(record: dict) -> list[str]:
    """Seconds of whole stages beside the paper's, and the ratios of both."""
    lines = ["| | seconds | × fine-tuning | paper, s | × fine-tuning | paper / ours |",
             "|---|---|---|---|---|---|"]
    rows = {row: shown([value for value in record["values"] if value["row"] == row], "seconds")
            for row in PAPER_SECONDS}
    base = statistics.mean(rows["fine-tuning"]) if rows["fine-tuning"] else math.nan
    for row, seconds in rows.items():
        mean, theirs = statistics.mean(seconds) if seconds else math.nan, PAPER_SECONDS[row]
        ratios = [mean / base, theirs / mean]
        ours, faster = ("–" if math.isnan(ratio) else f"{ratio:.3g}" for ratio in ratios)
        lines.append(f"| {row} | {spread(seconds, 1)} | {ours} | {theirs} | "
                     f"{theirs / PAPER_SECONDS['fine-tuning']:.3g} | {faster} |")
    return lines


def counts(record: dict) -> list[str]:
    lines = ["| | training | published | test | published | classes | published |",
             "|---|---|---|---|---|---|---|"]
    for dataset in record["datasets"]:
        here = record["counts"].get(dataset, ("–", "–", "–"))
        pairs = [f"{a} | {b}" for a, b in zip(here, PUBLISHED[dataset])]
        lines.append(f"| {NAMES[dataset]} | {' | '.join(pairs)} |")
    return lines


def page(record: dict) -> str:
    """The Markdown page of a record, from nothing but the record."""
    name, values = record["name"], record["values"]
    lines = [f"# {record['title']}", "", f"`{record['command']}`", "",
             f"{record['machine']}. Mean ± sample standard deviation over seeds."]
    if name == "datasets":
        lines[-1] = f"{record['machine']}. Counted on disk, beside what is published."
        lines += ["", *counts(record)]
    elif name == "time":
        lines += ["", *times(record)]
    else:
        lines += ["", *table(record)]
        if any(value["row"] == "self-distillation" for value in values) and not record["x"]:
            lines += differences(record)
    if name.startswith("figure") and values:
        lines += ["", f"![{record['title']}]({name}.png)"]
    if name in CLAIMS:
        lines += ["", f"The paper: {CLAIMS[name]}"]
    sizes = {value["dataset"]: value for value in values}
    if sizes:
        lines += ["", "Data: " + "; ".join(
            f"{NAMES[dataset]} {value['n_train']} training and {value['n_test']} test examples, "
            f"{value['num_classes']} classes, {value['metric'].replace('_', ' ')}"
            for dataset, value in sizes.items()) + "."]
    lines += [f"\nEmpty: {NAMES[dataset]} ({reason})."
              for dataset, reason in record["absent"].items()]
    lines += [f"\nFailed, and so missing: `{words}`." for words in record["failed"]]
    if record["scale"] == "laptop" and values:
        lines += ["", "Laptop size: tiny weights and few steps; every method has the same settings "
                  "but for its own. They were chosen on a held-out tenth of training sets: "
                  "[images](tuning-image.md), [texts](tuning-text.md)."]
    if record["one_checkpoint"]:
        lines += ["", "Pre-training is seed 0's for all: the seeds differ in fine-tuning alone."]
    first = list(dict.fromkeys(value["command"] for value in values if value["seed"] == 0))
    if first:
        lines += ["", "The runs of seed 0:", "", "```sh", *(f"python {words}" for words in first),
                  "```"]
    return "\n".join(lines) + "\n"


def draw(record: dict, path: Path) -> None:
    """A figure: lines over an axis, or bars beside each other for each data set."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    values, kind = record["values"], record["value"]
    metrics = {value["metric"].replace("_", " ") for value in values}
    axis_name = f"test {metrics.pop()}, %" if kind == "score" and len(metrics) == 1 else AXES[kind]
    rows = list(dict.fromkeys(value["row"] for value in values))
    datasets = list(dict.fromkeys(value["dataset"] for value in values))
    seeds = len({value["seed"] for value in values})
    if record["x"]:
        figure, axes = plt.subplots(1, len(datasets), figsize=(5 * len(datasets), 3.6),
                                    squeeze=False, layout="constrained")
        for axis, dataset in zip(axes[0], datasets):
            for row in rows:
                points = {}
                for value in values:
                    if (value["dataset"], value["row"]) == (dataset, row):
                        points.setdefault(value["x"], []).extend(shown([value], kind))
                if not points:
                    continue
                axis.errorbar(list(points), [statistics.mean(p) for p in points.values()],
                              [statistics.stdev(p) if len(p) > 1 else 0 for p in points.values()],
                              marker="o", capsize=3, label=row)
            axis.set(title=NAMES[dataset], xlabel=record["x"], ylabel=axis_name)
            ticks = sorted({value["x"] for value in values if value["dataset"] == dataset})
            if ticks[-1] >= 10_000:
                axis.set_xscale("log")
            elif ticks[-1] < 10:
                axis.set_xticks(ticks)
            axis.legend()
    else:  # gaps and distances of data sets differ in size: a panel each
        figure, axes = plt.subplots(1, len(datasets), figsize=(1.7 * len(datasets) + 1, 3.2),
                                    squeeze=False, layout="constrained")
        for axis, dataset in zip(axes[0], datasets):
            for i, row in enumerate(rows):
                chosen = shown([value for value in values
                                if (value["dataset"], value["row"]) == (dataset, row)], kind)
                if chosen:
                    axis.bar(i, statistics.mean(chosen), label=row, color=f"C{i}", capsize=3,
                             yerr=statistics.stdev(chosen) if len(chosen) > 1 else 0)
            axis.set(title=NAMES[dataset], xticks=[])
        axes[0, 0].set_ylabel(axis_name)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(rows))
    figure.suptitle(f"{record['title']}\nmean ± standard deviation, {seeds} seeds", fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)
