"""Files: written whole or not at all, downloaded, unpacked; the table of data sets."""
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


# ----------------------------------------------------------------------------- downloads


class File(NamedTuple):
    """A file of a data set; `name` is where under --data-dir one may put it by hand."""

    name: str
    urls: list[str]
    checksum: str  # md5 (32 digits) or sha256 (64)
    size: int | None = None
    into: str = ""  # the folder for an archive that does not bring the data set's own


def download(file: File, path: Path) -> Path:
    """Fetch a file from the first of its mirrors that delivers it, under the name `path`.

    What breaks off is resumed as long as more comes, also by a later call or from the next mirror.
    Raises BadInput with each mirror's reason.
    """
    part, reasons = path.with_name(f"{path.name}.part"), []
    kind = "md5" if len(file.checksum) == 32 else "sha256"
    for url in file.urls:
        before = -1
        while before < (have := part.stat().st_size if part.exists() else 0):
            before = have
            try:
                _append(url, part, have, file.size)
                found = digest(part, kind)
                if found == file.checksum:
                    os.replace(part, path)
                    return path
                part.unlink()
                reason = f"what came, now removed, has the {kind} {found}, expected {file.checksum}"
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
def datasets() -> dict[str, tuple[str, str, list[File]]]:
    """name: (folder under --data-dir, source and terms, files), as datasets.json has them.

    Of mirrors with other bytes the checksum picks one, so that all have the same data.
    """
    table = json.loads((ROOT / "support/datasets.json").read_text(encoding="utf-8"))
    return {name: (about["folder"], about["source"], [File(**file) for file in about["files"]])
            for name, about in table.items()}


def dataset(name: str, data_dir: str | Path) -> Path:
    """An official data set's folder under data_dir, downloaded and unpacked where it is absent.

    It appears whole or not at all. Files that lie in data_dir are used as they are. Raises BadInput
    saying what to put there.
    """
    title, source, files = datasets()[name]
    data_dir, fetched = Path(os.path.expanduser(data_dir)).absolute(), []
    if (data_dir / title).is_dir():
        return data_dir / title
    print(f"{name} is not in {data_dir}; fetching {source}", flush=True)
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{title}-", suffix=".part", dir=data_dir) as work:
            for file in files:
                here, target = data_dir / file.name, Path(work) / title / Path(file.name).name
                if file.name.endswith((".tgz", ".gz", ".tar", ".zip")):
                    if not here.exists():  # it stays for a later call to resume
                        fetched.append(download(file, here))
                    unpack(here, Path(work) / file.into)
                    continue
                target.parent.mkdir(exist_ok=True)
                if here.exists():
                    shutil.copyfile(here, target)
                else:
                    download(file, target)
            os.replace(Path(work) / title, data_dir / title)
    except (BadInput, OSError) as error:
        by_hand = ", ".join(f"{file.name} from {file.urls[0]}" for file in files)
        raise BadInput(f"{name}: {error}; put {by_hand} into {data_dir}, or give another "
                       "--data-dir, and run the same command again; what works offline is "
                       "`python distill.py`") from error
    for file in fetched:
        file.unlink(missing_ok=True)
    return data_dir / title
