"""Files that the paper takes for granted: weights by name, downloads, archives.

Nothing here runs code from a file: weights are safetensors (a hub's old `pytorch_model.bin` is
opened with `weights_only=True` and converted once), archives are unpacked member by member.
"""
import contextlib
import difflib
import hashlib
import http.client
import json
import os
import re
import shutil
import stat
import tarfile
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent


class BadInput(ValueError):
    """What the user gave cannot be used; the message is one sentence: what, where, what to do."""


def nearest(word: str, words: Iterable[str]) -> str:
    """What a misspelt word may have meant, as part of a message; "" where none is near."""
    found = difflib.get_close_matches(word, words, 1)
    return f" (did you mean {found[0]}?)" if found else ""


def warn(message: str) -> str:
    """Tell the user something about the data; returns it as the end of a data set's note."""
    print(f"NOTE: {message}", flush=True)
    return f"; {message}"


def sweep(folder: Path, pattern: str) -> None:
    """Remove what matches and is a week old: a killed process left it, nobody writes that long."""
    with contextlib.suppress(OSError):
        for left in folder.glob(pattern):
            if time.time() - left.stat().st_mtime > 7 * 24 * 3600:
                shutil.rmtree(left) if left.is_dir() else left.unlink()


@contextlib.contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A name to write `path` under, so that it appears complete and on the disk or not at all.

    OSError, which names the path, where it cannot be written.
    """
    path = Path(path)
    part = path.with_name(path.name + f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
        if os.name == "posix":  # the new name, too; Windows opens no folders
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} cannot be written ({error})") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


# ----------------------------------------------------------------------------- weights


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors of a safetensors file and its configuration.

    The configuration is the file's own metadata entry `config` (how `save_weights` writes it), else
    `<name>.config.json` or `config.json` beside the file, else `{}`.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path} is not a readable safetensors file ({error})") from error
    beside = path.with_name(f"{path.stem}.config.json")
    beside = beside if beside.exists() else path.with_name("config.json")
    where = f"the metadata of {path}" if "config" in metadata else beside
    try:
        if "config" in metadata:
            config = json.loads(metadata["config"])
        else:
            config = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where} is not JSON ({_brief(error)})") from error
    if not isinstance(config, dict):
        raise BadInput(f"{where} is no configuration: it must be names with values")
    return tensors, config


def blank(model: Callable[[object], torch.nn.Module], sizes: Callable[[], object],
          tensors: dict[str, torch.Tensor], path: Path) -> torch.nn.Module:
    """model(sizes()) without memory: a model as a file, which may be wrong, describes itself.

    sizes returns the model's configuration, a dataclass. Raises BadInput where no model with such
    tensors can have it.
    """
    most = max((tensor.numel() for tensor in tensors.values()), default=0)  # no side is longer
    try:
        config = sizes()
        for item in fields(config):
            value = getattr(config, item.name)
            kinds, high = ((int, float), 0.999) if item.type is float else ((int,), most)
            low = 0 if item.type is float or item.name.endswith(("_id", "_ids")) else 1
            for part in value if isinstance(value, tuple) else (value,):
                if type(part) not in kinds or not low <= part <= high:
                    raise BadInput(f"{path} cannot be what it says it is: {item.name} is {part!r}")
        if max(value for name, value in vars(config).items() if "depth" in name) > len(tensors):
            raise BadInput(f"{path} has fewer tensors than the layers that it says it has")
        with torch.device("meta"):
            return model(config)
    except BadInput:
        raise
    except Exception as error:  # there are as many kinds as ways to be wrong
        raise BadInput(f"{path} cannot be what it says it is ({type(error).__name__}: "
                       f"{_brief(error)})") from error


def save_weights(tensors: dict[str, torch.Tensor], config: dict, path: Path,
                 **lineage: str) -> None:
    """Write tensors with their configuration and lineage as metadata, whole or not at all."""
    with whole(path) as part:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
                  part, metadata={"config": json.dumps(config)} | {
                      name: value.encode(errors="backslashreplace").decode()  # names of any bytes
                      for name, value in lineage.items()})


def _sums(tensors: dict[str, torch.Tensor], facts: dict) -> dict[str, int]:
    """Checksums of what a cache holds: each tensor's type, shape and content, and the facts."""
    sums = {"facts": zlib.crc32(json.dumps(facts, sort_keys=True).encode())}
    for name, tensor in tensors.items():
        kind = zlib.crc32(f"{tensor.dtype} {list(tensor.shape)}".encode())
        sums[name] = zlib.crc32(tensor.contiguous().numpy(), kind)
    return sums


