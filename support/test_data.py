"""The data layer: every layout, decoding, the cache, texts as tensors; what is refused and when."""
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from safetensors import safe_open
from safetensors.torch import load_file
from scipy.io import savemat
from tokenizers import Tokenizer, normalizers
from torch import nn

import distill
import mae
import mlm
from support import data, fetch, images, program, texts, toybirds
from support.draws import generator
from support.fetch import BadInput
from support.settings import Config

TOKENIZER = Tokenizer.from_file(str(fetch.ROOT / "weights/tokenizer.json"))


def load(name, data_dir, size=8, tokenizer=TOKENIZER, **flags):
    """A data set as a model of pictures of this side, or of texts of this length, takes it."""
    config = Config(dataset=str(name), data_dir=str(data_dir), **flags)
    sizes = SimpleNamespace(image_size=size, max_length=size)
    return data.load(config, SimpleNamespace(
        modality=config.modality, tokenizer=tokenizer, config=sizes))


def make(root, files):
    """Make files of a name and a content: a grey for a picture, text, bytes or a .mat's arrays."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, int):
            Image.new("L", (6, 4), content).save(path, quality=100)  # as JPEG exact, too
        elif isinstance(content, dict):
            savemat(path, content)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def greys(root, **counts):
    """train_a=3: pictures of the greys 0, 1, 2 in train/a; the next folder's begin at 20, …"""
    for first, (name, count) in enumerate(counts.items()):
        (root / name.replace("_", "/")).mkdir(parents=True, exist_ok=True)
        make(root / name.replace("_", "/"), {f"{i}.bmp": 20 * first + i for i in range(count)})
    return root


def values(pixels):
    """The greys that pictures were made of; those of no split."""
    if pixels is None:
        return []
    assert pixels.dtype == torch.uint8 and (pixels == pixels[:, :1, :1, :1]).all()
    return pixels[:, 0, 0, 0].tolist()


def jsonl(*rows):
    """The lines of a file of (text, label)s; without the label where that is None."""
    lines = [{"text": text} | ({} if label is None else {"label": label}) for text, label in rows]
    return "".join(json.dumps(line) + "\n" for line in lines)


def words(split):
    """The texts that token ids stand for."""
    return [TOKENIZER.decode(split[torch.tensor([i])][0].tolist()) for i in range(len(split))]


# ----------------------------------------------------------------------------- decoding

HOLED = Image.new("RGB", (6, 4), (200, 30, 60))
HOLED.info["transparency"] = (200, 30, 60)


@pytest.mark.parametrize("name, image, colour", [
    ("x.jpg", Image.new("L", (6, 4), 77), (77, 77, 77)),
    ("x.png", Image.new("RGBA", (6, 4), (0, 0, 0, 51)), (204, 204, 204)),  # 1/5 of black on white
    ("x.png", HOLED, (255, 255, 255)),
    ("x.tif", Image.new("CMYK", (6, 4), (0, 255, 255, 0)), (255, 0, 0)),
    ("x.png", Image.fromarray(np.full((4, 6), 200 * 257, np.uint16)), (200, 200, 200)),
    ("x.webp", Image.new("1", (6, 4), 1), (255, 255, 255)),
    ("x.ppm", Image.new("RGB", (6, 4), (200, 30, 60)), (200, 30, 60))])
def test_decode_shows_the_colour_of_every_mode(tmp_path, name, image, colour):
    image.save(tmp_path / name)
    for source in (tmp_path / name, image):
        pixels = images.decode(source, 8)
        assert pixels.dtype == np.uint8 and pixels.shape == (3, 8, 8)
        assert (pixels == np.array(colour).reshape(3, 1, 1)).all()


def test_decode_is_pillows_bilinear_squash_of_the_upright_picture(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    exif = image.getexif()
    exif[274] = 6  # "turn me by 90 degrees"
    image.save(tmp_path / "x.png", exif=exif)
    expected = image.rotate(-90, expand=True).resize((16, 16), Image.Resampling.BILINEAR)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 99)  # Pillow alone would refuse it as too large
    pixels = images.plain(tmp_path, 16)[1][0]
    assert (pixels.permute(1, 2, 0).numpy() == np.asarray(expected)).all()
    assert Image.MAX_IMAGE_PIXELS == 99


