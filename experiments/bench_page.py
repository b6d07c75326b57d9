"""The page of bench.py, computed from results/bench.json alone.

The record holds seconds, FLOPs and examples turn by turn; medians, quartiles and ratios are taken
here.
"""
import statistics
from collections.abc import Sequence

# ----------------------------------------------------------------------------- numbers


def number(value: float) -> str:
    """Three digits that count."""
    return f"{value:.3g}" if 0.001 <= abs(value) < 1000 else f"{value:,.0f}" if value else "0"


def middle(values: Sequence[float]) -> str:
    """Median and, of three values and more, the quartiles."""
    if len(values) < 3:
        return number(statistics.median(values))
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{number(median)} ({number(low)}–{number(high)})"


def over(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """a / b, turn by turn."""
    return [x / y for x, y in zip(a, b)]


def rate(row: dict) -> list[float]:
    """Pictures or tokens a second."""
    return over(row["items"], row["seconds"])


def share(row: dict) -> list[float]:
    """The matrix products that a step needs, in per cent of what the machine could have done."""
    return [100 * x for x in over(over(row["flops"], row["seconds"]), row["peak"])]


def ratios(row: dict) -> dict[str, list[float]]:
    """How many times faster than each setting of transformers."""
    return {name: over(theirs["seconds"], row["seconds"]) for name, theirs in row["peers"].items()}


# ----------------------------------------------------------------------------- targets

FOUND = {"further pre-training": (("ViT", "≥ 1.15 ×", "≥ 5 ×; ≥ 1.3 ×"),
                                  ("RoBERTa", "≥ 1.8 ×", "≥ 5 ×; ≥ 1.6 ×")),
         "self-distillation": (("ViT", "≥ 1.25 ×", "≥ 5 ×; ≥ 1.4 ×"),
                               ("RoBERTa", "≥ 1.9 ×", "≥ 5 ×; ≥ 1.6 ×"))}
UNMEASURED = "not measured"


def part(record: dict, device: str, name: str) -> object:
    """What a part found on a device, or None."""
    return record.get(device, {}).get(name, {}).get("found")


def first(record: dict, device: str, model: str, stage: str) -> list[dict]:
    """The rows of the first case of a model: pictures, or real texts."""
    rows = [row for row in part(record, device, "steps") or ()
            if model in row["model"] and row["stage"] == stage]
    return [row for row in rows if row["model"] == rows[0]["model"]]


def compared(rows: list[dict]) -> str:
    """The ratios of one step, plain and compiled."""
    told = ["; ".join(f"{number(statistics.median(values))} ×" for values in ratios(row).values())
            + " (compiled)" * row["compiled"] for row in rows if row["peers"]]
    return ", ".join(told) or UNMEASURED


def targets(record: dict) -> list[str]:
    lines = ["| | CPU, target | CPU | GPU, target | GPU |", "|---|---|---|---|---|"]

    def line(what: str, *cells: str) -> None:
        lines.append(f"| {what} | {' | '.join(cells)} |")

    for stage, aims in FOUND.items():
        for model, cpu, gpu in aims:
            cells = [compared(first(record, device, model, stage)) for device in ("cpu", "cuda")]
            line(f"{stage}, {model}, against transformers", cpu, cells[0], gpu, cells[1])
    shares = []
    for device in ("cpu", "cuda"):
        rows = [(row, statistics.median(share(row))) for row in part(record, device, "steps") or ()
                if row["stage"] in FOUND]
        shares.append(" to ".join(f"{edge(value for _, value in rows):.0f} %" for edge in (min, max)
                                  ) if rows else UNMEASURED)
    line("share of the matrix-product peak, pre-training steps", "≥ 85 %", shares[0],
         "≥ 35 % at the paper's batch, ≥ 50 % at the best", shares[1])
    cells = []
    for device in ("cpu", "cuda"):
        seconds = (part(record, device, "loading") or {"seconds": {}})["seconds"]
        faster = [statistics.median(over(theirs, seconds["later start"]))
                  for name, theirs in seconds.items() if name.startswith("transformers")]
        cells.append(f"{number(min(faster))} ×" if faster else UNMEASURED)
    found = part(record, "cuda", "column")
    cells += [UNMEASURED] * 2
    if found:
        plain = [statistics.median(row["seconds"]) for row in found[:2]]
        cells[2:] = f"{plain[0] / plain[1]:.3f} ×", f"{projected(record)[1] / 60:.1f} min"
    line("pictures delivered, later start, against transformers' loader", "≥ 50 ×", cells[0], "–",
         cells[1])
    line("step with real data against one batch repeated", "–", "–", "≤ 1.03 ×", cells[2])
    line("the paper's CUB column, projected", "–", "–", "< 20 min", cells[3])
    return lines


# ----------------------------------------------------------------------------- the parts


def told(found: dict) -> str:
    """Where a part's numbers come from."""
    names = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    threads = found["threads"]
    return (f"`{found['command']}`: {found['machine']}; {names}, {threads} "
            f"thread{'s' * (threads > 1)}.")


def steps(rows: list[dict]) -> list[str]:
    lines = ["| model | step | batch | a second | share of peak, % | against transformers | its "
             "share, % | losses apart |", "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        cells = [row["model"], row["stage"] + ", compiled" * row["compiled"], str(row["batch"]),
                 f"{middle(rate(row))} {row['unit']}", middle(share(row))]
        theirs = {name: share({**row, **found}) for name, found in row["peers"].items()}
        for column in ([f"{middle(values)} × ({name})" for name, values in ratios(row).items()],
                       [middle(values) for values in theirs.values()],
                       [f"{found['apart']:.0e}" for found in row["peers"].values()]):
            cells.append("; ".join(column) or "–")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Peak: "
              f"{middle([value / 1e9 for row in rows for value in row['peak']])} GFLOP/s, the best "
              "of the plain products of each turn. What ran once before the first step of "
              "self-distillation:", ""]
    for row in rows:
        if row["stage"] == "self-distillation":
            lines.append(f"* {row['model']}{', compiled' * row['compiled']}: "
                         f"{number(row['before'])} s for {row['examples']} examples, "
                         f"{number(row['before'] / statistics.median(row['seconds']))} steps' time")
    return lines


