"""The pages of paper.py: what runs measured, beside the paper's numbers, as Markdown and figures.

A record is what results/<name>.json holds. Everything here is computed from it alone, so a page can
be made again without the runs.
"""
import math
import statistics
from collections import Counter
from pathlib import Path

from experiments import repeat

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
# Appendix B's cost on CUB with one RTX 3090, in seconds
PAPER_SECONDS = {"fine-tuning": 32 * 60 + 18, "further pre-training": 89 * 60 + 33,
                 "self-distillation": 313 * 60 + 22}
CLAIMS = {
    "table1": "self-distillation is best on all six; further pre-training helps Aircraft and hurts "
              "DTD; RecAdam, MARS and R3F barely help. Its row for self-distillation is lost.",
    "table2": "self-distillation is significantly better than all others on all four sets, except "
              "than RecAdam on Chemprot; further pre-training helps. Its numbers are lost.",
    "table3": "all variants are below the full model, though without L_MAE there is no significant "
              "difference on CUB, only on SCIERC. Its numbers are lost.",
    "table6": "λ in (0, 1] hardly matters on CUB. Its numbers are lost; the values of λ here are a "
              "guess, and 0 lies outside of that interval.",
    "figure1": "further pre-training overfits the unlabelled pictures. Only the caption is left of "
               "this figure: its data set and steps here are a guess.",
    "figure3": "self-distillation gains most with few examples: 13 points over fine-tuning at "
               "1,000, 6 at 2,500. The sizes but these and the whole set are a guess, and so is "
               "that every class has the same share.",
    "figure4": "the first round gains most, later ones little. Its numbers are lost, and that "
               "there were three rounds is a guess.",
    "figure5a": "self-distillation has a smaller gap than further pre-training on every data set.",
    "figure5b": "self-distillation ends nearer to θ_init than further pre-training on every data "
                "set.",
    "figure5c": "the first round shrinks the distance most, later ones little (Theorem 2).",
    "time": "32 m 18 s of fine-tuning, 1 h 29 m 33 s of further pre-training and 5 h 13 m 22 s of "
            "self-distillation, on CUB with one RTX 3090 (Appendix B)."}

# ----------------------------------------------------------------------------- numbers

AXES = {"score": "test score, %", "gap": "test loss - training loss, nats",
        "distance": "‖θ_init - θ‖₂ after fine-tuning"}
DIGITS = {"score": 2, "seconds": 1}


def spread(values: list[float], digits: int) -> str:
    """Mean ± sample standard deviation with n; what is missing is a dash."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f} (n = 1)" if values else "–"
    return f"{repeat.cell(values, digits)} (n = {len(values)})"


def numbers(record: dict) -> dict[tuple, dict[int, float]]:
    """(row, data set, axis value) -> seed -> the number as it is printed: scores in per cent."""
    found, kind = {}, record["value"]
    scale = 100 if kind == "score" else 1
    for value in record["values"]:
        if value[kind] is not None:
            place = value["row"], value["dataset"], value["x"]
            found.setdefault(place, {})[value["seed"]] = scale * value[kind]
    return found


def cells(record: dict) -> Counter:
    """How many numbers a page has in each of its cells."""
    if "counts" in record:
        return Counter(list(record["counts"]))
    return Counter({place: len(seeds) for place, seeds in numbers(record).items()})


# ----------------------------------------------------------------------------- the pages


def table(record: dict) -> list[str]:
    """Rows × data sets with the paper's numbers beside ours, or axis values × rows."""
    found, digits = numbers(record), DIGITS.get(record["value"], 3)

    def cell(*place: object) -> str:
        return spread(list(found.get(place, {}).values()), digits)

    if record["x"]:
        rows = record["rows"]
        lines = [f"| {record['x']} | {' | '.join(rows)} |", "|---|" + "---|" * len(rows)]
        for dataset, x in dict.fromkeys((dataset, x) for _, dataset, x in found):
            columns = " | ".join(cell(row, dataset, x) for row in rows)
            lines.append(f"| {NAMES[dataset]}, {x:g} | {columns} |")
        return lines
    paper = PAPER.get(record["name"])
    heads = [NAMES[dataset] + " | paper" * bool(paper) for dataset in record["datasets"]]
    lines = [f"| | {' | '.join(heads)} |",
             "|---|" + "---|" * len(heads) * (2 if paper else 1)]
    for row in record["rows"]:
        columns = []
        for dataset in record["datasets"]:
            columns.append(cell(row, dataset, None))
            if paper:
                columns.append(paper.get(row, {}).get(dataset) or "–")
        lines.append(f"| {row} | {' | '.join(columns)} |")
    return lines