@pytest.mark.parametrize("name, content, said", [
    ("odd name.png", b"", "cannot identify"), ("odd name.png", "cut", "truncated"),
    ("odd name.ppm", b"P6 23000 23000 255\n", "larger than 500 megapixels"),
    ("odd name.tif", "float", "floating-point")])
def test_decode_names_what_it_cannot_read(tmp_path, name, content, said):
    path = tmp_path / name
    Image.new("F" if content == "float" else "L", (300, 300), 7).save(path)
    if content != "float":
        path.write_bytes(path.read_bytes()[:-30] if content == "cut" else content)
    with pytest.raises(BadInput, match=f"{name} cannot be read as a picture.*{said}"):
        images.plain(tmp_path, 8)


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for Ghostscript is a shell script")
def test_a_picture_starts_no_program(tmp_path, monkeypatch):
    head = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    make(tmp_path, {"x.jpg": head, "gs": f"#!/bin/sh\ntouch {tmp_path}/ran\n"})
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for formats, runs in ((images.FORMATS, False), (None, True)):  # it would, were any format read
        monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # found on an earlier PATH
        monkeypatch.setattr(images, "FORMATS", formats)
        with pytest.raises(BadInput, match="x.jpg cannot be read"):
            images.decode(tmp_path / "x.jpg", 8)
        assert (tmp_path / "ran").exists() == runs


# ----------------------------------------------------------------------------- published pictures


# ----------------------------------------------------------------------------- published pictures


def record(label, grey):
    """One of CIFAR's: the coarse class, the fine class, three planes."""
    return bytes([19, label]) + bytes([grey]) * 3072


PICTURES = {  # name: its files, classes, training greys and labels, test greys and labels
    "aircraft": ({
        "data/variants.txt": "707-320\nCessna 172\nF/A-18\n", "data/images/10.jpg": 10,
        "data/images_variant_trainval.txt": "10 707-320\n11 F/A-18\n", "data/images/11.jpg": 11,
        "data/images_variant_test.txt": "13 Cessna 172\n", "data/images/13.jpg": 13},
        ["707-320", "Cessna 172", "F/A-18"], [10, 11], [0, 2], [13], [1]),
    "cub": ({
        "classes.txt": "1 001.Auk\n5 005.Wren\n", "image_class_labels.txt": "1 1\n2 5\n3 5\n",
        "images.txt": "1 001.Auk/a.jpg\n2 005.Wren/b c.jpg\n3 005.Wren/d.jpg\n",
        "train_test_split.txt": "1 1\n2 0\n3 1\n", "images/001.Auk/a.jpg": 1,
        "images/005.Wren/b c.jpg": 2, "images/005.Wren/d.jpg": 3},
        ["001.Auk", "005.Wren"], [1, 3], [0, 1], [2], [1]),
    "chest_xray": ({
        "train/NORMAL/a.jpeg": 0, "train/PNEUMONIA/b.jpeg": 1, "val/NORMAL/c.jpg": 2,
        "test/PNEUMONIA/d.jpg": 3, "test/NORMAL/e.jpeg": 4, "train/NORMAL/._a.jpeg": b"of macOS"},
        ["NORMAL", "PNEUMONIA"], [0, 1], [0, 1], [4, 3], [0, 1]),
    "dtd": ({
        "labels/train1.txt": "dotted/x.jpg\n", "labels/val1.txt": "banded/y.jpg\n",
        "labels/test1.txt": "dotted/z.jpg\n", "labels/train2.txt": "of/another-partition.jpg\n",
        "images/dotted/x.jpg": 0, "images/banded/y.jpg": 1, "images/dotted/z.jpg": 2},
        ["banded", "dotted"], [0, 1], [1, 0], [2], [1]),
    "dogs": ({
        "lists/train_list.mat": {"file_list": np.array([["n1-Pug/a.jpg"], ["n2-Chow/b.jpg"]], "O")},
        "lists/test_list.mat": {"file_list": np.array([["n2-Chow/c.jpg"]], "O")},
        "Images/n1-Pug/a.jpg": 0, "Images/n2-Chow/b.jpg": 1, "Images/n2-Chow/c.jpg": 2},
        ["Pug", "Chow"], [0, 1], [0, 1], [2], [1]),
    "flower": ({
        "imagelabels.mat": {"labels": np.array([[2, 1, 3, 2]], np.uint8)},
        "setid.mat": {"trnid": [[4]], "valid": [[1, 2]], "tstid": [[3]]}, "jpg/image_00001.jpg": 1,
        "jpg/image_00002.jpg": 2, "jpg/image_00003.jpg": 3, "jpg/image_00004.jpg": 4},
        ["1", "2", "3"], [4, 1, 2], [1, 1, 0], [3], [2]),
    "cifar100": ({
        "fine_label_names.txt": "apple\nbee\n\n", "test.bin": record(1, 7),
        "train.bin": record(1, 5) + record(0, 6)},
        ["apple", "bee"], [5, 6], [1, 0], [7], [1])}