def cached(name: str, data_dir: str | Path,
           make: Callable[[], tuple[dict[str, torch.Tensor], dict]]
           ) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors and facts of make(), from the second time on mapped from a file.

    name has to tell all that they depend on. The file lies in data_dir/cache or, where that cannot
    be written, in the user's own cache. It is read once a start to compare its checksums: a damaged
    one, or one whose content rotted, is made anew.
    """
    folders = Path(data_dir) / "cache", Path(os.path.expanduser("~/.cache/self-distillation"))
    for folder in folders:
        for pattern in ("*.part", ".tmp*"):  # of `whole` and of safetensors
            sweep(folder, pattern)
    paths = [folder / f"{name}.safetensors" for folder in folders]
    for path in filter(os.path.exists, paths):  # Path's own raises where a folder is closed
        with contextlib.suppress(BadInput):
            tensors, kept = read_weights(path)
            if kept.get("sums") == _sums(tensors, kept.get("facts")):
                return tensors, kept["facts"]
    tensors, facts = make()
    for path in paths:
        with contextlib.suppress(OSError):
            save_weights(tensors, {"facts": facts, "sums": _sums(tensors, facts)}, path)
            return read_weights(path)[0], facts
    return tensors, facts


def translate(tensors: dict[str, torch.Tensor], table: dict[str, str | tuple[str, ...]],
              wanted: dict[str, torch.Tensor],
              dropped: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """Rename a foreign file's tensors to ours; what stays unexplained, either way, is an error.

    table: our name -> their name, or several of theirs to be stacked along the first axis.
    wanted: our names with tensors of the right shapes. dropped: their names left out on purpose.
    """
    theirs = {ours: (names,) if isinstance(names, str) else names for ours, names in table.items()}
    known = {name for names in theirs.values() for name in names} | set(dropped)
    problems = [f"missing {name} (for {ours})" for ours, names in theirs.items() for name in names
                if name not in tensors]
    problems += [f"unexpected {name} {list(tensors[name].shape)}" for name in tensors
                 if name not in known]
    found = {}
    for ours, names in theirs.items():
        if all(name in tensors for name in names):
            parts = [tensors[name] for name in names]
            try:
                found[ours] = torch.cat(parts) if len(parts) > 1 else parts[0]
            except RuntimeError:
                problems.append(f"{', '.join(names)} have shapes that do not fit together")
    for ours, tensor in found.items():
        if tensor.shape != wanted[ours].shape:
            problems.append(f"{ours} is {list(tensor.shape)}, expected {list(wanted[ours].shape)}")
        elif not tensor.is_floating_point():
            problems.append(f"{ours} holds {tensor.dtype}, expected floating-point numbers")
        elif not tensor.float().isfinite().all():
            problems.append(f"{ours} holds NaN or infinite numbers")
    if problems:
        raise BadInput(f"the weights do not fit: {'; '.join(problems)}")
    return found


# ----------------------------------------------------------------------------- weights by name

NAMES = ("tiny", "random", "facebook/vit-mae-base", "FacebookAI/roberta-base")
CONVERT = ("python -c \"import sys, torch, safetensors.torch as s; "
           "d = torch.load(sys.argv[1], weights_only=True, map_location='cpu'); "
           "s.save_file({k: v.clone() for k, v in d.get('model', d).items()}, sys.argv[2])\"")


def weights(source: str | Path, kind: str) -> Path:
    """The safetensors file that `source` means: "tiny", a .safetensors file, a folder or a hub id.

    kind: "mae" or "mlm". A hub's files come through huggingface_hub's own cache. Raises BadInput.
    """
    path = Path(os.path.expanduser(source))  # which leaves an unknown ~user as it is
    if str(source) == "tiny":
        return ROOT / "weights" / f"tiny-{kind}.safetensors"
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    found = [file for file in files if file.suffix == ".safetensors"]
    for file in found:
        if len(found) == 1 or file.name == "model.safetensors":
            return file
    if found:
        raise BadInput(f"{path} holds {', '.join(file.name for file in found)}: name one of them")
    for file in files:
        if file.suffix in (".bin", ".pth", ".pt", ".ckpt", ".pkl"):
            raise BadInput(f"{file} is a pickle, which can run code when it is opened: convert it "
                           f"with {CONVERT} {file} {file.with_name('model.safetensors')}")
    if not path.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source)):
        return _from_hub(str(source), kind)
    example = {"mae": "facebook/vit-mae-base", "mlm": "FacebookAI/roberta-base"}[kind]
    raise BadInput(f"no weights at {str(source)!r}{nearest(str(source), NAMES)}: give \"tiny\", a "
                   ".safetensors file, a folder with a model.safetensors or a hub id such as "
                   f"{example}")


def _from_hub(name: str, kind: str) -> Path:
    from huggingface_hub import hf_hub_download  # slow to import, and only hub ids need it
    from huggingface_hub.utils import EntryNotFoundError, logging

    logging.set_verbosity_error()  # it would announce each of its attempts
    reasons = []

    def get(file: str) -> Path | None:
        try:
            return Path(hf_hub_download(name, file))
        except EntryNotFoundError as error:  # the repository lacks it; or offline, not in the cache
            return reasons.append(error)

    try:
        found = get("model.safetensors") or get("pytorch_model.bin")
        if found:
            config, _ = get("config.json"), get("tokenizer.json")
            return found if found.suffix == ".safetensors" else _convert(found, config)
    except BadInput:
        raise
    except Exception as error:  # the hub's client has changed network library and errors often
        reasons.append(error)
    folder = Path("weights") / name.split("/")[1]
    raise BadInput(
        f"{name!r} is no folder here, and its model.safetensors cannot be had from the hub "
        f"({_brief(reasons[-1])}): put "
        f"https://huggingface.co/{name}/resolve/main/model.safetensors and, from there too, "
        f"config.json{' and tokenizer.json' * (kind == 'mlm')} into {folder} and "
        f"say `--init {folder}`; what works offline is `python distill.py`") from reasons[-1]


def _convert(pickle: Path, config: Path | None) -> Path:
    """A hub's pytorch_model.bin as safetensors beside it, made once."""
    path = pickle.with_suffix(".safetensors")
    if path.exists():
        return path
    try:
        tensors = torch.load(pickle, weights_only=True, map_location="cpu")
        tensors = {key: tensor.clone() for key, tensor in tensors.items()}  # tied ones come apart
    except Exception as error:  # pickle and torch raise many kinds
        raise BadInput(f"{pickle} is not opened, as it is broken or holds more than tensors "
                       f"({_brief(error)})") from error
    described = json.loads(config.read_text(encoding="utf-8")) if config else {}
    save_weights(tensors, described, path, format="pt")
    return path


