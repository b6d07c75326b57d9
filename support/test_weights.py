"""Weights: where a name leads, the ways in for other people's names, and the ways out to them."""
import functools
import json
import re
import shlex
import shutil
import sys
from dataclasses import asdict, replace

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

import finetune
import mae
import mlm
from support import weights
from support.fetch import ROOT, BadInput
from support.test_helpers import GOLDEN, content, run_here, same

pytest_plugins = ["support.test_helpers"]  # its fixtures

TENSORS = {"a": torch.arange(6.).view(2, 3), "b": torch.ones(2)}
LINEAGE = {"dataset": "cub", "init": "facebook/vit-mae-base", "teacher": "None", "rounds": "1",
           "seed": "3", "match": "cls", "pixels": "norm", "stage": "distilled-1", "run": "0f0f"}
WAYS = pytest.mark.parametrize("kind, classes, names, theirs", [
    (mae.MAE, None, "huggingface", "ViTMAEForPreTraining"),
    (mae.MAE, None, "timm", "VisionTransformer"),
    (mae.MAE, "abc", "huggingface", "ViTForImageClassification"),
    (mae.MAE, "abc", "timm", "VisionTransformer"),
    (mlm.MLM, None, "huggingface", "RobertaForMaskedLM"),
    (mlm.MLM, "abc", "huggingface", "RobertaForSequenceClassification")])


def published(kind):
    """golden/ in the layouts of facebook/vit-mae-base and roberta-base, leftovers included."""
    tensors = {name.replace("decoder_encoder.layer", "decoder_layers"): tensor
               for name, tensor in load_file(GOLDEN[kind]).items()}
    if kind is mae.MAE:
        return tensors
    copied = tensors["roberta.embeddings.word_embeddings.weight"].clone()
    return tensors | {"lm_head.decoder.weight": copied, "roberta.pooler.dense.bias": torch.ones(48),
                      "lm_head.decoder.bias": tensors["lm_head.bias"].clone(),
                      "roberta.embeddings.position_ids": torch.arange(34)[None]}


def test_a_source_is_tiny_a_file_a_folder_or_a_sentence(tmp_path):
    assert weights.find("tiny", "image") == ROOT / "weights" / "tiny-mae.safetensors"
    first, second, third = (tmp_path / f"{name}.safetensors" for name in ("a", "b", "model"))
    save_file(TENSORS, first)
    assert weights.find(first, "image") == weights.find(str(tmp_path), "text") == first
    save_file(TENSORS, second)
    with pytest.raises(BadInput, match="holds a.safetensors, b.safetensors: name one of them"):
        weights.find(tmp_path, "image")
    save_file(TENSORS, third)
    assert weights.find(tmp_path, "image") == third
    for source, near in (("tinny", r" .did you mean tiny\?."), ("a/b/c", ""), ("../x/y", ""),
                         ("facebook/vit-mae-base/", " .did you mean facebook/vit-mae-base.*")):
        with pytest.raises(BadInput, match=f"no weights at '{source}'{near}: give tiny.*hub id"):
            weights.find(source, "image")


def test_find_refuses_a_pickle_with_a_command_that_converts_it(tmp_path, monkeypatch):
    torch.save({"model": TENSORS}, tmp_path / "mae_pretrain_vit_base.pth")
    for source in (tmp_path, tmp_path / "mae_pretrain_vit_base.pth"):
        with pytest.raises(BadInput, match="pickle.*convert it with") as error:
            weights.find(source, "image")
    python, dash_c, code, *arguments = shlex.split(str(error.value).split("convert it with ")[1])
    monkeypatch.setattr(sys, "argv", [dash_c, *arguments])
    exec(code)
    assert same(load_file(weights.find(tmp_path, "image")), TENSORS)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("kind", GOLDEN)