@pytest.mark.parametrize("name", PICTURES)
def test_published_pictures(tmp_path, name):
    files, classes, *splits = PICTURES[name]
    root = make(tmp_path / fetch.datasets()[name]["folder"], files)
    found = load(name, tmp_path)
    assert (found.name, found.classes, found.metric) == (name, classes, "accuracy")
    assert splits == [values(found.train), found.train_labels.tolist(), values(found.test),
                      found.test_labels.tolist()]
    lists = [root / file for file in files if file.endswith((".txt", ".mat", ".bin"))]
    (lists[0] if lists else root / "test").rename(tmp_path / "elsewhere")
    with pytest.raises(BadInput, match=f"does not hold {name} as it is published.*fetched anew"):
        load(name, tmp_path)


@pytest.mark.parametrize("name, damage", [
    ("cifar100", {"test.bin": record(200, 7)}), ("cifar100", {"test.bin": b""}),
    ("flower", {"imagelabels.mat": {"labels": np.array([[2, 0, 3, 2]], np.uint8)}})])
def test_labels_out_of_range_and_empty_splits_are_refused(tmp_path, name, damage):
    make(tmp_path / fetch.datasets()[name]["folder"], PICTURES[name][0] | damage)
    with pytest.raises(BadInput, match=f"does not hold {name} as it is published"):
        load(name, tmp_path)


def test_cifars_records_stay_small_until_they_are_in_a_batch(tmp_path):
    planes = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
    records = b"".join(bytes([19, i]) + picture.tobytes() for i, picture in enumerate(planes))
    make(tmp_path / "cifar-100-binary", PICTURES["cifar100"][0] | {"train.bin": records})
    found = load("cifar100", tmp_path, 224).train
    assert (found.pixels.numpy() == planes).all()
    for i in range(len(found)):
        image = Image.fromarray(planes[i].transpose(1, 2, 0))
        expected = np.asarray(image.resize((224, 224), Image.Resampling.BILINEAR))
        pixels = found[torch.tensor([i])][0].permute(1, 2, 0).numpy()
        # Pillow rounds to whole values after each of two passes, so that one is in doubt
        assert np.abs(pixels.astype(int) - expected).max() <= 1
    assert all(path.stat().st_size < 20_000 for path in (tmp_path / "cache").iterdir())


# ----------------------------------------------------------------------------- one's own pictures


@pytest.mark.parametrize("counts, classes, train, test, told", [
    (dict(train_a=1, train_b=2, test_b=1), "ab", [0, 20, 21], [40], None),
    (dict(Train_b=1, Train_a=2, VAL_a=1), "ab", [20, 21, 0], [40], None),
    (dict(training_a=1, training_b=1, TEST_a_x=1, dev_a=1), "ab", [0, 20], [40], "not used: dev"),
    (dict(train=2, testing=1, unlabeled=1), "", [0, 1], [20], None),
    ({"": 2}, "", [0, 1], [], None), (dict(train=2), "", [0, 1], [], None)])