def loading(found: dict) -> list[str]:
    lines = [f"{found['about']}, to {found['side']} × {found['side']} normalised float32 pixels, "
             "the files in the system's cache. A start is all that happens until every picture was "
             "delivered once.", "", "| | pictures a second | times ours, later start |",
             "|---|---|---|"]
    for name, seconds in found["seconds"].items():
        name += f" ({found['processor']})" if "workers" in name else ""
        speed = [found["pictures"] / s for s in seconds]
        times = over(found["seconds"]["later start"], seconds)
        lines.append(f"| {name} | {middle(speed)} | {middle(times)} |")
    return lines


def growth(found: dict) -> list[str]:
    lines = []
    for what, rows in found["rows"].items():
        lines += [f"| {what} | batch | s a step | a second | share of peak, % |",
                  "|---|---|---|---|---|"]
        lines += [f"| {row['value']} | {row['batch']} | {middle(row['seconds'])} | "
                  f"{middle(rate(row))} {row['unit']} | {middle(share(row))} |" for row in rows]
        lines.append("")
    lines += ["| processes | batch, all together | threads each | s a step |", "|---|---|---|---|"]
    for row in found["processes"]:
        cells = [str(row["threads"]), number(row["seconds"])] if "seconds" in row else [
            "–", UNMEASURED]
        lines.append(f"| {row['value']} | {row['batch']} | {' | '.join(cells)} |")
    return lines