def test_a_hubs_cache_serves_without_a_network(tmp_path, monkeypatch, capsys, file, kind):
    """Published layouts, written nothing to; what the cache lacks is said in one sentence."""
    snapshot = tmp_path / "models--me--mine" / "snapshots" / "0123456789abcdef"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--me--mine" / "refs").mkdir()
    (tmp_path / "models--me--mine" / "refs" / "main").write_text(snapshot.name)
    shutil.copy(GOLDEN[kind].with_suffix(".config.json"), snapshot / "config.json")
    words = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 119}
    Tokenizer(models.WordLevel(words, "<unk>")).save(str(snapshot / "tokenizer.json"))
    write = torch.save if file.endswith("bin") else save_file
    write(published(kind), snapshot / file)
    snapshot.chmod(0o555)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    found, expected = kind.from_pretrained("me/mine"), kind.from_pretrained(GOLDEN[kind])
    assert same(found, expected) and found.config == expected.config
    told = {mae.MAE: "does not record whether its decoder predicts raw or normalised pixels",
            mlm.MLM: "roberta.embeddings.position_ids, roberta.pooler.dense.bias\n"}[kind]
    assert told in capsys.readouterr().out and sorted(tmp_path.rglob("*")) == before
    with pytest.raises(BadInput, match="^'me/other' is no .*put model.safetensors.*--init tiny`$"):
        weights.find("me/other", "image")


@pytest.mark.parametrize("kind, prefix, more", [
    (mae.MAE, "", ["pooler.dense.weight"]),  # ViTModel; ViTMAEModel has no pooler
    (mae.MAE, "vit.", ["classifier.weight", "classifier.bias"]),  # ViTForImageClassification
    (mae.MAE, "module._orig_mod.vit.", []),  # as torch's wrappers save one
    (mlm.MLM, "", ["embeddings.position_ids", "pooler.dense.bias"]),  # RobertaModel
    # RobertaForSequenceClassification
    (mlm.MLM, "roberta.", ["classifier.dense.bias", "classifier.out_proj.weight"])])
def test_encoders_of_other_models_are_read(tmp_path, capsys, kind, prefix, more):
    """What else is in the file is told, as is the fresh decoder."""
    (whole, described), path = weights.read(GOLDEN[kind]), tmp_path / "a.safetensors"
    tensors = {prefix + name.partition(".")[2]: tensor for name, tensor in whole.items()
               if name.startswith(("vit.", "roberta."))}
    tensors |= {name: torch.ones(2) for name in more}
    weights.write(tensors, path, described)
    found, told = kind.from_pretrained(path), capsys.readouterr().out
    expected = kind.from_pretrained(GOLDEN[kind])
    assert same(found.encoder, expected.encoder)
    assert found.config == expected.config and all(name in told for name in more)
    assert "encoder only: its decoder g_φ starts FRESH" in told and "pixels" not in told


def test_facebookresearchs_weights_are_read(tmp_path, capsys):
    """The encoder has timm's names; fine-tuned, it is read if it was not on the mean of patches."""
    golden, path = mae.MAE.from_pretrained(GOLDEN[mae.MAE]), tmp_path / "model.safetensors"
    golden.save_pretrained(tmp_path, "timm")
    tensors = load_file(path)
    for name, tensor in golden.decoder.state_dict().items():
        for ours, theirs in (("attention.qkv", "attn.qkv"), ("attention.out", "attn.proj"),
                             ("fc", "mlp.fc"), ("positions", "pos_embed"), ("predict", "pred")):
            name = name.replace(ours, theirs)
        tensors[name if name == "mask_token" else f"decoder_{name}"] = tensor
    save_file(tensors, path)
    sizes = asdict(golden.config)
    del sizes["eps"]  # theirs is another
    found = mae.MAE.from_pretrained(path, **sizes)
    assert same(found, golden) and found.config == replace(golden.config, eps=1e-6)
    finetune.Classifier(golden.encoder, 3).save_pretrained(tmp_path, "timm")
    assert same(mae.MAE.from_pretrained(path).encoder, golden.encoder)
    assert "head.bias, head.weight" in capsys.readouterr().out
    tensors = load_file(path)
    tensors |= {f"fc_norm.{kind}": tensors.pop(f"norm.{kind}") for kind in ("weight", "bias")}
    save_file(tensors, path)
    with pytest.raises(BadInput, match="mean over patches .fc_norm for norm.*weights before that"):
        mae.MAE.from_pretrained(path)


