"""Where a name leads, what a file holds, and other people's names: golden/ in ours and back."""
import json
import shlex
import shutil
import sys
from dataclasses import asdict

import pytest
import torch
from huggingface_hub import constants
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mae
import mlm
from support import weights
from support.fetch import ROOT, BadInput

TENSORS = {"a": torch.arange(6.).view(2, 3), "b": torch.ones(2)}
VIT, ROBERTA = ROOT / "golden" / "vit_mae.safetensors", ROOT / "golden" / "roberta.safetensors"


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_find_tiny_a_file_and_a_folder(tmp_path):
    assert weights.find("tiny", "image") == ROOT / "weights" / "tiny-mae.safetensors"
    first, second, third = (tmp_path / f"{name}.safetensors" for name in ("a", "b", "model"))
    save_file(TENSORS, first)
    assert weights.find(first, "image") == weights.find(str(tmp_path), "text") == first
    save_file(TENSORS, second)
    with pytest.raises(BadInput, match="holds a.safetensors, b.safetensors: name one of them"):
        weights.find(tmp_path, "image")
    save_file(TENSORS, third)
    assert weights.find(tmp_path, "image") == third


def test_find_refuses_a_pickle_with_a_command_that_converts_it(tmp_path, monkeypatch):
    torch.save({"model": TENSORS}, tmp_path / "mae_pretrain_vit_base.pth")
    for source in (tmp_path, tmp_path / "mae_pretrain_vit_base.pth"):
        with pytest.raises(BadInput, match="pickle.*convert it with") as error:
            weights.find(source, "image")
    python, dash_c, code, *arguments = shlex.split(str(error.value).split("convert it with ")[1])
    monkeypatch.setattr(sys, "argv", [dash_c, *arguments])
    exec(code)
    assert same(load_file(weights.find(tmp_path, "image")), TENSORS)


@pytest.mark.parametrize("source, near", [
    ("tinny", r"did you mean tiny\?"), ("a/b/c", "hub id"), ("../x/y", "hub id"), ("", "tiny"),
    ("facebook/vit-mae-base/", r"did you mean facebook/vit-mae-base\?")])
def test_find_says_what_a_name_may_be(source, near):
    with pytest.raises(BadInput, match=f"no weights at '{source}'.*{near}.*vit-mae-base"):
        weights.find(source, "image")


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_hubs_cache_serves_without_a_network(tmp_path, monkeypatch, file):
    """Also where nothing may be written into it; what it lacks is said in one sentence."""
    snapshot = tmp_path / "models--me--mine" / "snapshots" / "0123456789abcdef"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--me--mine" / "refs").mkdir()
    (tmp_path / "models--me--mine" / "refs" / "main").write_text(snapshot.name)
    shutil.copy(VIT.with_suffix(".config.json"), snapshot / "config.json")
    if file.endswith("bin"):
        torch.save(load_file(VIT), snapshot / file)
    else:
        shutil.copy(VIT, snapshot / file)
    snapshot.chmod(0o555)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    found, expected = mae.MAE.from_pretrained("me/mine"), mae.MAE.from_pretrained(VIT)
    assert same(found.state_dict(), expected.state_dict()) and found.config == expected.config
    with pytest.raises(BadInput, match="^'me/other' is no .*put model.safetensors.*--init tiny`$"):
        weights.find("me/other", "image")


def test_what_is_written_is_read(tmp_path):
    """Tensors, their configuration and their lineage, whose names may be of any bytes."""
    path, config = tmp_path / "a.safetensors", {"width": 3, "sizes": [1, 2]}
    tensors = TENSORS | {"transposed": TENSORS["a"].t()}
    weights.write(tensors, path, config, init="odd \udcff")
    found, described = weights.read(path)
    assert same(found, tensors) and described == config
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"config": json.dumps(config), "init": r"odd \udcff"}
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_configuration_may_lie_beside(tmp_path):
    """One with the file's own name comes before config.json; a broken one is named."""
    path = tmp_path / "a.safetensors"
    save_file(TENSORS, path)
    assert weights.read(path)[1] == {}
    for name in ("config.json", "a.config.json"):
        (tmp_path / name).write_text(json.dumps({"from": name}))
        assert weights.read(path)[1] == {"from": name}
    for name in ("a.config.json", "a.safetensors"):
        (tmp_path / name).write_text("{")
        with pytest.raises(BadInput, match="a.safetensors or its config.json cannot be read"):
            weights.read(path)


def published(model, names, column):
    """A model's tensors as a publisher has them: what takes the patches is a convolution there."""
    state = model.state_dict()
    if isinstance(model, mae.MAE):
        p, name = model.config.patch_size, "encoder.patch.weight"
        kernel = state[name].unflatten(1, (p, p, 3))  # [D, p, p, 3]
        state[name] = kernel.permute(0, 3, 1, 2)  # [D, 3, p, p]
    return weights.in_their_names(state, names, column)


@pytest.mark.parametrize("kind, names, golden, count", [
    (mae.MAE, mae.NAMES, VIT, 94), (mlm.MLM, mlm.NAMES, ROBERTA, 58)])
def test_published_weights_are_read_and_written_back(tmp_path, kind, names, golden, count):
    """Hugging Face's files to the last bit; facebookresearch's names lead back to the same."""
    model, path = kind.from_pretrained(golden), tmp_path / "a.safetensors"
    expected = {name.replace("decoder_encoder.layer", "decoder_layers"): tensor
                for name, tensor in load_file(golden).items()}
    assert same(published(model, names, 1), expected) and len(expected) == count
    for column in range(1, len(names[0])):
        weights.write(published(model, names, column), path, asdict(model.config))
        again = kind.from_pretrained(path)
        assert same(again.state_dict(), model.state_dict()) and again.config == model.config


@pytest.mark.parametrize("kind, golden, other", [
    (mae.MAE, VIT, ROBERTA), (mlm.MLM, ROBERTA, VIT)])
def test_weights_that_do_not_fit_are_named(tmp_path, kind, golden, other):
    """Missing, of another shape, not finite and unexpected ones at once; another kind of model."""
    tensors, described = weights.read(golden)
    gone, cut, wild = sorted(name for name in tensors if "intermediate.dense.bias" in name)[-3:]
    size = len(tensors.pop(gone))
    tensors |= {cut: tensors[cut][1:], wild: tensors[wild] / 0, "more": torch.ones(2, 3)}
    weights.write(tensors, tmp_path / "a.safetensors", described)
    with pytest.raises(BadInput) as error:
        kind.from_pretrained(tmp_path / "a.safetensors")
    told = str(error.value).partition("do not fit: ")[2].split("; ")
    assert set(told) == {f"missing {gone}", f"{cut} is [{size - 1}] for [{size}]",
                         f"{wild} holds NaN or infinite numbers", "unexpected more [2, 3]"}
    with pytest.raises(BadInput, match="no tensor is called .*is this another kind of model"):
        kind.from_pretrained(other)
