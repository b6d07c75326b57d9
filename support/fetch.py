"""Files: written whole or not at all, downloaded, unpacked; the table of data sets."""
import contextlib
import difflib
import hashlib
import http.client
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
             "a443fc2f9a851aa1a7b8e4fa4af94b8459fce2c9f5a2f4dd4669cf9673a4ec58", 793579520,
             "stanford_dogs"),
        File("lists.tar", [DOGS + "lists.tar"],
             "34b47cacd9a98b5d150e084f24d29391c084c55272295ec65c85651bc35f4d6c", 481280,
             "stanford_dogs/lists")]),
    "flower": ("flowers102", "Oxford Flowers 102 (Nilsback 2008), research", [
        File("102flowers.tgz", [OXFORD + "flowers/102/102flowers.tgz"],
             "2d01ecc807db462958cfe3d92f57a8c252b4abd240eb955770201e45f783b246", 344862509,
             "flowers102"),
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

    It appears whole or not at all. Files that lie in data_dir are used as they are. Raises BadInput
    saying what to put there.
    """
    title, source, files = DATASETS[name]
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
