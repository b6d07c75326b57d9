"""What a run shows: contact sheets of pictures, and curves of its losses."""
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from support import fetch


def spread(pixels: torch.Tensor, count: int) -> torch.Tensor:
    """A few pictures [count, 3, S, S] from all over a split, which may be sorted by class."""
    return pixels[torch.linspace(0, len(pixels) - 1, count).long()]


def grid(rows: list[list[torch.Tensor]], path: str | Path, titles: list[str],
         captions: list[list[str]] | None = None) -> None:
    """Write rows of pictures uint8 [3, S, S] as a PNG, titles above; small ones are enlarged.

    captions: a few words below each picture.
    """
    side = len(rows[0][0][0])
    scale, gap, top = max(1, 120 // side), 6, 18
    width, height = side * scale + gap, side * scale + gap + 12 * (captions is not None)
    sheet = Image.new("RGB", (width * len(titles) + gap, top + height * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((gap + width * column, 3), title, fill="black")
        for row, pictures in enumerate(rows):
            pixels = pictures[column].permute(1, 2, 0).contiguous().numpy()  # [S, S, 3]
            picture = Image.fromarray(pixels).resize((side * scale,) * 2, Image.Resampling.NEAREST)
            x, y = gap + width * column, top + height * row
            sheet.paste(picture, (x, y))
            if captions:
                draw.text((x, y + side * scale), captions[row][column], fill="black")
    with fetch.whole(path) as part:
        sheet.save(part, "PNG")


PANELS = {"mae_loss": "L_MAE; held-out inputs dashed", "distill_loss": "L_Distill",
          "loss": "fine-tuning, cross-entropy"}


def curves(folder: Path, title: str) -> None:
    """Draw curves.png from log.jsonl: each loss against its steps, a colour a stage."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    stages = list(dict.fromkeys((line["stage"], line["round"]) for line in lines))
    kinds = [kind for kind in PANELS if any(kind in line for line in lines)]
    figure, axes = plt.subplots(1, len(kinds), figsize=(4.5 * len(kinds), 3.4), squeeze=False,
                                layout="constrained")
    for axis, kind in zip(axes[0], kinds):
        for number, (stage, round) in enumerate(stages):
            mine = [line for line in lines if (line["stage"], line["round"]) == (stage, round)]
            steps, values = _column(mine, kind)
            if not steps:
                continue
            colour, near = f"C{number}", np.ones(min(5, len(values)))
            axis.plot(steps, values, color=colour, alpha=0.25, linewidth=1)  # single batches
            # each point's mean with its neighbours, of whom the ends have fewer
            smooth = np.convolve(values, near, "same") / np.convolve(np.ones_like(values), near,
                                                                     "same")
            axis.plot(steps, smooth, color=colour,
                      label=f"{stage}, round {round}" if round > 1 else stage)
            axis.plot(*_column(mine, f"heldout_{kind}"), color=colour, linestyle="--")
        axis.set(title=PANELS[kind], xlabel="step",
                 yscale="log" if kind == "distill_loss" else "linear")
        axis.legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    with fetch.whole(folder / "curves.png") as part:
        figure.savefig(part, dpi=120, format="png")
    plt.close(figure)


def _column(lines: list[dict], name: str) -> tuple[list[int], list[float]]:
    """The steps that have a value of that name, and the values."""
    found = [line for line in lines if name in line]
    return [line["step"] for line in found], [line[name] for line in found]
