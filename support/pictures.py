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


def grid(rows: list[list[torch.Tensor | np.ndarray]], path: str | Path, titles: list[str]) -> None:
    """Write rows of pictures uint8 [3, S, S] as a PNG, titles above; small ones are enlarged."""
    side = len(rows[0][0][0])
    scale, gap, top = 3 if side < 100 else 1, 4, 16
    cell = side * scale + gap
    sheet = Image.new("RGB", (cell * len(titles) + gap, top + cell * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((gap + cell * column, 2), title, fill="black")
        for row, pictures in enumerate(rows):
            pixels = torch.as_tensor(pictures[column]).permute(1, 2, 0).cpu().contiguous().numpy()
            picture = Image.fromarray(pixels).resize((side * scale,) * 2, Image.Resampling.NEAREST)
            sheet.paste(picture, (gap + cell * column, top + cell * row))
    with fetch.whole(path) as part:
        sheet.save(part, "PNG")


def curves(folder: Path) -> None:
    """Draw curves.png from log.jsonl: each loss of each stage against its steps."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    kinds = [kind for kind in ("mae_loss", "distill_loss", "loss")
             if any(kind in line for line in lines)]
    figure, axes = plt.subplots(1, len(kinds), figsize=(4.5 * len(kinds), 3.2), squeeze=False,
                                layout="constrained")
    for axis, kind in zip(axes[0], kinds):
        shown = [line for line in lines if kind in line]
        for stage, round in dict.fromkeys((line["stage"], line["round"]) for line in shown):
            points = [(line["step"], line[kind]) for line in shown
                      if (line["stage"], line["round"]) == (stage, round)]
            axis.plot(*zip(*points), label=f"{stage}, round {round}" if round > 1 else stage)
        axis.set(title=kind, xlabel="step")
        axis.legend(fontsize=7)
    with fetch.whole(folder / "curves.png") as part:
        figure.savefig(part, dpi=120, format="png")
    plt.close(figure)