def test_several_files_of_half_precision_are_read(tmp_path):
    tensors = {name: tensor.half() for name, tensor in published(mae.MAE).items()}
    files = {name: f"model-{len(name) % 2}.safetensors" for name in tensors}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in files if files[name] == file}, tmp_path / file)
    (tmp_path / weights.INDEX).write_text(json.dumps({"weight_map": files}))
    shutil.copy(GOLDEN[mae.MAE].with_suffix(".config.json"), tmp_path / "config.json")
    expected = mae.MAE.from_pretrained(GOLDEN[mae.MAE]).half().float()
    assert same(mae.MAE.from_pretrained(tmp_path), expected)


def test_what_is_written_is_read(tmp_path):
    """Tensors, their lineage, which may be any bytes, and configuration: it may lie beside."""
    path, config = tmp_path / "a.safetensors", {"width": 3, "sizes": [1, 2]}
    save_file(TENSORS, path)
    assert weights.read(path)[1] == {}
    for name in ("config.json", "a.config.json"):  # the second comes first
        (tmp_path / name).write_text(json.dumps({"from": name}))
        assert weights.read(path)[1] == {"from": name}
    for name in ("a.config.json", "a.safetensors"):
        (tmp_path / name).write_text("{")
        with pytest.raises(BadInput, match="a.safetensors or its config.json cannot be read"):
            weights.read(path)
    tensors = TENSORS | {"transposed": TENSORS["a"].t()}
    weights.write(tensors, path, config, init="odd \udcff")
    found, described = weights.read(path)
    assert same(found, tensors) and described == config | {"lineage": {"init": r"odd \udcff"}}
    assert path.stat().st_mode == (tmp_path / "config.json").stat().st_mode


@pytest.mark.parametrize("kind, other", [(mae.MAE, mlm.MLM), (mlm.MLM, mae.MAE)])
def test_weights_that_do_not_fit_are_named(tmp_path, kind, other):
    """Missing, of another shape, not finite and unexpected ones at once; another kind of model."""
    tensors, described = weights.read(GOLDEN[kind])
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
        kind.from_pretrained(GOLDEN[other])


def test_a_copy_that_differs_is_refused(tmp_path):
    tensors = load_file(GOLDEN[mlm.MLM])
    tensors["lm_head.decoder.bias"] = tensors["lm_head.bias"] + 1
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(BadInput, match="lm_head.decoder.bias differs from lm_head.bias"):
        mlm.MLM.from_pretrained(tmp_path)


# ----------------------------------------------------------------------------- the ways out


def made(kind, classes=None, lineage=LINEAGE):
    """golden/'s model, in which no bias is 0 and no LayerNorm 1, or a classifier on its encoder."""
    model = kind.from_pretrained(GOLDEN[kind])
    if classes:
        model = finetune.Classifier(model.encoder, 3, classes=list(classes)).eval()
    model.lineage = lineage
    return model


@WAYS
def test_what_is_exported_has_their_names_and_comes_back(tmp_path, kind, classes, names, theirs):
    """Bits, sizes, lineage and classes; without our metadata, by config.json alone, as well."""
    model, path = made(kind, classes), tmp_path / "model.safetensors"
    model.save_pretrained(tmp_path, names)
    tensors, again = load_file(path), type(model).from_pretrained(tmp_path)
    assert again.encoder.config == model.encoder.config and again.lineage == LINEAGE
    assert getattr(again, "classes", None) == getattr(model, "classes", None)
    if classes or names == "timm":
        known = json.loads((ROOT / "golden" / "names.json").read_text())[theirs]
        head = {"head.weight", "head.bias"} if not classes else set()
        assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {
            name: shape for name, shape in known.items() if name not in head}
    else:
        more = ("roberta.pooler", "roberta.embeddings.position_ids", "lm_head.decoder")
        assert same(tensors, {name: tensor for name, tensor in published(kind).items()
                              if not name.startswith(more)})
        save_file(tensors, path)
        bare = kind.from_pretrained(tmp_path)
        assert same(bare, model) and bare.config == model.config
    if names == "timm" and not classes:  # it has no decoder
        model, again = model.encoder, again.encoder
    assert same(again, model)


