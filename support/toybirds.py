"""Fine-grained birds in miniature, drawn by this program: 20 species in 5 families.

Siblings share all but two or three of their parts, while pose, size, light, background and clutter
vary more than the parts do. Letters: N pictures, S side in pixels.
"""
import colorsys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw

from support.fetch import Lists

PALETTE = {"red": (204, 46, 46), "orange": (230, 132, 36), "yellow": (235, 212, 60),
           "green": (62, 150, 62), "teal": (54, 178, 178), "blue": (52, 82, 196),
           "purple": (140, 66, 168), "brown": (122, 78, 42), "white": (240, 240, 240),
           "black": (40, 40, 44)}
COLOURS = list(PALETTE)
TAILS = ("square", "forked", "pointed")
EACH = {"train": 40, "test": 50}  # pictures of a species
FAMILIES = ("coalwing", "bluecap", "longbill", "plumfinch", "spearbeak")
SIBLINGS = ("common", "northern", "island", "mountain")
CANVAS = 3  # drawn at three times the size and averaged down: soft edges


class Species(NamedTuple):
    """What makes a bird's kind: the colours of its parts, its tail, and its family's build."""

    body: str
    wing: str
    head: str
    belly: str
    bar: str  # "none" or the colour of the bar across the wing
    tail: str
    tail_shape: str
    cap: bool  # family: only the crown has the head's colour
    beak: float  # family: length
    build: float  # family: height of the body over its length


def _part(rng: np.random.Generator, name: str) -> str:
    if name == "tail_shape":
        return str(rng.choice(TAILS))
    return "none" if name == "bar" and rng.random() < 0.4 else str(rng.choice(COLOURS))


def _random_species(rng: np.random.Generator) -> Species:
    parts = {name: _part(rng, name) for name in Species._fields[:7]}
    return Species(**parts, cap=bool(rng.random() < 0.3), beak=float(rng.uniform(0.14, 0.34)),
                   build=float(rng.uniform(0.5, 0.75)))


def toybird_species() -> list[Species]:
    """The 20 labelled species: 5 families of 4, siblings at least two parts apart."""
    rng, species = np.random.default_rng(7), []
    for _ in range(5):
        base = _random_species(rng)
        family = [base]
        while len(family) < 4:
            changed = rng.choice(["wing", "head", "belly", "bar", "tail", "tail_shape"], 2,
                                 replace=False)
            sibling = base._replace(**{str(name): _part(rng, str(name)) for name in changed})
            if all(sum(a != b for a, b in zip(sibling, other)) >= 2 for other in family):
                family.append(sibling)
        species += family
    return species


def _ellipse(x: float, y: float, rx: float, ry: float, points: int = 18) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], 1)  # [points, 2]


