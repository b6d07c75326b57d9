"""Pictures: what a folder holds, decoding and normalising; the seven sets and one's own folders.

Letters: N pictures, S side in pixels.
"""
import contextlib
import itertools
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from support import fetch
from support.fetch import BadInput, Lists

Rows = list[tuple[Path | np.ndarray, str | None]]  # pictures with their classes
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")  # some others start a program
LARGEST = 500_000_000  # pixels: what claims to have more is broken or hostile
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which MAE's weights expect


def normalise(pixels: Tensor) -> Tensor:
    """uint8 pixels [..., 3, H, W] as float32 with ImageNet's mean 0 and deviation 1 per channel."""
    mean = torch.tensor(MEAN, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(STD, device=pixels.device).view(3, 1, 1)
    # in place: on a CPU new memory for every intermediate result would cost thrice the arithmetic
    return pixels.to(torch.float32, copy=True).sub_(255 * mean).div_(255 * std)


def denormalise(pictures: Tensor) -> Tensor:
    """The way back: uint8 pixels, clipped to what a picture can show."""
    mean = torch.tensor(MEAN, device=pictures.device).view(3, 1, 1)
    std = torch.tensor(STD, device=pictures.device).view(3, 1, 1)
    return ((pictures * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


# ----------------------------------------------------------------------------- files to pixels


def decode(source: str | Path | np.ndarray | Image.Image, side: int) -> np.ndarray:
    """A file, CIFAR's record [3072] or PIL's picture as uint8 [3, side, side]; BadInput if broken.

    As the authors do, the picture is squashed to a square (bilinear).
    """
    if isinstance(source, np.ndarray):
        source = Image.fromarray(source.reshape(3, 32, 32).transpose(1, 2, 0))
    try:
        with (contextlib.nullcontext(source) if isinstance(source, Image.Image)
              else Image.open(source, formats=FORMATS)) as opened:
            if opened.width * opened.height > LARGEST:
                raise ValueError(f"it is larger than {LARGEST // 10**6} megapixels")
            image = _rgb(opened)
    except Exception as error:  # Pillow raises a dozen kinds on broken files
        raise BadInput(f"{source} cannot be read as a picture ({error}): mend or remove it"
                       ) from error
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR)).transpose(2, 0, 1)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("nobody can tell which number its floating-point pixels mean by white")
    with contextlib.suppress(Exception):  # metadata may be broken where the picture is not
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion would clip them to 8
        grey = np.asarray(image).clip(0, 65535) / 257
        image = Image.fromarray(grey.round().astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def decode_all(sources: list, side: int, title: str = "pictures") -> Tensor:
    """uint8 [N, 3, side, side], of CIFAR 32 at most; on threads, as Pillow lets go of the lock."""
    side = min(side, 32) if isinstance(sources[0], np.ndarray) else side
    pixels = torch.empty(len(sources), 3, side, side, dtype=torch.uint8)
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # `decode` has its own
    try:
        with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
            warnings.simplefilter("ignore")  # of odd metadata
            done = pool.map(decode, sources, itertools.repeat(side))
            bar = tqdm(done, total=len(sources), desc=title, unit="picture", disable=None)
            for picture, row in zip(bar, pixels.numpy()):
                row[:] = picture
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    return pixels


class Small:
    """Pictures smaller than a model takes them: a batch is made larger, not to Pillow's bits."""

    def __init__(self, pixels: Tensor, side: int) -> None:
        self.pixels, self.side = pixels, side  # uint8 [N, 3, S, S]

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: Tensor) -> Tensor:
        """The pictures at index [B], uint8 [B, 3, side, side]."""
        return self.enlarged(self.pixels[index])

    def enlarged(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, side, side] of [B, 3, S, S], bilinear, on the device where these are."""
        x = F.interpolate(pixels.float(), size=self.side, mode="bilinear")
        return x.round_().to(torch.uint8)  # [B, 3, side, side]


def plain(path: str | Path, side: int) -> tuple[list[str], Tensor]:
    """Names and pixels uint8 [N, 3, side, side] of a folder's pictures, or of one; no labels."""
    path = Path(path)
    found = [path] if path.is_file() else pictures(path)
    names = [file.name if file == path else file.relative_to(path).as_posix() for file in found]
    return names, decode_all(found, side)


# ----------------------------------------------------------------------------- one's own folders


def pictures(folder: Path) -> list[Path]:
    """All pictures below a folder; BadInput where there are none."""
    found = [path for path in fetch.files(folder) if path.suffix.lower() in SUFFIXES]
    if not found:
        raise BadInput(f"{folder} holds no pictures ({' '.join(SUFFIXES)}): add some or remove it")
    return found


def _folders(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.is_dir() and fetch.shown(path.name)]


def parts(root: Path) -> tuple[dict[str, Path], list[str]]:
    """The folders of train, test and unlabelled, or all as train; and what is not used of it."""
    tops = {path.relative_to(root).parts[0] for path in pictures(root)}
    splits = [path for path in _folders(root) if path.stem.lower() in fetch.SPLITS]
    if splits and (others := sorted(tops - {path.name for path in splits})):
        raise BadInput(f"{root} holds {others[0]} beside {splits[0].name}: is that a class? Then "
                       f"put all into {root / 'train'}. A split? Then put {others[0]} into one")
    found = fetch.splits(splits) or {"train": root}
    return found, [path.name for path in splits if path not in found.values()]


def rows(folder: Path) -> Rows:
    """A folder's pictures, each with the folder in it that is its class; None where it is flat."""
    found = pictures(folder)
    flat = [path.name for path in found if path.parent == folder]
    if flat and len(flat) < len(found):
        raise BadInput(f"{folder} holds pictures ({flat[0]}) beside folders of pictures: have all "
                       "in folders, one a class, or none")
    rows = [(path, None if flat else path.relative_to(folder).parts[0]) for path in found]
    empty = {path.name for path in _folders(folder)} - {label for _, label in rows}
    if empty and not flat:
        raise BadInput(f"{folder / min(empty)} holds no pictures: add some or remove it")
    return sorted(rows, key=lambda row: row[1] or "")


def held_out(rows: Rows) -> dict[str, list[int]]:
    """Indices of train and test: a fifth of each class, chosen by a hash of the content."""
    found, order = {"train": [], "test": []}, {}
    for i, (path, label) in enumerate(rows):
        order.setdefault(label, []).append((fetch.digest(path), i))
    for members in order.values():
        index = [i for _, i in sorted(members)]
        count = max(1, round(len(index) / 5)) if len(index) > 1 else 0
        found["test"] += index[:count]
        found["train"] += index[count:]
    return found


# ----------------------------------------------------------------------------- published data sets
# Each reader takes the data set's folder; any error means that it is not as published.


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _listed(folder: Path, names: list[str]) -> Rows:
    """Pictures by their names, which are class/picture."""
    return [(folder / name, name.split("/")[0]) for name in names]


def _aircraft(root: Path) -> Lists:
    def split(name: str) -> Rows:
        rows = [line.split(" ", 1) for line in _lines(root / f"data/images_variant_{name}.txt")]
        return [(root / f"data/images/{key}.jpg", kind) for key, kind in rows]

    return Lists(_lines(root / "data/variants.txt"), split("trainval"), split("test"))


def _cub(root: Path) -> Lists:
    def table(name: str) -> dict[str, str]:
        return dict(line.split(" ", 1) for line in _lines(root / f"{name}.txt"))

    classes, label, is_train = map(table, ("classes", "image_class_labels", "train_test_split"))
    rows = {"1": [], "0": []}
    for key, path in table("images").items():
        rows[is_train[key]].append((root / "images" / path, classes[label[key]]))
    return Lists(list(classes.values()), rows["1"], rows["0"])


def _dtd(root: Path) -> Lists:
    train, val, test = (_listed(root / "images", _lines(root / f"labels/{split}1.txt"))
                        for split in ("train", "val", "test"))
    return Lists(sorted({label for _, label in train + val}), train + val, test)


def _dogs(root: Path) -> Lists:
    from scipy.io import loadmat  # slow to import, and only two data sets need it

    def split(name: str) -> Rows:
        cells = loadmat(root / f"lists/{name}_list.mat")["file_list"]  # [N, 1]
        paths = [root / "Images" / cell.item() for cell in cells[:, 0]]
        return [(path, path.parent.name.split("-", 1)[1]) for path in paths]

    train, test = split("train"), split("test")
    kinds = sorted({path.parent.name for path, _ in train})  # by ImageNet's number
    return Lists([kind.split("-", 1)[1] for kind in kinds], train, test)


def _flower(root: Path) -> Lists:
    from scipy.io import loadmat

    def split(*parts: str) -> Rows:
        numbers = np.concatenate([ids[part][0] for part in parts])
        return [(root / f"jpg/image_{n:05d}.jpg", str(labels[n - 1])) for n in numbers]

    labels, ids = loadmat(root / "imagelabels.mat")["labels"][0], loadmat(root / "setid.mat")
    classes = [str(label + 1) for label in range(labels.max())]
    return Lists(classes, split("trnid", "valid"), split("tstid"))


def _cifar100(root: Path) -> Lists:
    def split(name: str) -> Rows:
        # a record: a byte for the coarse class, one for the fine class, three planes of 32 x 32
        records = np.fromfile(root / f"{name}.bin", np.uint8).reshape(-1, 3074)
        return [(record[2:], classes[record[1]]) for record in records]

    classes = _lines(root / "fine_label_names.txt")
    return Lists(classes, split("train"), split("test"))


READERS = {"aircraft": _aircraft, "cub": _cub, "dtd": _dtd, "dogs": _dogs, "flower": _flower,
           "cifar100": _cifar100}  # chest_xray is as one's own are