def test_the_card_and_the_pixel_target_are_the_lineages(tmp_path):
    """Of each stage what it used; of weights from elsewhere that nothing is recorded."""
    for lineage, target, licence, there in (
            (LINEAGE, True, "cc-by-nc-4.0", {"match", "pixels", "rounds", "seed"}),
            (LINEAGE | {"stage": "further"}, True, "cc-by-nc-4.0", {"pixels", "seed"}),
            ({"pixels": "raw"}, False, "unknown", {"pixels"}), ({}, None, "unknown", set())):
        made(mae.MAE, lineage=lineage).save_pretrained(tmp_path)
        told = (tmp_path / "README.md").read_text(encoding="utf-8")
        assert set(re.findall(r"(?m)^- (match|pixels|rounds|seed):", told)) == there
        assert f"\nlicense: {licence}\n" in told and "0f0f" not in told
        assert ("\n- not recorded\n" in told) == (not lineage)
        assert json.loads((tmp_path / "config.json").read_text()).get("norm_pix_loss") is target


def test_a_finished_run_is_exported_by_its_command(tmp_path, finished):
    """--export writes what the run has saved, and leaves its folder as it was."""
    run_here(f"finetune.py --smoke --out {tmp_path / 'run'}")
    for program, run, saves in (
            ("finetune", tmp_path / "run", {"": "finetuned-fine-tuning"}),
            ("distill", finished, {"": "distilled-1",
                                   "classifier": "finetuned-self-distillation"})):
        before, out = content(run), tmp_path / program
        run_here(f"{program}.py --smoke --out {run} --export {out}")
        assert content(run) == before
        for folder, name in saves.items():
            kind = mae.MAE if name == "distilled-1" else finetune.Classifier
            saved = kind.from_pretrained(run / f"{name}.safetensors")
            again = kind.from_pretrained(out / folder)
            assert same(again, saved) and again.lineage == saved.lineage
    with pytest.raises(BadInput, match="is a run's folder, whose config.json is another"):
        again.save_pretrained(run)
    with pytest.raises(BadInput, match="names is 'hugingface' .did you mean huggingface.*: use"):
        again.save_pretrained(out, "hugingface")


@pytest.mark.transformers
@torch.no_grad()
@WAYS
def test_the_libraries_compute_the_same(tmp_path, kind, classes, names, theirs):
    """To 3e-5 of the largest value: float32, added in another order; texts have the same ids."""
    library = {"timm": "timm", "huggingface": "transformers"}[names]
    hub = pytest.importorskip(library, reason=f"wants {library}, which is not installed")
    model, draws = made(kind, classes), torch.Generator().manual_seed(1)
    model.save_pretrained(tmp_path, names)
    if names == "timm":
        norm = functools.partial(torch.nn.LayerNorm, eps=model.encoder.config.eps)
        other = hub.create_model(f"local-dir:{tmp_path}", pretrained=True, norm_layer=norm).eval()
    else:
        other, told = getattr(hub, theirs).from_pretrained(tmp_path, output_loading_info=True)
        assert not any(told.values()), told  # missing, unexpected, of another shape
    x = torch.randn(3, 3, 48, 48, generator=draws)
    if kind is mlm.MLM:
        ids = torch.randint(5, 119, (3, 9), generator=draws)
        ids[1, 6:] = 1
        found = other(ids, attention_mask=ids != 1).logits
        expected = model(ids) if classes else model.logits(ids)
        found, expected = (y if classes else y[ids != 1] for y in (found, expected))
        text = mlm.MLM.from_pretrained("tiny")
        text.save_pretrained(tmp_path)
        told = hub.AutoTokenizer.from_pretrained(tmp_path)("The number of <mask> items.")
        assert told["input_ids"] == text.tokenizer.encode("The number of <mask> items.").ids
    elif classes:
        found, expected = other(x), model(x)
        found = found if names == "timm" else found.logits
    elif names == "timm":
        found, expected = other.forward_features(x), model.encoder(x)
    else:
        told = other(x, noise=torch.rand(3, 36, generator=draws))
        found, expected = told.logits, model.reconstruct(x, told.mask.bool())
        assert told.loss.isclose(model.loss(x, told.mask.bool()).mean(), rtol=3e-5)
    assert (found - expected).abs().max() <= 3e-5 * expected.abs().max()
