"""Pictures: what a folder holds, decoding and normalising; the seven sets and one's own folders.

Letters: N pictures, S side in pixels.
"""
import itertools
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from support import fetch
from support.fetch import BadInput

Items = list[tuple[Path | np.ndarray, int | None]]  # pictures with their labels
Lists = tuple[list[str], Items, Items]  # classes, training and test pictures
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
LISTS = (".txt", ".mat", ".bin")  # of CIFAR's pictures, too
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")  # some others start a program
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which MAE's weights expect


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels [..., 3, H, W] as float32 with ImageNet's mean 0 and deviation 1 per channel."""
    mean = torch.tensor(MEAN, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(STD, device=pixels.device).view(3, 1, 1)
    # in place: on a CPU new memory for every intermediate result would cost thrice the arithmetic
    return pixels.to(torch.float32, copy=True).sub_(255 * mean).div_(255 * std)


def denormalise(pictures: torch.Tensor) -> torch.Tensor:
    """The way back: uint8 pixels, clipped to what a picture can show."""
    mean = torch.tensor(MEAN, device=pictures.device).view(3, 1, 1)
    std = torch.tensor(STD, device=pictures.device).view(3, 1, 1)
    return ((pictures * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


# ----------------------------------------------------------------------------- files to pixels


def pictures(folder: Path) -> list[Path]:
    """All pictures below a folder in an order that no system changes, hidden ones left out."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")
                   if path.suffix.lower() in SUFFIXES)
    return [folder / name for name in names if "/." not in f"/{name}"]


def decode(source: Path | np.ndarray, side: int) -> np.ndarray:
    """A file, or a record of CIFAR uint8 [3072], as uint8 [3, side, side]; BadInput if broken.

    As the authors do, the picture is squashed to a square (bilinear) and EXIF's turn is ignored.
    """
    if isinstance(source, np.ndarray):
        image = Image.fromarray(source.reshape(3, 32, 32).transpose(1, 2, 0))
    else:
        try:
            with Image.open(source, formats=FORMATS) as opened:
                image = _rgb(opened)
        except Exception as error:  # Pillow raises a dozen kinds on broken files
            raise BadInput(f"{source} cannot be read as a picture ({error}): mend or remove it"
                           ) from error
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR)).transpose(2, 0, 1)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("nobody can tell which number its floating-point pixels mean by white")
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion would clip them to 8
        grey = np.asarray(image).clip(0, 65535) / 257
        image = Image.fromarray(grey.round().astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def decode_all(sources: list[Path | np.ndarray], side: int, title: str) -> torch.Tensor:
    """uint8 [N, 3, side, side]; on threads, as Pillow lets go of Python's lock."""
    pixels = torch.empty(len(sources), 3, side, side, dtype=torch.uint8)
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")  # of odd metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        done = pool.map(decode, sources, itertools.repeat(side))
        bar = tqdm(done, total=len(sources), desc=title, unit="picture", disable=None)
        for picture, row in zip(bar, pixels.numpy()):
            row[:] = picture
    return pixels


def plain(path: str | Path, side: int) -> tuple[list[str], torch.Tensor]:
    """Names and pixels uint8 [N, 3, side, side] of a folder's pictures, or of one; no labels."""
    path = Path(path)
    found = [path] if path.is_file() else pictures(path)
    if not found:
        raise BadInput(f"{path} holds no pictures ({' '.join(SUFFIXES)})")
    names = [file.name if file == path else file.relative_to(path).as_posix() for file in found]
    return names, decode_all(found, side, "pictures")


# ----------------------------------------------------------------------------- folders to lists


def state(root: Path) -> list[tuple]:
    """What differs as soon as a picture or a list of pictures does."""
    files = (path for path in root.rglob("*") if path.suffix.lower() in (*SUFFIXES, *LISTS))
    stats = ((path.relative_to(root).as_posix(), path.stat()) for path in files)
    # ctime: what writes other pixels may keep mtime
    return sorted((name, now.st_size, now.st_mtime_ns, now.st_ctime_ns) for name, now in stats)


def read(name: str, root: Path, side: int) -> tuple[dict[str, torch.Tensor], dict]:
    """An official set's or one's own pictures and labels of each split; classes, what to tell.

    One's own has a subfolder for each class, train/ and test/ optional; a flat one is unlabelled.
    BadInput for what it lacks; any error where an official set is not as published.
    """
    classes, train, test = OFFICIAL.get(name, _own)(root)
    tensors, told = {}, []
    for split, items in (("train", train), ("test", test)):
        if items:
            tensors[split] = decode_all([file for file, _ in items], side, f"{root.name} {split}")
        if items and classes:
            tensors[f"{split}_labels"] = torch.tensor([label for _, label in items])
    if name not in OFFICIAL and test and not (root / "test").is_dir():
        told = ["no folder test: a fifth of each class, by a hash of the content, is held out"]
    return tensors, {"classes": classes, "told": told}


def _own(root: Path) -> Lists:
    apart = (root / "train").is_dir() or (root / "test").is_dir()
    train, test = _by_class(root / "train" if apart else root), {}
    if (root / "test").is_dir():
        test = _by_class(root / "test")
    elif "" not in train:
        train, test = _held_out(train, root)
    if alien := [name or "pictures without a class" for name in test if name not in train]:
        raise BadInput(f"{root / 'test'} has {alien[0]}, which {root / 'train'} lacks: the two "
                       "need the same classes")
    classes = [name for name in train if name]
    return classes, _items(train, classes), _items(test, classes)


def _by_class(folder: Path) -> dict[str, list[Path]]:
    """class -> its pictures; the class is "" where the folder is flat."""
    found = {}
    for path in pictures(folder):
        parts = path.relative_to(folder).parts
        found.setdefault(parts[0] if len(parts) > 1 else "", []).append(path)
    if "" in found and len(found) > 1:
        raise BadInput(f"{folder} holds pictures ({found[''][0].name}) beside folders of pictures: "
                       "have all in folders, one a class, or none")
    below = [] if "" in found else sorted(path for path in folder.glob("[!.]*") if path.is_dir())
    for path in below if found else [folder]:
        if path.name not in found:
            raise BadInput(f"{path} holds no pictures ({' '.join(SUFFIXES)}): add some, or remove "
                           "the folder")
    return dict(sorted(found.items()))


def _held_out(found: dict[str, list[Path]], root: Path) -> tuple[dict, dict]:
    """Each class without a fifth of its pictures, chosen by a hash of the content; that fifth."""
    train, test = {}, {}
    for name, paths in found.items():
        paths = sorted(paths, key=fetch.digest)
        count = max(1, round(len(paths) / 5)) if len(paths) > 1 else 0
        test[name], train[name] = paths[:count], paths[count:]
    if not any(test.values()):
        raise BadInput(f"{root} has one picture a class, so that none can be held out: add more, "
                       "or a folder test")
    return train, test


def _items(found: dict[str, list[Path]], classes: list[str]) -> Items:
    return [(path, classes.index(name) if name else None)
            for name, paths in found.items() for path in paths]


# ----------------------------------------------------------------------------- the seven data sets
# Each reader takes the data set's folder and returns classes, training and test pictures.


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _listed(folder: Path, names: list[str], classes: list[str]) -> Items:
    """Pictures by their names, which are class/picture."""
    return [(folder / name, classes.index(name.split("/")[0])) for name in names]


def _aircraft(root: Path) -> Lists:
    def split(name: str) -> Items:
        rows = [line.split(" ", 1) for line in _lines(root / f"data/images_variant_{name}.txt")]
        return [(root / f"data/images/{key}.jpg", classes.index(kind)) for key, kind in rows]

    classes = _lines(root / "data/variants.txt")
    return classes, split("trainval"), split("test")


def _cub(root: Path) -> Lists:
    def table(name: str) -> dict[str, str]:
        return dict(line.split(" ", 1) for line in _lines(root / f"{name}.txt"))

    classes, label, is_train = map(table, ("classes", "image_class_labels", "train_test_split"))
    order, items = list(classes), {"1": [], "0": []}
    for key, path in table("images").items():
        items[is_train[key]].append((root / "images" / path, order.index(label[key])))
    return list(classes.values()), items["1"], items["0"]


def _chest_xray(root: Path) -> Lists:
    train, test = _by_class(root / "train"), _by_class(root / "test")
    return list(train), _items(train, list(train)), _items(test, list(train))


def _dtd(root: Path) -> Lists:
    train, val, test = (_lines(root / f"labels/{split}1.txt") for split in ("train", "val", "test"))
    classes, folder = sorted({name.split("/")[0] for name in train + val}), root / "images"
    return classes, _listed(folder, train + val, classes), _listed(folder, test, classes)


def _dogs(root: Path) -> Lists:
    from scipy.io import loadmat  # slow to import, and only two data sets need it

    def names(split: str) -> list[str]:
        cells = loadmat(root / f"lists/{split}_list.mat")["file_list"]  # [N, 1]
        return [cell.item() for cell in cells[:, 0]]

    train, test, folder = names("train"), names("test"), root / "Images"
    kinds = sorted({name.split("/")[0] for name in train})  # also the order of their labels
    classes = [kind.split("-", 1)[1] for kind in kinds]
    return classes, _listed(folder, train, kinds), _listed(folder, test, kinds)


def _flower(root: Path) -> Lists:
    from scipy.io import loadmat

    def split(*parts: str) -> Items:
        numbers = np.concatenate([ids[part][0] for part in parts])
        return [(root / f"jpg/image_{n:05d}.jpg", int(labels[n - 1]) - 1) for n in numbers]

    labels, ids = loadmat(root / "imagelabels.mat")["labels"][0], loadmat(root / "setid.mat")
    classes = [str(label + 1) for label in range(labels.max())]
    return classes, split("trnid", "valid"), split("tstid")


def _cifar100(root: Path) -> Lists:
    def split(name: str) -> Items:
        # a record: a byte for the coarse class, one for the fine class, three planes of 32 x 32
        records = np.fromfile(root / f"{name}.bin", np.uint8).reshape(-1, 3074)
        return [(record[2:], int(record[1])) for record in records]

    return _lines(root / "fine_label_names.txt"), split("train"), split("test")


OFFICIAL = {"aircraft": _aircraft, "cub": _cub, "chest_xray": _chest_xray, "dtd": _dtd,
            "dogs": _dogs, "flower": _flower, "cifar100": _cifar100}