def _shade(rng: np.random.Generator, colour: str, light: float) -> tuple[int, ...]:
    """A palette colour as this picture's light shows it."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(c / 255 for c in PALETTE[colour]))
    hue, saturation, value = rng.normal((hue, saturation, value), (0.018, 0.09, 0.09))
    rgb = colorsys.hsv_to_rgb(hue % 1, min(max(saturation, 0), 1), min(max(value, 0), 1))
    return tuple(int(min(max(255 * c * light, 0), 255)) for c in rgb)


def _clutter(rng: np.random.Generator, draw: ImageDraw.ImageDraw, side: int, count: int,
             light: float, largest: float) -> None:
    for _ in range(count):
        centre, radius = rng.uniform(-0.1, 1.1, 2) * side, rng.uniform(0.03, largest, 2) * side
        kind = rng.integers(3)
        if kind == 0:
            outline = _ellipse(*centre, *radius)
        elif kind == 1:
            turn = rng.uniform(0, np.pi)
            axes = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
            outline = centre + np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * radius @ axes
        else:
            outline = centre + rng.uniform(-1.3, 1.3, (3, 2)) * radius
        draw.polygon([tuple(p) for p in outline], fill=_shade(rng, str(rng.choice(COLOURS)), light))


def _bird(rng: np.random.Generator, species: Species) -> list[tuple[str, np.ndarray]]:
    """A bird's parts, back to front, facing right: (colour, outline); about 2 units long."""
    high, wide, long, broad = rng.normal(1, 0.06, 4)
    height, wing = 0.5 * species.build * high, 0.3 * wide
    tip = {"square": [(-1, -.13), (-1, .13)], "forked": [(-1.05, -.22), (-.8, 0), (-1.05, .22)],
           "pointed": [(-1.1, 0)]}[species.tail_shape]
    tail = np.array([(-.38, -.1), *tip, (-.38, .1)]) * [long, broad]
    head = _ellipse(.46, -.62 * height - .12, .21, .21)
    beak = np.array([(.62, -.62 * height - .2), (.62 + species.beak, -.62 * height - .1),
                     (.62, -.62 * height - .03)])
    leg = np.array([(0, .8 * height), (.04, .8 * height), (.04, height + .2), (0, height + .2)])
    parts = [("black", leg + [-.1, 0]), ("black", leg + [.08, 0]), (species.tail, tail),
             (species.body, _ellipse(0, 0, .52, height)),
             (species.belly, _ellipse(.06, .45 * height, .36, .5 * height)),
             (species.body if species.cap else species.head, head)]
    if species.cap:
        parts.append((species.head, head[head[:, 1] <= head[:, 1].mean() - .04]))
    parts.append((species.wing, _ellipse(-.1, -.15 * height, wing, .5 * height)))
    if species.bar != "none":
        parts.append((species.bar, _ellipse(-.1, -.15 * height, .075, .42 * height)))
    return [*parts, ("yellow", beak), ("white", _ellipse(.5, -.62 * height - .17, .06, .06)),
            ("black", _ellipse(.51, -.62 * height - .17, .035, .035))]


def draw_toybird(rng: np.random.Generator, species: Species | None, side: int = 40) -> np.ndarray:
    """One picture uint8 [side, side, 3] of a bird, or of shapes alone where species is None."""
    large, light = side * CANVAS, rng.uniform(0.72, 1.15)
    picture = Image.new("RGB", (large, large), _shade(rng, str(rng.choice(COLOURS)), light))
    draw = ImageDraw.Draw(picture)
    _clutter(rng, draw, large, rng.integers(2, 7), light, 0.14)
    if species is not None:
        turn, scale = np.radians(rng.uniform(-35, 35)), rng.uniform(0.8, 1.2) * 0.5 * large
        axes = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        mirror = [rng.choice([-1, 1]), 1]
        centre = (0.5 + rng.uniform(-0.08, 0.08, 2)) * large
        shades = {colour: _shade(rng, colour, light) for colour in COLOURS}
        for colour, outline in _bird(rng, species):
            outline = outline * mirror @ axes * scale + centre
            draw.polygon([tuple(p) for p in outline], fill=shades[colour])
        _clutter(rng, draw, large, rng.integers(0, 3), light, 0.08)
    else:
        _clutter(rng, draw, large, rng.integers(3, 10), light, 0.3)
    return np.asarray(picture.reduce(CANVAS))


def toybirds(split: str, each: int, side: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """`each` pictures of every species, always the same: uint8 [N, 3, side, side] and Long[N]."""
    kinds = toybird_species()
    # validation is for choosing settings
    rng = np.random.default_rng({"train": 1, "test": 2, "validation": 3}[split])
    labels = [label for label in range(len(kinds)) for _ in range(each)]
    pixels = np.stack([draw_toybird(rng, kinds[label], side) for label in labels])  # [N, S, S, 3]
    pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()  # [N, 3, S, S]
    return pixels, torch.tensor(labels)


def lists(_: Path) -> Lists:
    """The data set; a picture's source is its number among those of its split."""
    names = [f"{which} {family}" for family in FAMILIES for which in SIBLINGS]  # as species are
    train, test = ([(i, names[i // each]) for i in range(20 * each)] for each in EACH.values())
    return Lists(names, train, test)


def unlabelled_birds(count: int, rng: np.random.Generator, side: int = 40) -> torch.Tensor:
    """uint8 [count, 3, side, side]: nine in ten birds, of species drawn afresh, none of the 20."""
    parts = {species[:7] for species in toybird_species()}
    pictures = []
    while len(pictures) < count:
        species = _random_species(rng) if rng.random() < 0.9 else None
        if species is None or species[:7] not in parts:
            pictures.append(draw_toybird(rng, species, side))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()  # [count, 3, S, S]