def _brief(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")


# ----------------------------------------------------------------------------- downloads


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirect to https, or within a host that was asked without encryption."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        to = urllib.parse.urlsplit(newurl)
        if to.scheme != "https" and (to.scheme, to.netloc) != (req.type, req.host):
            raise BadInput(f"it redirects to {newurl}, which is not encrypted")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download(urls: list[str], path: Path, size: int | None = None, sha256: str | None = None,
             md5: str | None = None) -> Path:
    """Fetch `path` from the first of urls that delivers the whole file with the right sums.

    What breaks off is resumed, also by a later call. Raises BadInput with each url's reason.
    """
    reasons = []
    for url in urls:
        # a part for each url: one mirror's end need not fit another's beginning
        part = path.with_name(f"{path.name}.{zlib.crc32(url.encode()):08x}.part")
        stalled = 0
        while stalled < 3:  # breaks in a row that brought nothing
            before = part.stat().st_size if part.exists() else 0
            try:
                _fetch(url, part, before, size)
                _check(part, size, sha256, md5)
                os.replace(part, path)
                for other in path.parent.glob(f"{path.name}.????????.part"):
                    other.unlink()
                return path
            except BadInput as error:
                reason, stalled = error, 3
            except (OSError, http.client.HTTPException) as error:
                grew = part.exists() and part.stat().st_size > before
                final = getattr(error, "code", None) in (401, 403, 404, 410)
                reason, stalled = error, 3 if final else 0 if grew else stalled + 1
                time.sleep(stalled % 3)
        reasons.append(f"{url}: {_brief(reason)}")
    raise BadInput(f"{path.name} cannot be downloaded ({'; '.join(reasons)})")


def _fetch(url: str, part: Path, have: int, size: int | None) -> None:
    """Append what `part`, `have` bytes long, still lacks of url; OSError where that breaks off."""
    if have and have == size:
        return
    if not url.startswith(("https://", "http://")):
        raise BadInput("neither https nor http")
    headers = {"User-Agent": "self-distillation"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        opener = urllib.request.build_opener(_Redirects)
        response = opener.open(urllib.request.Request(url, headers=headers), timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing beyond `have`: all is here, or something else is
            if error.headers.get("Content-Range") == f"bytes */{have}":
                return
            part.unlink()
        raise
    with response:
        resumed, length = response.status == 206, response.headers.get("Content-Length")
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            part.unlink()
            raise OSError("it resumed at another place than asked")
        if response.headers.get_content_type() == "text/html":
            raise BadInput("it answered with a web page instead of the file")
        have = have if resumed else 0
        total = have + int(length) if length else size
        if size and total != size:
            raise BadInput(f"the file is {total} bytes long, expected {size}")
        with open(part, "ab" if resumed else "wb") as file, tqdm(
                total=total, initial=have, desc=part.name.rsplit(".", 2)[0], unit="B",
                unit_scale=True, disable=None) as bar:
            while chunk := response.read(1 << 20):
                file.write(chunk)
                bar.update(len(chunk))
    if total and part.stat().st_size < total:
        raise OSError(f"the connection broke after {part.stat().st_size} of {total} bytes")


def _check(path: Path, size: int | None, sha256: str | None, md5: str | None) -> None:
    for what, wanted in (("length", size), ("sha256", sha256), ("md5", md5)):
        if wanted:
            found = path.stat().st_size if what == "length" else digest(path, what)
            if found != wanted:
                path.unlink()
                raise BadInput(f"what came, now removed, has the {what} {found}, expected {wanted}")


def digest(path: Path, kind: str = "sha256") -> str:
    """A file's checksum in hexadecimal."""
    found = hashlib.new(kind, usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            found.update(chunk)
    return found.hexdigest()


def unpack(archive: Path, folder: Path, inner: str = "") -> None:
    """Make `folder` of the archive's folder `inner`, else of all of it, whole or not at all.

    Raises BadInput for a broken archive, and for entries that lead outside or are devices.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as work:
        root = Path(work) / "content"
        root.mkdir()
        try:
            if zipfile.is_zipfile(archive):
                with zipfile.ZipFile(archive) as file:
                    for member in file.infolist():
                        kind = stat.S_IFMT(member.external_attr >> 16)
                        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                            raise OSError(f"{member.filename!r} is a link or a device")
                        if _wanted(member.filename):
                            file.extract(member, root)
            else:
                with tarfile.open(archive) as file:
                    file.extractall(root, filter=lambda member, root: tarfile.data_filter(
                        member, root) if _wanted(member.name) else None)
            os.replace(root / inner if (root / inner).is_dir() else root, folder)
        except Exception as error:  # a broken archive may raise anything
            raise BadInput(f"{archive} cannot be unpacked ({_brief(error)})") from error


def _wanted(name: str) -> bool:
    """Whether an archive's entry is more than macOS's litter; OSError where it leads outside."""
    path = PureWindowsPath(name)  # knows / and \ alike
    if path.anchor or ".." in path.parts:  # tarfile would quietly take the anchor away
        raise OSError(f"{name!r} leads outside")
    return "__MACOSX" not in path.parts and not path.name.startswith((".DS_Store", "._"))


# ----------------------------------------------------------------------------- official data sets


class File(NamedTuple):
    """A file of a data set; `name` is where under --data-dir one may put it by hand."""

    name: str
    urls: list[str]
    checksum: str  # md5 (32 digits) or sha256 (64)
    size: int | None = None
    into: str = ""  # the folder in the data set's folder that an archive becomes


OXFORD = "https://www.robots.ox.ac.uk/~vgg/data/"
DOGS = "http://vision.stanford.edu/aditya86/ImageNetDogs/"
GIT = "https://raw.githubusercontent.com/"
SCIBERT = GIT + "allenai/scibert/06793f77d7278898159ed50da30d173cdc8fdea9/data/text_classification/"
TWEETS = GIT + "cardiffnlp/tweeteval/4fbd22cd78421f05b1ecdb4fc5725bc7a7bd8f66/datasets/emotion/"
S3 = "https://allennlp.s3-us-west-2.amazonaws.com/dont_stop_pretraining/data/"


def _jsonl(name: str, s3: str, scibert: str, *sums: str) -> list[File]:
    """train, dev and test of a set that allenai keeps on S3 and, as .txt, in scibert's git.

    The sums are git's; an S3 file that differs is passed over, so that all have the same data.
    """
    return [File(f"{name}/{split}.jsonl",
                 [f"{S3}{s3}/{split}.jsonl", f"{SCIBERT}{scibert}/{split}.txt"], checksum)
            for split, checksum in zip(("train", "dev", "test"), sums)]


DATASETS = {  # name: (folder under --data-dir, source and terms, files)
    "aircraft": ("fgvc-aircraft-2013b", "FGVC-Aircraft (Maji 2013), non-commercial research", [
        File("fgvc-aircraft-2013b.tar.gz",
             [OXFORD + "fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz"],
             "d4acdd33327262359767eeaa97a4f732")]),
    "cub": ("CUB_200_2011", "Caltech-UCSD Birds-200-2011 (Wah 2011), research", [
        File("CUB_200_2011.tgz",
             ["https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz?download=1",
              "https://s3.amazonaws.com/fast-ai-imageclas/CUB_200_2011.tgz"],
             "97eceeb196236b17998738112f37df78", 1150585339)]),
    "chest_xray": ("chest_xray", "Chest X-ray version 2 (Kermany 2018), CC BY 4.0", [
        File("ChestXRay2017.zip",
             ["https://data.mendeley.com/public-files/datasets/rscbjbr9sj/files/"
              "f12eaf6d-6023-432f-acc9-80c9d7393433/file_downloaded"],
             "13efc055629733dbab07877f8b3c9f81097840dbcdaa326a8542322c2281ce36", 1235512464)]),
    "dtd": ("dtd", "Describable Textures r1.0.1 (Cimpoi 2014), research", [
        File("dtd-r1.0.1.tar.gz", [OXFORD + "dtd/download/dtd-r1.0.1.tar.gz"],
             "e42855a52a4950a3b59612834602aa253914755c95b0cff9ead6d07395f8e205", 625239812)]),
    "dogs": ("stanford_dogs", "Stanford Dogs (Khosla 2011), pictures of ImageNet, research", [
        File("images.tar", [DOGS + "images.tar"],
             "a443fc2f9a851aa1a7b8e4fa4af94b8459fce2c9f5a2f4dd4669cf9673a4ec58", 793579520),
        File("lists.tar", [DOGS + "lists.tar"],
             "34b47cacd9a98b5d150e084f24d29391c084c55272295ec65c85651bc35f4d6c", 481280, "lists")]),
    "flower": ("flowers102", "Oxford Flowers 102 (Nilsback 2008), research", [
        File("102flowers.tgz", [OXFORD + "flowers/102/102flowers.tgz"],
             "2d01ecc807db462958cfe3d92f57a8c252b4abd240eb955770201e45f783b246", 344862509),
        File("imagelabels.mat", [OXFORD + "flowers/102/imagelabels.mat"],
             "4903e94206bac23bf772aadf06451916df56b58fc483a62db32a97b82656651d", 502),
        File("setid.mat", [OXFORD + "flowers/102/setid.mat"],
             "46b8678f91fd95d3c8f4feab80d271a6c834a1dd896fe29fd3e6ad9ce5c8dccd", 14989)]),
    "cifar100": ("cifar-100-binary", "CIFAR-100, binary version (Krizhevsky 2009), no terms", [
        File("cifar-100-binary.tar.gz",
             ["https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"],
             "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec", 168513733)]),
    "chemprot": ("chemprot", "ChemProt (Kringelum 2016), no terms given", _jsonl(
        "chemprot", "chemprot", "chemprot",
        "ab17b85c4fb869b2338d7c9617414e63f3c7225e5005920b18d9cd996f1049d8",
        "bfe8f39e5146ad4bb16b23707dade850546a305047bc666f6f6824c6a7e3df2f",
        "372249c85ffea6d9a18dc5168cf45841b3d79b03412d6c620381cfc0dd3d6d49")),
    "acl_arc": ("acl_arc", "ACL-ARC citation intents (Jurgens 2018), no terms given", _jsonl(
        "acl_arc", "citation_intent", "citation_intent",
        "58eef60d2bbfdabefc3de25191714f769db03134523ef67e87d864112c67908c",
        "bc456ac8caf40829dc2d3a44801a385ad8463c80682cbf002c19329b35812b5f",
        "749d083cc3141d54a2bf1475c02a5a1c020c664601d55fe2829bdf85f06db4bb")),
    "scierc": ("scierc", "SciERC relations (Luan 2018), no terms given", _jsonl(
        "scierc", "sciie", "sciie-relation-extraction",
        "83d395d97de2c02dcb4898af3c6e34b5f5aa19771298fbc9f69ae435fa1258fb",
        "9500a8e561f1ce50d972b8473525fe24ebae732bde653c381a4c65945965567a",
        "be4c06d2b8903783818a5e4cba08c71b954a86f00021907706f66ac3e26c58bd")),
    "twitter_emotion": ("twitter_emotion", "TweetEval emotion (Barbieri 2020), no terms given", [
        File(f"twitter_emotion/{name}.txt", [f"{TWEETS}{name}.txt"], checksum)
        for name, checksum in (
            ("train_text", "2c62f67aeb3eac1aea0e5a9c3d0f4bc337992581f3f858061786a1fb4d79d95e"),
            ("train_labels", "987e767d8679e18abdf7de37a6d2bcd0a40a296ddd704e8d515cf0e3033c8d9c"),
            ("val_text", "e2e30c86b8cbb97944d6543aedc06eace3bb275cb2f381aba787b838b4f23ca5"),
            ("val_labels", "313730630160b7e0a6b4235b800c76683f4aeeb72d094eb69646630cd5cfe338"),
            ("test_text", "7e1070f5d3e3fcece5bc73680bff9981e90d8f7b2f1009bfe7a01d059d1c6091"),
            ("test_labels", "245072348c711961785be6d395997f97cf7fcda3effeae7805664171dc75f913"),
            ("mapping", "656dea85d149716af96206ca19bec0d94e9dc6de3f5079f5c7c2a241ec76cadb"))])}


def dataset(name: str, data_dir: str | Path) -> Path:
    """An official data set's folder under data_dir, downloaded and unpacked where it is absent.

    Files that lie in data_dir are used as they are. Raises BadInput saying what to put there.
    """
    title, source, files = DATASETS[name]
    data_dir, fetched = Path(os.path.expanduser(data_dir)).absolute(), []
    sweep(data_dir, f".{title}-*")
    if (data_dir / title).is_dir():
        return data_dir / title
    print(f"{name} is not in {data_dir}; fetching {source}", flush=True)
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{title}-", dir=data_dir) as work:
            folder = Path(work) / title
            for file in files:
                here, sums = data_dir / file.name, {32: "md5", 64: "sha256"}[len(file.checksum)]
                packed = file.name.endswith((".tgz", ".gz", ".tar", ".zip"))
                target = folder / file.into if packed else folder / here.name
                target.parent.mkdir(exist_ok=True)
                if not here.exists():  # a large file stays for a later call to resume
                    fetched.append(download(file.urls, here if packed else target, file.size,
                                            **{sums: file.checksum}))
                if packed:
                    unpack(here, target, title)
                elif here.exists():
                    shutil.copyfile(here, target)
            os.replace(folder, data_dir / title)
    except BadInput as error:
        by_hand = ", ".join(f"{file.name} from {file.urls[0]}" for file in files)
        raise BadInput(f"{name}: {error}; put {by_hand} into {data_dir} and run the same command "
                       "again; what works offline is `python distill.py`") from error
    except OSError as error:
        raise BadInput(f"{name} cannot be kept in {data_dir} ({error}): make room there or give "
                       "another --data-dir") from error
    for file in fetched:
        file.unlink(missing_ok=True)
    return data_dir / title


# ----------------------------------------------------------------------------- what a data set is


@dataclass
class Data:
    """One data set, as `images.load` and `texts.load` return it.

    train, test: uint8 pixels [N, 3, S, S] or `texts.Texts`; labels: Long[N], None where unlabelled.
    metric: how §5 scores it. fingerprint: hash of the content. note: where it came from, one line.
    """

    name: str
    train: object
    train_labels: torch.Tensor | None
    test: object | None
    test_labels: torch.Tensor | None
    classes: list[str]
    metric: str
    fingerprint: str
    note: str
