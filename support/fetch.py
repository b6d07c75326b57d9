"""Files: written whole or not at all, listed, downloaded, unpacked."""
import contextlib
import difflib
import functools
import hashlib
import http.client
import json
import os
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent


class BadInput(ValueError):
    """What the user gave cannot be used; the message is one sentence: what, where, what to do."""


def nearest(word: str, words: Iterable[str]) -> str:
    """What a misspelt word may have meant, as part of a message; "" where none is near."""
    found = difflib.get_close_matches(word, words, 1)
    return f" (did you mean {found[0]}?)" if found else ""


def brief(error: Exception) -> str:
    """The first line of what an error says, or its kind."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")


def warn(message: str) -> str:
    """Tell the user something about the data; returns it as the end of a data set's note."""
    print(f"NOTE: {message}", flush=True)
    return f"; {message}"


@contextlib.contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A name to write `path` under, so that it appears complete or not at all.

    OSError, which names the path, where it cannot be written.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        mode = part.stat().st_mode  # the umask's; safetensors alone would make it 0600
        yield part
        part.chmod(mode)
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} cannot be written ({error})") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def digest(path: Path, kind: str = "sha256") -> str:
    """A file's checksum in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(
            file, lambda: hashlib.new(kind, usedforsecurity=False)).hexdigest()


# ----------------------------------------------------------------------------- what a folder holds

SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test",
          "unlabelled": "unlabelled", "unlabeled": "unlabelled"} | dict.fromkeys(
    ("val", "valid", "validation", "dev", "eval"), "val")


class Lists(NamedTuple):
    """A data set before it is decoded: examples as (source, class), the class None without one."""

    classes: list[str]
    train: list[tuple]
    test: list[tuple] = ()
    unlabelled: list[tuple] = ()
    told: list[str] = ()  # what the user has to know of it


def shown(name: str) -> bool:
    """Whether a file or folder is meant to be seen; macOS's __MACOSX in a .zip is not."""
    return not name.startswith(".") and name != "__MACOSX"


def files(root: Path) -> list[Path]:
    """A file, or all shown ones below a folder, in order; BadInput for a link to nothing."""
    found, seen = [root] if root.is_file() else [], set()
    for at, folders, names in os.walk(root, followlinks=True):
        new = os.path.realpath(at) not in seen  # links may lead round in circles
        seen.add(os.path.realpath(at))
        folders[:] = filter(shown, folders) if new else ()
        found += [Path(at, name) for name in names if shown(name) and new]
    if lost := [path for path in found if not path.exists()]:
        raise BadInput(f"{lost[0]} is a link to what is not there: mend or remove it")
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def splits(paths: list[Path]) -> dict[str, Path]:
    """The train, test (val without one) and unlabelled among the paths; BadInput if unclear."""
    found = {}
    for path in paths:
        if (split := SPLITS.get(path.stem.lower())) in found:
            raise BadInput(f"{path} is beside {found[split].name}, the same split: leave one")
        if split:
            found[split] = path
    if found and "train" not in found:
        raise BadInput(f"{next(iter(found.values()))} has no train beside it: add one, or name "
                       "with --dataset what is to be learnt from")
    val = found.pop("val", None)
    return ({"test": val} if val else {}) | found


# ----------------------------------------------------------------------------- downloads


def download(file: dict, path: Path) -> Path:
    """Fetch a file from the first of its urls that delivers it, under the name `path`.

    Its checksum is an md5 or a sha256. What breaks off is resumed as long as more comes, also by a
    later call or from the next mirror. Raises BadInput with each mirror's reason.
    """
    part, wanted, reasons = path.with_name(f"{path.name}.part"), file["checksum"], []
    kind = "md5" if len(wanted) == 32 else "sha256"
    for url in file["urls"]:
        before = -1
        while before < (have := part.stat().st_size if part.exists() else 0):
            before = have
            try:
                _append(url, part, have, file.get("size"))
                found = digest(part, kind)
                if found == wanted:
                    os.replace(part, path)
                    return path
                part.unlink()
                reason = f"what came, now removed, has the {kind} {found}, expected {wanted}"
            except (OSError, http.client.HTTPException) as error:
                reason = brief(error)
        reasons.append(f"{url}: {reason}")
    raise BadInput(f"{path.name} cannot be downloaded ({'; '.join(reasons)})")


def _append(url: str, part: Path, have: int, size: int | None) -> None:
    """Append what `part`, `have` bytes long, still lacks of url; OSError where that breaks off."""
    headers = {"User-Agent": "self-distillation"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing follows: the sum tells whether all is here
            return
        raise
    with response:
        if response.headers.get_content_type() == "text/html":
            raise OSError("it answered with a web page instead of the file")
        if response.status != 206:
            have = 0  # it begins anew
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else size
        if size and total != size:
            raise OSError(f"the file is {total} bytes long, expected {size}")
        with open(part, "ab" if have else "wb") as file, tqdm.wrapattr(
                file, "write", total, desc=part.stem, initial=have, disable=None) as shown:
            shutil.copyfileobj(response, shown, 1 << 20)
    if total and part.stat().st_size < total:
        raise OSError(f"the connection broke after {part.stat().st_size} of {total} bytes")


def unpack(archive: Path, folder: Path) -> None:
    """Extract an archive into a folder, and nothing outside it; BadInput where that fails."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                file.extractall(folder)  # takes .. and / from names; a link becomes a plain file
        else:
            with tarfile.open(archive) as file:
                file.extractall(folder, filter="data")
    except Exception as error:  # a broken archive may raise anything
        raise BadInput(f"{archive} cannot be unpacked ({brief(error)})") from error


# ----------------------------------------------------------------------------- official data sets


@functools.cache
def datasets() -> dict[str, dict]:
    """name: folder under --data-dir, source with its terms, and files, of datasets.json."""
    return json.loads((ROOT / "support/datasets.json").read_text(encoding="utf-8"))


def dataset(name: str, data_dir: str | Path) -> Path:
    """An official data set's folder under data_dir, downloaded and unpacked where it is absent.

    It appears whole or not at all. Files that lie in data_dir are used as they are. Raises BadInput
    saying what to put there.
    """
    title, source, wanted = datasets()[name].values()
    data_dir, fetched = Path(os.path.expanduser(data_dir)).absolute(), []
    if (data_dir / title).is_dir():
        return data_dir / title
    size = sum(file.get("size") or 0 for file in wanted) / 1e9
    print(f"{name} is not in {data_dir}; fetching {source}" + f", {size:.1f} GB" * (size > 0.1),
          flush=True)
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{title}-", suffix=".part", dir=data_dir) as work:
            for file in wanted:
                here = data_dir / file["name"]
                if here.name.endswith((".tgz", ".gz", ".tar", ".zip")):
                    if not here.exists():  # it stays for a later call to resume
                        fetched.append(download(file, here))
                    unpack(here, Path(work) / file.get("into", ""))  # most bring their folder
                    continue
                target = Path(work) / title / here.name
                target.parent.mkdir(exist_ok=True)
                if here.exists():
                    shutil.copyfile(here, target)
                else:
                    download(file, target)
            os.replace(Path(work) / title, data_dir / title)
    except (BadInput, OSError) as error:
        by_hand = ", ".join(f"{file['name']} from {file['urls'][0]}" for file in wanted)
        raise BadInput(f"{name}: {error}; put {by_hand} into {data_dir}, or give another "
                       "--data-dir, and run the same command again; what works offline is "
                       "`python distill.py`") from error
    for file in fetched:
        file.unlink(missing_ok=True)
    return data_dir / title