def projected(record: dict) -> tuple[list[str], float]:
    """Seconds of each stage of the CUB column and together, each at its faster setting."""
    found, lines, total = part(record, "cuda", "column"), [], 0.0
    plain, compiled = found[:len(found) // 2], found[len(found) // 2:]
    for pair in zip(plain, compiled):
        best = min(pair, key=lambda row: statistics.median(row["seconds"]))
        whole = best["before"] + best["steps"] * statistics.median(best["seconds"])
        counted = best["examples"] > best["batch"]
        total += whole * counted
        cells = [middle([1000 * s for s in row["seconds"]]) for row in pair]
        lines.append(f"| {best['stage']}{', one batch repeated' * (not counted)} | {best['batch']} "
                     f"| {best['steps']:,} | {' | '.join(cells)} | {number(best['before'])} | "
                     f"{f'{whole / 60:.1f} min' if counted else '–'} |")
    decoding = part(record, "cuda", "loading")
    if decoding:
        seconds = 11788 * statistics.median(decoding["seconds"]["first start"])
        total += seconds / decoding["pictures"]
        lines.append(f"| decoding 11,788 pictures | – | – | – | – | – | "
                     f"{seconds / decoding['pictures'] / 60:.1f} min |")
    lines.append(f"| **projected** | | | | | | {total / 60:.1f} min |")
    return lines, total


RULES = """\
Our steps are those of `distill.pretrain`, `finetune.train` and `finetune.predict`, with the
programs' own settings; ViTMAE and RoBERTa of transformers do the same steps in turn with them, and
the machine a few square matrix products, so that a ratio or a share compares neighbours in time.
Numbers are medians over the turns with quartiles. First of all both sides have to agree on the
loss, on the same weights, pictures or texts and masks (an exact count for pictures), in float32 and
without dropout; how far apart they were is in the last column. Then ours draws Bernoulli masks,
which transformers cannot: it masks exactly three quarters. Its batches are at hand, ours are
indexed and normalised within the step. Both evaluate batches of 256, ours sorted by length. Texts
are real ones in the bundled model's tokens, which are shorter than RoBERTa's, or full rows of
random tokens; weights and pictures are random.

A share counts the matrix products that a step needs, and no other work: for rows of K tokens (of
which Z are masked), width D, inner width M, patches of P values, vocabulary V

* n tokens through a layer: 2n(4D² + 2DM) + 4n²D, row by row; a patch embedding: 2nPD;
* pictures masked: 1 + K − Z tokens through the encoder, 2(1 + K − Z)DD' into the decoder of width
  D', 1 + K through its layers, 2ZD'P out of it; unmasked: 1 + K through the encoder;
* texts: K through the encoder, 2Z(D² + DV) through the head;
* a backward pass costs two forward ones, one for the patch embedding; self-distillation adds an
  unmasked pass of the student to further pre-training, and its pictures are embedded once; the
  teacher is left out, since it is frozen and sees the same every epoch; evaluation is forward only.

What transformers computes beyond that (padding, predictions everywhere, the teacher) counts in its
own share."""
TITLES = {"steps": "Steps", "loading": "Loading pictures", "growth": "How a step's cost grows",
          "column": "The paper's CUB column, projected"}


def page(record: dict) -> str:
    """The Markdown page, from nothing but the record."""
    lines = ["# bench", "", RULES, "", "## Targets", "", *targets(record)]
    for device, parts in record.items():
        for name, found in parts.items():
            lines += ["", f"## {TITLES[name]}, {'GPU' if device == 'cuda' else 'CPU'}", "",
                      told(found), ""]
            if name == "column" and found["found"]:
                lines += ["| stage | batch | steps | ms a step | compiled | s before | in all |",
                          "|---|---|---|---|---|---|---|", *projected(record)[0]]
            elif name == "column":
                lines.append(f"{UNMEASURED.capitalize()}: this machine has no GPU.")
            else:
                lines += {"steps": steps, "loading": loading, "growth": growth}[name](
                    found["found"])
    return "\n".join(lines) + "\n"