def test_own_folders(tmp_path, capsys, counts, classes, train, test, told):
    found = load(greys(tmp_path / "set", **counts), tmp_path)
    assert (values(found.train), values(found.test)) == (train, test)
    assert found.classes == list(classes) and found.labelled == (classes != "")
    of_class = {grey: classes.index(name.split("_")[1]) for first, name in enumerate(counts)
                if classes for grey in range(20 * first, 20 * first + 20)}
    for labels, split in ((found.train_labels, train), (found.test_labels, test)):
        assert labels is None if not classes else labels.tolist() == [of_class[x] for x in split]
    assert capsys.readouterr().out == (f"NOTE: {told}\n" if told else "")


def test_own_folder_with_odd_names_and_other_files(tmp_path, capsys):
    names = sorted(["it's", "naïve 鳥", *(['say "hi"\n', " blank"] if os.name != "nt" else [])])
    for label, name in enumerate(names):
        make(tmp_path, {f"set/train/{name}/a.PNG": label, f"set/test/{name}/deep/c.png": label,
                        f"set/train/{name}/b.heic": "x", f"set/train/{name}/b.jfif": "x"})
    make(tmp_path, {"set/train/.hidden/x.png": 1, "set/__MACOSX/train/._a.png": "no picture"})
    found = load(tmp_path / "set", tmp_path)
    assert found.classes == names
    assert found.test_labels.tolist() == values(found.test) == values(found.train) == [*range(
        len(names))]
    assert f"NOTE: not used: {len(names)} .heic, {len(names)} .jfif\n" in capsys.readouterr().out


def test_own_folder_without_test_holds_a_fifth_out_by_content(tmp_path):
    root = greys(tmp_path / "set", a=10, b=5, c=2, d=1)
    first = load(root, tmp_path)
    assert first.test_labels.tolist() == [0, 0, 1, 2] and "a fifth of each class" in first.note
    assert first.train_labels.tolist() == [0] * 8 + [1] * 4 + [2, 3]
    assert not set(values(first.test)) & set(values(first.train))
    for index, path in enumerate(sorted(root.rglob("*.bmp"), reverse=True)):
        path.rename(path.with_name(f"new{index:02}.BMP"))
    assert sorted(values(load(root, tmp_path).test)) == sorted(values(first.test))


@pytest.mark.parametrize("said, counts", [
    ("set.test holds no pictures", dict(train_a=6, train_b=6, test=0)),
    ("set.test holds no pictures", dict(train_a=6, train_b=6, test_a=0)),
    ("train.b holds no pictures", dict(train_a=6, train_b=0, test_a=1)),
    ("test has no train beside it", dict(test_a=1, val_a=1)), ("set holds no pictures", dict(x=0)),
    ("set holds bus beside train: is that a class", dict(train=3, car=3, bus=3)),
    ("set.val is beside dev, the same split", dict(train_a=1, dev_a=1, val_a=1)),
    ("beside folders of pictures", dict(train_a=1, train=1)),
    ("test split has the label 'c', but the classes are a", dict(train_a=1, train_b=1, test_c=1)),
    ("test split has the label None, but", dict(train_a=1, train_b=1, test=1)),
    ("too few of each class", dict(a=1, b=1)), ("one class, 'a'", dict(a=6))])