def differences(record: dict) -> list[str]:
    """Self-distillation against two others, seed by seed, where all were measured."""
    found, digits, lines = numbers(record), DIGITS.get(record["value"], 3), []
    for other in ("fine-tuning", "further pre-training"):
        for dataset in record["datasets"]:
            ours, theirs = (found.get((row, dataset, None), {})
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
    rows = {row: [] for row in PAPER_SECONDS}
    for (row, *_), seeds in numbers(record).items():
        rows[row] += seeds.values()
    means = {row: statistics.mean(seconds or [math.nan]) for row, seconds in rows.items()}
    for row, theirs in PAPER_SECONDS.items():
        ratios = means[row] / means["fine-tuning"], theirs / means[row]
        ours, faster = ("–" if math.isnan(ratio) else f"{ratio:.3g}" for ratio in ratios)
        lines.append(f"| {row} | {spread(rows[row], 1)} | {ours} | {theirs} | "
                     f"{theirs / PAPER_SECONDS['fine-tuning']:.3g} | {faster} |")
    return lines


def counts(record: dict) -> list[str]:
    """Examples and classes of each data set, as counted and as published."""
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
    told = "Mean ± sample standard deviation over seeds."
    if name == "datasets":
        told, main = "Counted on disk, beside what is published.", counts(record)
    elif name == "time":
        main = times(record)
    else:
        main = table(record) + ([] if record["x"] else differences(record))
    lines = [f"# {record['title']}", "", f"`{record['command']}`", "", f"{record['machine']}. "
             f"{told}", "", *main]
    if name.startswith("figure"):
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
                  "[images](../results/tuning-image.md), [texts](../results/tuning-text.md)."]
    first = list(dict.fromkeys(value["command"] for value in values if value["seed"] == 0))
    if first:
        lines += ["", "The runs of seed 0:", "", "```sh", *(f"python {words}" for words in first),
                  "```"]
    return "\n".join(lines) + "\n"


def draw(record: dict, path: Path) -> None:
    """A figure, a panel for each data set: lines over an axis, or bars beside each other."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    found, kind = numbers(record), record["value"]
    rows, datasets = (list(dict.fromkeys(place[i] for place in found)) for i in (0, 1))
    width = 5 * len(datasets) if record["x"] else 1.7 * len(datasets) + 1
    figure, panels = plt.subplots(1, len(datasets), figsize=(width, 3.6), squeeze=False,
                                  layout="constrained")
    for panel, dataset in zip(panels[0], datasets):
        for number, row in enumerate(rows):
            points = {x: list(seeds.values()) for (of, at, x), seeds in found.items()
                      if (of, at) == (row, dataset)}
            means = [statistics.mean(point) for point in points.values()]
            error = [statistics.stdev(point) if len(point) > 1 else 0 for point in points.values()]
            if record["x"]:
                panel.errorbar(list(points), means, error, marker="o", capsize=3, label=row)
            else:  # gaps and distances of data sets differ in size
                panel.bar([number] * len(means), means, label=row, yerr=error, capsize=3)
        panel.set(title=NAMES[dataset], xlabel=record["x"], xticks=sorted(
            {x for _, at, x in found if at == dataset and x is not None}))
        if max(panel.get_xticks(), default=0) >= 10_000:
            panel.set_xscale("log")
    metrics = {value["metric"].replace("_", " ") for value in record["values"]}
    panels[0, 0].set_ylabel(f"test {metrics.pop()}, %" if kind == "score" and len(metrics) == 1
                            else AXES[kind])
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(rows))
    seeds = len({value["seed"] for value in record["values"]})
    figure.suptitle(f"{record['title']}\nmean ± standard deviation, {seeds} seeds", fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)
