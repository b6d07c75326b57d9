"""Images: the seven data sets, the drawn birds and one's own folders, each split one uint8 tensor.

Letters: N images, S side in pixels.
"""
import hashlib
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image
from tqdm import tqdm

from support import data, fetch, toybirds
from support.fetch import BadInput

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

Items = list[tuple[Path | np.ndarray, int | None]]  # pictures with their labels
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
VERSION = 1  # of what decode makes: one more and every cache is made anew


def decode(source: Path | np.ndarray, side: int) -> np.ndarray:
    """A file, or a record of CIFAR uint8 [3072], as uint8 [3, side, side]; BadInput if broken.

    As the authors do, the picture is squashed to a square (bilinear) and EXIF's turn is ignored.
    """
    if isinstance(source, np.ndarray):
        image = Image.fromarray(source.reshape(3, 32, 32).transpose(1, 2, 0))
    else:
        try:
            with Image.open(source) as opened:
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


def _decode_all(items: Items, side: int, title: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """uint8 [N, 3, side, side] and Long[N]; on threads, as Pillow lets go of Python's lock."""
    pixels = torch.empty(len(items), 3, side, side, dtype=torch.uint8)
    rows = pixels.numpy()

    def fill(index: int) -> None:
        rows[index] = decode(items[index][0], side)

    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")  # of odd metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        done = pool.map(fill, range(len(items)))
        for _ in tqdm(done, total=len(items), desc=title, unit="picture", disable=None):
            pass
    labels = [label for _, label in items]
    return pixels, None if None in labels else torch.tensor(labels)


def _stamp(source: Path | np.ndarray, root: Path) -> object:
    """What changes when a picture does."""
    if isinstance(source, np.ndarray):
        return hashlib.sha256(source).hexdigest()
    try:
        found = source.stat()
    except OSError as error:
        raise BadInput(f"{source} belongs to the data set but is missing: put it back (a published "
                       f"set is fetched anew once {root} is moved away)") from error
    return source.relative_to(root).as_posix(), found.st_size, found.st_mtime_ns


def _cached(title: str, key: object, make: Callable[[], tuple[torch.Tensor, torch.Tensor | None]],
            data_dir: Path) -> tuple[torch.Tensor, torch.Tensor | None, str]:
    """What make() returns, and its hash, by way of the cache."""
    def hashed() -> tuple[dict[str, torch.Tensor], dict]:
        pixels, labels = make()
        tensors = {"pixels": pixels} if labels is None else {"pixels": pixels, "labels": labels}
        content = hashlib.sha256()
        for tensor in tensors.values():
            content.update(tensor.numpy())
        return tensors, {"fingerprint": content.hexdigest()}

    key = hashlib.sha256(repr((VERSION, PIL.__version__, key)).encode()).hexdigest()
    tensors, facts = data.cached(f"{title}-{key[:16]}", data_dir, hashed)
    return tensors["pixels"], tensors.get("labels"), facts["fingerprint"]


# ----------------------------------------------------------------------------- the seven data sets
# Each reader takes the data set's folder and returns classes, training and test pictures.


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _aircraft(root: Path) -> tuple[list[str], Items, Items]:
    data = root / "data"
    classes = _lines(data / "variants.txt")
    train, test = ([(data / "images" / f"{line.split(' ', 1)[0]}.jpg",
                     classes.index(line.split(" ", 1)[1]))  # a variant's name may hold blanks
                    for line in _lines(data / f"images_variant_{split}.txt")]
                   for split in ("trainval", "test"))
    return classes, train, test


def _cub(root: Path) -> tuple[list[str], Items, Items]:
    names, paths, classes, is_train = (
        dict(line.split(" ", 1) for line in _lines(root / f"{file}.txt"))
        for file in ("classes", "images", "image_class_labels", "train_test_split"))
    order = {key: label for label, key in enumerate(names)}
    train, test = ([(root / "images" / path, order[classes[key]])
                    for key, path in paths.items() if is_train[key] == split] for split in "10")
    return list(names.values()), train, test


def _chest_xray(root: Path) -> tuple[list[str], Items, Items]:
    classes = ["NORMAL", "PNEUMONIA"]
    train, test = ([(path, label) for label, name in enumerate(classes)
                    for path in _pictures(root / split / name)] for split in ("train", "test"))
    return classes, train, test


def _dtd(root: Path) -> tuple[list[str], Items, Items]:
    train, val, test = (_lines(root / "labels" / f"{split}1.txt")
                        for split in ("train", "val", "test"))
    classes = sorted({line.split("/")[0] for line in train + val})
    train, test = ([(root / "images" / line, classes.index(line.split("/")[0])) for line in lines]
                   for lines in (train + val, test))
    return classes, train, test


def _dogs(root: Path) -> tuple[list[str], Items, Items]:
    from scipy.io import loadmat  # slow to import, and only two data sets need it

    lists = [loadmat(root / "lists" / f"{split}_list.mat") for split in ("train", "test")]
    files = [[cell[0].item() for cell in part["file_list"]] for part in lists]  # folder/picture
    folders = sorted({file.split("/")[0] for file in files[0]})  # also the order of their labels
    train, test = ([(root / "Images" / file, folders.index(file.split("/")[0])) for file in part]
                   for part in files)
    return [folder.split("-", 1)[1] for folder in folders], train, test


def _flower(root: Path) -> tuple[list[str], Items, Items]:
    from scipy.io import loadmat

    labels, split = loadmat(root / "imagelabels.mat")["labels"][0], loadmat(root / "setid.mat")
    train, test = ([(root / "jpg" / f"image_{number:05d}.jpg", int(labels[number - 1]) - 1)
                    for part in parts for number in split[part][0]]
                   for parts in (("trnid", "valid"), ("tstid",)))
    return [str(label + 1) for label in range(labels.max())], train, test


def _cifar100(root: Path) -> tuple[list[str], Items, Items]:
    # a record is one byte for the coarse class, one for the fine class and three planes of 32 x 32
    train, test = ([(record[2:], int(record[1])) for record in
                    np.fromfile(root / f"{split}.bin", np.uint8).reshape(-1, 3074)]
                   for split in ("train", "test"))
    return _lines(root / "fine_label_names.txt"), train, test


OFFICIAL = {  # name: its reader, and which pictures count as training and as test
    "aircraft": (_aircraft, "images_variant_trainval.txt / images_variant_test.txt"),
    "cub": (_cub, "train_test_split.txt"),
    "chest_xray": (_chest_xray, "train / test"),
    "dtd": (_dtd, "train1.txt and val1.txt / test1.txt"),
    "dogs": (_dogs, "train_list.mat / test_list.mat"),
    "flower": (_flower, "trnid and valid / tstid of setid.mat"),
    "cifar100": (_cifar100, "train.bin / test.bin")}


# ----------------------------------------------------------------------------- one's own folders


def _pictures(folder: Path) -> list[Path]:
    """All pictures below a folder in an order that no system changes, hidden ones left out."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")
                   if path.suffix.lower() in SUFFIXES)
    return [folder / name for name in names if "/." not in f"/{name}"]


def _by_class(folder: Path) -> dict[str, list[Path]]:
    """class -> its pictures; the class is "" where the folder is flat."""
    found = {}
    for path in _pictures(folder):
        parts = path.relative_to(folder).parts
        found.setdefault(parts[0] if len(parts) > 1 else "", []).append(path)
    if "" in found and len(found) > 1:
        raise BadInput(f"{folder} holds pictures ({found[''][0].name}) beside folders of pictures: "
                       "have all in folders, one a class, or none")
    for path in sorted(folder.iterdir()) if found and "" not in found else ():
        if path.is_dir() and path.name not in found and not path.name.startswith("."):
            raise BadInput(f"{path} holds no pictures ({' '.join(SUFFIXES)}): a class needs some, "
                           "so add them or remove the folder")
    return dict(sorted(found.items()))


def _own(root: Path) -> tuple[list[str], Items, Items, str]:
    train_root, test_root = root / "train", root / "test"
    if test_root.is_dir() and not train_root.is_dir():
        raise BadInput(f"{root} has a folder test but none called train: add one")
    train = _by_class(train_root if train_root.is_dir() else root)
    test = _by_class(test_root) if test_root.is_dir() else {}
    if not train:
        raise BadInput(f"{root} holds no pictures to train on ({' '.join(SUFFIXES)})")
    for name in test:
        if name not in train:
            raise BadInput(f"{test_root} has {name or 'pictures without a class'}, which "
                           f"{train_root} lacks: the two need the same classes")
    note = "train / test" if test else "all pictures, without labels"
    if not test and "" not in train:
        note = "no folder test: a fifth of each class, chosen by a hash of the content, is held out"
        for name, paths in train.items():
            paths = sorted(paths, key=fetch.digest)
            count = max(1, round(len(paths) / 5)) if len(paths) > 1 else 0
            test[name], train[name] = paths[:count], paths[count:]
        if not any(test.values()):
            raise BadInput(f"{root} has one picture a class, so that none can be held out: add "
                           "more, or a folder test")
    classes = [name for name in train if name]
    train, test = ([(path, classes.index(name) if name else None) for name in part
                    for path in part[name]] for part in (train, test))
    return classes, train, test, note


def _shared(train: Items, test: Items) -> int:
    """How many test pictures have the very bytes of a training picture."""
    sizes = {source.stat().st_size for source, _ in train}  # few files need to be read
    alike = [source for source, _ in test if source.stat().st_size in sizes]
    sizes = {source.stat().st_size for source in alike}
    known = {fetch.digest(source) for source, _ in train if source.stat().st_size in sizes}
    return sum(fetch.digest(source) in known for source in alike)


def load(name: str, data_dir: str | Path, side: int) -> object:
    """A data set by name or one's own folder: splits uint8 [N, 3, side, side], labels Long[N].

    A folder has a subfolder for each class, train/ and test/ optional; a flat one is unlabelled. Of
    labelled pictures without test/ a fifth is held out. Decoded once, then mapped from
    data_dir/cache. Raises BadInput for what cannot be found or read.
    """
    data_dir = Path(os.path.expanduser(data_dir))
    if name == "toybirds":
        drawn = fetch.digest(Path(toybirds.__file__))  # the pictures change with that file
        parts = [_cached(f"toybirds-{split}-{side}", (drawn, split, each, side),
                         partial(toybirds.toybirds, split, each, side), data_dir)
                 for split, each in (("train", 40), ("test", 50))]
        classes, note = [str(kind + 1) for kind in range(20)], "drawn by this program"
    else:
        if name in OFFICIAL:
            root, (read, rule) = fetch.dataset(name, data_dir), OFFICIAL[name]
            note = f"{fetch.DATASETS[name][1]}; split: {rule}"
            try:
                classes, train, test = read(root)
                if not train or not test:
                    raise ValueError("a split has no pictures")
            except Exception as error:  # text, .mat and binary files fail in as many ways
                raise BadInput(f"{root} does not hold {name} as it is published ({error}): move it "
                               "away to have it fetched anew") from error
        elif os.path.isdir(os.path.expanduser(name)):
            root = Path(os.path.expanduser(name)).resolve()
            classes, train, test, note = _own(root)
        else:
            raise BadInput(f"no pictures at {name!r}: give a folder of pictures, toybirds, "
                           f"{', '.join(OFFICIAL)}")
        parts = [_cached(f"{root.name}-{split}-{side}",
                         (side, [(_stamp(source, root), label) for source, label in items]),
                         partial(_decode_all, items, side, f"{root.name} {split}"), data_dir)
                 if items else (None, None, "")
                 for split, items in (("train", train), ("test", test))]
        if name != "cifar100" and (shared := _shared(train, test)):
            note += fetch.warn(f"also among the training pictures: {shared} of {len(test)} test "
                               "pictures")
    (train, train_labels, first), (test, test_labels, second) = parts
    return data.Data(name, train, train_labels, test, test_labels, classes, "accuracy", note=note,
                fingerprint=hashlib.sha256((first + second).encode()).hexdigest())


def plain(path: str | Path, side: int) -> tuple[list[str], torch.Tensor]:
    """Names and pixels uint8 [N, 3, side, side] of a folder's pictures, or of one; no labels."""
    path = Path(path)
    found = [path] if path.is_file() else _pictures(path)
    if not found:
        raise BadInput(f"{path} holds no pictures ({' '.join(SUFFIXES)})")
    names = [file.name if file == path else file.relative_to(path).as_posix() for file in found]
    return names, _decode_all([(file, None) for file in found], side, "pictures")[0]