def test_own_folder_in_a_mess_says_what_to_do(tmp_path, said, counts):
    with pytest.raises(BadInput, match=said):
        load(greys(tmp_path / "set", **counts), tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_a_link_to_nothing_is_named(tmp_path):
    make(tmp_path, {"pictures/a.png": 1, "texts/train.csv": "text\na\n"})
    for name in ("pictures/b.png", "texts/test.csv"):
        (tmp_path / name).symlink_to(tmp_path / "gone")
        with pytest.raises(BadInput, match=f"{name} is a link to what is not there"):
            load((tmp_path / name).parent, tmp_path)


def test_pictures_are_decoded_once(tmp_path, monkeypatch):
    root = greys(tmp_path / "set", train_a=5, train_b=1, test_a=2)
    first = load(root, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(images, "decode", None)
        again = load(root, tmp_path)
    assert values(again.train) == values(first.train) and again.fingerprint == first.fingerprint
    again.train.zero_()  # memory of its own: the file stays as it is
    assert values(load(root, tmp_path).train) == values(first.train)
    assert load(root, tmp_path, 4).train.shape[-1] == 4
    path = root / "train/a/0.bmp"  # other pixels, but as long and as old
    before = path.stat()
    make(root, {"train/a/0.bmp": 99})
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    changed = load(root, tmp_path)
    assert values(changed.train)[0] == 99 and changed.fingerprint != first.fingerprint
    (root / "train/a/4.bmp").rename(root / "train/b/+.bmp")  # the next class's first
    moved = load(root, tmp_path)
    assert torch.equal(moved.train, changed.train) and moved.fingerprint != changed.fingerprint


def test_the_cache_is_made_anew_or_elsewhere_or_not_at_all(tmp_path, monkeypatch):
    root, (home, closed) = greys(tmp_path / "set", train=5), (tmp_path / "home", tmp_path / "file")
    load(root, tmp_path)
    (file,) = (tmp_path / "cache").iterdir()
    file.unlink()  # the old one may still be mapped
    file.write_bytes(b"noise")
    assert values(load(root, tmp_path).train) == [0, 1, 2, 3, 4] and file.stat().st_size > 900
    closed.write_text("a file, which can hold no folder")
    for place, made in ((home, True), (closed, False)):
        for name in ("HOME", "USERPROFILE"):
            monkeypatch.setenv(name, str(place))
        assert values(load(root, closed).train) == [0, 1, 2, 3, 4]
        assert (place / ".cache/self-distillation" / file.name).exists() == made


# ----------------------------------------------------------------------------- D_u


def test_unlabelled_examples_join_the_pool_and_train_size_leaves_them(tmp_path):
    root = greys(tmp_path / "set", train_a=4, train_b=4, test_a=1, unlabelled_x=3)
    found = load(root, tmp_path, train_size=2)
    assert (len(found.train), values(found.unlabelled)) == (2, [60, 61, 62])
    assert values(found.pool) == values(found.train) + [60, 61, 62]
    make(tmp_path / "texts", {"train.jsonl": jsonl(*[(f"a {i}", "ab"[i % 2]) for i in range(6)]),
                              "test.csv": "text,label\nb,a\n", "Unlabelled.txt": "c d\n\ne\n"})
    found = load(tmp_path / "texts", tmp_path, 20, train_size=4)
    assert (len(found.train), words(found.unlabelled)) == (4, ["c d", "e"])
    assert words(found.pool) == words(found.train) + ["c d", "e"]


def test_further_pretraining_sees_the_unlabelled_and_fine_tuning_does_not(
        tmp_path, monkeypatch, capsys):
    made = []
    for shade in (60, 200):
        root, out = tmp_path / f"{shade}/set", tmp_path / f"{shade}/run"
        greys(root, train_a=6, train_b=6, test_a=4, test_b=4)
        make(root, {f"unlabelled/{i}.bmp": shade + i for i in range(9)})
        monkeypatch.setattr("sys.argv", f"distill.py --smoke --rounds 0 --init tiny --dataset "
                            f"{root} --data-dir {tmp_path} --out {out}".split())
        distill.main()
        assert "12 training, 9 unlabelled and 8 test pictures" in capsys.readouterr().out
        with safe_open(out / "further.safetensors", "pt") as file:
            told = file.metadata()["n_unlabelled"]
        results, config = (json.loads((out / name).read_text(encoding="utf-8"))
                           for name in ("results.json", "config.json"))
        assert told == "9" and results["n_unlabelled"] == config["facts"]["n_unlabelled"] == 9
        made.append([load_file(out / f"{name}.safetensors")
                     for name in ("further", "finetuned-fine-tuning")])
    for a, b, same in zip(*made, (False, True)):
        assert all(torch.equal(a[name], b[name]) for name in a) == same


def test_data_are_looked_at_before_weights(tmp_path, monkeypatch):
    root = greys(tmp_path / "set", a=6)
    monkeypatch.setattr("sys.argv", ["", "--dataset", str(root), "--init", str(tmp_path / "none")])
    with pytest.raises(BadInput, match="one class, 'a'"):
        program.start("distill", "", image=mae.MAE, text=mlm.MLM)


# ----------------------------------------------------------------------------- texts


def test_texts_batch_like_padding_by_hand():
    lengths = torch.tensor([3, 7, 2, 5, 5])
    pieces = torch.arange(10, 32, dtype=torch.int32).split(lengths.tolist())
    found = texts.Texts(torch.cat(pieces), nn.functional.pad(lengths.cumsum(0), (1, 0)), pad_id=1)
    for index in map(torch.tensor, ([0, 2], [4, 1, 1], [2], [3, 0, 4])):
        by_hand = nn.utils.rnn.pad_sequence([pieces[i].long() for i in index], True, 1)
        assert torch.equal(found[index], by_hand)
        assert torch.equal(found.take(index)[torch.arange(len(index))], by_hand)
        assert torch.equal(found.places(index)[1], by_hand == 1)
    assert len(found) == 5 and len(found.take(torch.tensor([], dtype=torch.int64))) == 0


def test_texts_are_cut_cached_and_free_of_their_folder(tmp_path, monkeypatch):
    for folder in "AB":
        make(tmp_path / folder / "scierc", {
            "train.jsonl": jsonl(*[("o x " * n, "ab"[n % 2]) for n in (1, 2, 30, 31)]),
            "dev.jsonl": "x", "test.jsonl": jsonl(("a <mask> b", "a"), ("o x ", "b"))})
    first = load("scierc", tmp_path / "A", 20)
    ids = first.train[torch.arange(4)]
    assert ids.shape == (4, 20) and ids[:, 0].eq(0).all() and ids[2:, 19].eq(2).all()
    assert first.train_labels.tolist() == [1, 0, 0, 1] and first.metric == "macro_f1"
    assert words(first.test)[0] == "a <mask> b"  # its letters, not the token
    for told in ("not used: dev.jsonl", "longer than 20 tokens and cut: 2 of 4 train texts",
                 "also to be learnt from: 1 of 2 test examples"):
        assert told in first.note
    shutil.copytree(tmp_path / "A/cache", tmp_path / "B/cache")
    with monkeypatch.context() as patch:
        patch.setattr(texts, "tokenise", None)
        again = load("scierc", tmp_path / "B", 20)
    assert torch.equal(again.train.ids, first.train.ids)
    assert (again.fingerprint, again.note) == (first.fingerprint, first.note)
    make(tmp_path / "B/scierc", {"train.jsonl": jsonl(("o x", "a"), ("y", "b"))})
    assert load("scierc", tmp_path / "B", 20).fingerprint != first.fingerprint
    with pytest.raises(BadInput, match="no tokenizer.json beside them"):
        load("scierc", tmp_path / "B", 20, None)


def test_one_file_is_divided_and_equal_texts_stay_together(tmp_path):
    rows = [(f"text number {i // 2}", "xyz"[i // 2 % 3]) for i in range(120)]
    found = load(make(tmp_path, {"a.jsonl": jsonl(*rows)}) / "a.jsonl", tmp_path, 64)
    train, test = (set(words(split)) for split in (found.train, found.test))
    assert (len(found.train), len(found.test), found.classes) == (96, 24, ["x", "y", "z"])
    assert not train & test and train | test == {text for text, _ in rows}
    assert found.test_labels.bincount().tolist() == [8, 8, 8]
    index = texts.held_out([(str(i), "x") for i in range(100, 200)])
    assert max(index["train"]) > min(index["test"])  # by a hash, not by the alphabet


@pytest.mark.parametrize("name, content, labels", [
    ("train.csv", 'label,text\r\nx,"a, b\r\n""c"""\r\ny,d\r\n', ["x", "y"]),
    ("TRAIN.tsv", 'text\tlabel\n"a, b\n""c"""\t1\nd\t0\n', ["1", "0"]),
    ("Training.JSONL", jsonl(('a, b\n"c"', True), ("d", False)), ["True", "False"]),
    ("train.jsonl", jsonl(('a, b\n"c"', 0), ("d", 7)), ["0", "7"]),
    ("x.txt", 'a, b "c"\n \nd', None)])
def test_own_texts_of_every_kind(tmp_path, name, content, labels):
    rest = {"Valid.csv": f"text,label\nd,{labels[1]}\n"} if labels else {}
    found = load(make(tmp_path / "set", {name: content} | rest), tmp_path, 20)
    assert [text.split() for text in words(found.train)] == [["a,", "b", '"c"'], ["d"]]
    assert found.labelled == (labels is not None) and ("no labels" in found.note) == (not labels)
    assert labels is None or labels == [found.classes[i] for i in found.train_labels]


def test_other_keys_are_found_by_name(tmp_path, capsys):
    rows = [{"sentence": f"a {i}", "class": i % 2, "id": i} for i in range(20)]
    root = make(tmp_path, {"a.jsonl": "\n".join(map(json.dumps, rows))}) / "a.jsonl"
    assert load(root, tmp_path, 20, text_key="sentence", label_key="class").classes == ["0", "1"]
    assert load(root, tmp_path, 20, text_key="sentence").classes == []
    assert "no labels (--label-key): a.jsonl has sentence, class, id" in capsys.readouterr().out
    with pytest.raises(BadInput, match=r'no "text" .*--text-key.*it has sentence, class, id'):
        load(root, tmp_path, 20)


def test_tweets_by_line(tmp_path):
    files = {"mapping.txt": "0\tanger\n1\tjoy\n", "train_text.txt": "one\u2028line\ntwo\n",
             "train_labels.txt": "1\n0\n", "test_text.txt": "three\n", "test_labels.txt": "1\n"}
    make(tmp_path / "twitter_emotion", files)
    found = load("twitter_emotion", tmp_path, 64)
    assert words(found.train) == ["one\u2028line", "two"] and found.classes[1] == "joy"
    assert (found.train_labels.tolist(), found.test_labels.tolist()) == ([1, 0], [1])
    make(tmp_path / "twitter_emotion", {"test_labels.txt": "1\n0\n"})
    with pytest.raises(BadInput, match="does not hold twitter_emotion as it is published"):
        load("twitter_emotion", tmp_path, 64)


def test_pydocs(tmp_path):
    found = load("pydocs", tmp_path, 4000)
    train, test = (words(split) for split in (found.train, found.test))
    assert not set(train) & set(test) and len(train) > 1000
    assert found.test_labels.unique().tolist() == list(range(len(found.classes)))
    labels = found.train_labels.tolist() + found.test_labels.tolist()
    for text, label in zip(train + test, labels):
        plain = "".join(c if c.isascii() and c.isalnum() else " " for c in text.lower()).split()
        assert found.classes[label] not in plain and len(text.split()) >= 5


@pytest.mark.parametrize("said, train, test", [
    ("train.jsonl, line 2: not JSON", b'{"text": "a"}\n{"text": \n', None),
    ('line 1: no "text"', '{"txt": "a"}\n', None), ("line 1: no", '{"text": " "}\n', None),
    ('line 1: "label" is 3.5', jsonl(("a", 3.5)), None), ("a JSON array", "[\n{}]\n", None),
    ("line 2: some lines have a label", jsonl(("a", "x"), ("b", None)), None),
    ("train.jsonl is not UTF-8", b'{"text": "caf\xe9"}\n', None), ("no texts", "\n", None),
    ("label 'y', but the classes are x, z", jsonl(("a", "x"), ("b", "z")), jsonl(("c", "y"))),
    ("has the label None, but", jsonl(("a", "x"), ("b", "z")), jsonl(("c", None))),
    ("has the label 'x', but the classes are none", jsonl(("a", None)), jsonl(("c", "x"))),
    ("one class, 'x'", jsonl(*[(str(i), "x") for i in range(9)]), None),
    ("too few of each class", jsonl(("a", "x"), ("b", "y")), None),
    ("finds nothing in '99'", jsonl(("a", None), ("99", None)), None)])
def test_texts_in_a_mess_say_what_to_do(tmp_path, said, train, test):
    tokenizer = Tokenizer.from_str(TOKENIZER.to_str())
    tokenizer.normalizer = normalizers.Replace("9", "")
    make(tmp_path / "set", {"train.jsonl": train} | ({"test.jsonl": test} if test else {}))
    with pytest.raises(BadInput, match=said):
        load(tmp_path / "set", tmp_path, 64, tokenizer)


def test_toybirds_are_always_the_same_and_siblings_differ():
    kinds = toybirds.toybird_species()
    for i, one in enumerate(kinds):
        for other in kinds[i // 4 * 4:i]:  # of one family
            assert one[7:] == other[7:] and sum(a != b for a, b in zip(one, other)) >= 2
    (pixels, labels), (train, _) = (toybirds.toybirds(split, 2, 24) for split in ("test", "train"))
    assert pixels.shape == (40, 3, 24, 24) and labels.tolist() == [i // 2 for i in range(40)]
    assert torch.equal(pixels, toybirds.toybirds("test", 2, 24)[0])
    assert len(torch.cat([pixels, train]).flatten(1).unique(dim=0)) == 80


def test_load_cuts_classes_alike_before_it_decodes(tmp_path):
    root = greys(tmp_path / "set", train_a=19, train_b=70, test_a=19, test_b=70)
    full, prints = load(root, tmp_path), set()
    for flags, sizes in (
            ({}, [19, 70, 89]), (dict(train_size=45), [19, 26, 89]),
            (dict(train_size=12), [6, 6, 89]), (dict(train_size=12, seed=1), [6, 6, 89]),
            (dict(smoke=True), [19, 61, 64])):
        found = load(root, tmp_path, **flags)
        assert found.train_labels.bincount().tolist() + [len(found.test)] == sizes
        assert found.train_labels.tolist() == [grey >= 20 for grey in values(found.train)]
        assert found.test_labels.tolist() == [grey >= 60 for grey in values(found.test)]
        prints.add(found.fingerprint)
    assert len(prints) == 5
    for size, said in ((90, "is 90, but .* has 89 training"), (1, "1 is less than the 2 classes")):
        with pytest.raises(BadInput, match=f"--train-size {said}"):
            load(root, tmp_path, train_size=size)
    assert len(load(root / "train/a", tmp_path, train_size=7).train) == 7  # without labels
    chosen = data.balanced(full.train_labels, 89, 12, generator(2, "subset"))
    expected = full.train[chosen].clone()
    for i, (path, _) in enumerate(images.rows(root / "train")):
        if i not in chosen:
            path.write_bytes(b"no picture")
    assert torch.equal(load(root, tmp_path, train_size=12, seed=2).train, expected)


def test_plain_inputs_to_predict(tmp_path):
    make(tmp_path, {"set/b/x.png": 9, "set/a.png": 5, "x.txt": "one\n\ntwo\n",
                    "x.jsonl": jsonl(("one", "a label"), ("two", "x")), "x.csv": "text\none\ntwo"})
    names, pixels = images.plain(tmp_path / "set", 8)
    assert names == ["a.png", "b/x.png"] and values(pixels) == [5, 9]
    assert images.plain(tmp_path / "set/a.png", 8)[0] == ["a.png"]
    for file in ("x.txt", "x.jsonl", "x.csv"):
        names, found = texts.plain(tmp_path / file, TOKENIZER, 20)
        assert names == words(found) == ["one", "two"]


@pytest.mark.skipif("REAL_DATA" not in os.environ, reason="REAL_DATA names no real data")
@pytest.mark.parametrize("name, train, test, classes", [
    ("cub", 1500, 1389, 50), ("flower", 2040, 6149, 102), ("chest_xray", 1200, 624, 2),
    ("dtd", 800, 400, 10), ("dogs", 1200, 600, 120), ("cifar100", 1000, 500, 100),
    ("chemprot", 4169, 3469, 13), ("acl_arc", 1688, 139, 6), ("scierc", 3219, 974, 7),
    ("twitter_emotion", 3257, 1421, 4), ("aircraft", 6667, 3333, 100)])
def test_real_data(tmp_path, name, train, test, classes):
    folder = fetch.datasets()[name]["folder"]
    (tmp_path / folder).symlink_to(Path(os.environ["REAL_DATA"]).resolve() / folder)
    found = data.look(Config(dataset=name, data_dir=str(tmp_path)))
    assert (len(found.train), len(found.test), len(found.classes)) == (train, test, classes)
    assert {label for _, label in found.train} == set(found.classes)
    if name != "aircraft":  # of which there are only the lists
        assert len(load(name, tmp_path, 16).train) == train
