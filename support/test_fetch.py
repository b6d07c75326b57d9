"""Whole files, downloads from a server on this machine, archives, data sets put together."""
import hashlib
import http.server
import os
import stat
import tarfile
import threading
import zipfile
from contextlib import suppress

import pytest
from safetensors.torch import save_file
from torch import ones

from support import fetch
from support.fetch import BadInput

CONTENT = bytes(range(256)) * 1000
HALF, SUM = len(CONTENT) // 2, hashlib.sha256(b"x").hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.files, /file in ranges; server.broken: where the next answers break off."""

    def do_GET(self):
        body, asked = self.server.files.get(self.path), self.headers["Range"]
        self.server.asked.append(asked)
        first = int(asked[6:-1]) if asked and self.path == "/file" else 0
        if body is None or first >= len(body):
            return self.send_error(404 if body is None else 416)
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(body) - first))
        self.send_header("Content-Type", "text/html" if self.path == "/page" else "image/png")
        self.end_headers()
        self.wfile.write(body[first:self.server.broken.pop(0) if self.server.broken else None])


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked, server.broken, server.url = [], [], f"http://127.0.0.1:{server.server_port}"
        server.files = {"/file": CONTENT, "/plain": CONTENT, "/page": b"<p>sign in", "/other": b"x"}
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield server
        server.shutdown()


def get(server, path, *routes, kind="sha256", size=None):
    urls, checksum = [server.url + route for route in routes], hashlib.new(kind, CONTENT)
    fetch.download({"urls": urls, "checksum": checksum.hexdigest(), "size": size}, path)
    assert path.read_bytes() == CONTENT


def inside(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_whole_files_appear_complete_or_not_at_all(tmp_path):
    path, umask = tmp_path / "new" / "a", os.umask(0o027)
    with fetch.whole(path) as part:
        save_file({"a": ones(2)}, part)
    os.umask(umask)
    content = path.read_bytes()
    assert os.name != "posix" or stat.S_IMODE(path.stat().st_mode) == 0o640
    with pytest.raises(KeyError), fetch.whole(path) as part:
        part.write_text("half")
        raise KeyError
    assert path.read_bytes() == content and inside(tmp_path) == ["new", "new/a"]
    with pytest.raises(OSError, match="new/a/b cannot be written"), fetch.whole(path / "b"):
        pass  # a is no folder


@pytest.mark.parametrize("routes, broken, asked", [
    (["/file"], [], [None]), (["/plain"], [HALF], [None, HALF]),
    (["/file"], [HALF, HALF + 9], [None, HALF, HALF + 9]),
    (["/missing", "/file", "/page", "/file"], [HALF, HALF], [None, None, HALF, HALF, HALF])])
def test_download_resumes_as_long_as_more_comes(server, tmp_path, routes, broken, asked):
    server.broken = broken
    get(server, tmp_path / "a", *routes, kind="md5", size=len(CONTENT))
    assert server.asked == [first and f"bytes={first}-" for first in asked]
    assert inside(tmp_path) == ["a"]


def test_download_is_resumed_by_a_later_call(server, tmp_path):
    server.broken = [HALF, HALF]
    with pytest.raises(BadInput, match=f"broke after {HALF} of {len(CONTENT)} bytes"):
        get(server, tmp_path / "a", "/file")
    get(server, tmp_path / "a", "/file")
    assert server.asked[-1] == f"bytes={HALF}-"
    os.replace(tmp_path / "a", tmp_path / "a.part")  # killed just before the end
    get(server, tmp_path / "a", "/file")


@pytest.mark.parametrize("route, size, reason", [
    ("/missing", None, "HTTP Error 404: Not Found"), ("/page", None, "web page"),
    ("/other", 7, "1 bytes long, expected 7"), ("/other", None, f"sha256 {SUM}, expected")])
def test_download_refuses_and_removes_what_is_not_the_file(server, tmp_path, route, size, reason):
    with pytest.raises(BadInput, match=f"a.tgz cannot be .*{server.url}{route}: .*{reason}"):
        get(server, tmp_path / "a.tgz", route, size=size)
    assert inside(tmp_path) == []


def tar(path, name, kind=tarfile.REGTYPE, aim=""):
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, aim
        archive.addfile(member)


@pytest.mark.parametrize("name, kind, aim", [
    ("../evil", tarfile.REGTYPE, ""), ("{}/evil", tarfile.REGTYPE, ""),
    ("evil", tarfile.SYMTYPE, "/etc/passwd"), ("evil", tarfile.SYMTYPE, "../../x"),
    ("evil", tarfile.LNKTYPE, "../x"), ("evil", tarfile.CHRTYPE, ""), ("{}/evil", "zip", ""),
    ("../evil", "zip", ""), ("evil", "zip", "")])
def test_archives_stay_inside(tmp_path, name, kind, aim):
    """What leads outside is refused or made harmless; the zip's entries are links."""
    if kind == "zip":
        member = zipfile.ZipInfo(name.format(tmp_path))
        member.external_attr = (stat.S_IFLNK | 0o777) << 16
        with zipfile.ZipFile(tmp_path / "x", "w") as archive:
            archive.writestr(member, "/etc/passwd")
    else:
        tar(tmp_path / "x", name.format(tmp_path), kind, aim)
    with suppress(BadInput):
        fetch.unpack(tmp_path / "x", tmp_path / "deep" / "out")
        assert len(list(tmp_path.rglob("evil"))) == 1
    for path in tmp_path.rglob("*evil*"):
        assert "out" in path.parts and path.is_file() and not path.is_symlink()


def moved(monkeypatch, url, name, content=b"x"):
    """The files of a data set at another address, as if each had this content."""
    about, checksum = fetch.datasets()[name], hashlib.sha256(content).hexdigest()
    files = [file | {"urls": [f"{url}/{file['name']}"], "size": None, "checksum": checksum}
             for file in about["files"]]
    monkeypatch.setitem(fetch.datasets(), name, about | {"files": files})
    return files


def test_dataset_is_downloaded_and_unpacked(server, tmp_path, monkeypatch):
    tar(tmp_path / "x", "dtd/images/a.jpg")
    server.files["/dtd-r1.0.1.tar.gz"] = (tmp_path / "x").read_bytes()
    moved(monkeypatch, server.url, "dtd", (tmp_path / "x").read_bytes())
    assert fetch.dataset("dtd", tmp_path / "sets") == tmp_path / "sets" / "dtd"
    assert inside(tmp_path / "sets") == ["dtd", "dtd/images", "dtd/images/a.jpg"]


def test_dataset_is_put_together_once_and_whole(server, tmp_path, monkeypatch):
    """Two files lie there, one of them broken at first; one is not to be had at first."""
    moved(monkeypatch, server.url, "flower")
    for name in ("102flowers.tgz", "setid.mat"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(BadInput, match="102flowers.tgz cannot be unpacked"):
        fetch.dataset("flower", tmp_path)
    tar(tmp_path / "102flowers.tgz", "jpg/1.jpg")
    with pytest.raises(BadInput, match="imagelabels.mat: HTTP Error 404"):
        fetch.dataset("flower", tmp_path)
    assert inside(tmp_path) == ["102flowers.tgz", "setid.mat"]
    server.files["/imagelabels.mat"] = b"x"
    for _ in range(2):
        folder = fetch.dataset("flower", tmp_path)
    assert inside(folder) == ["imagelabels.mat", "jpg", "jpg/1.jpg", "setid.mat"]
    assert len(server.asked) == 2  # nothing the last time


@pytest.mark.parametrize("name", fetch.datasets())
def test_dataset_offline_says_what_to_put_where(tmp_path, monkeypatch, name):
    files = moved(monkeypatch, "http://127.0.0.1:9", name)  # where nothing listens
    with pytest.raises(BadInput, match="python distill.py") as error:
        fetch.dataset(name, tmp_path)
    assert "\n" not in str(error.value) and f"into {tmp_path}" in str(error.value)
    assert all(f"{file['name']} from {file['urls'][0]}" in str(error.value) for file in files)
    assert inside(tmp_path) == []
