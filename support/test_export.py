"""The way out: what transformers and timm read, the way back, the card, and --export."""
import functools
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import finetune
import mae
import mlm
from support.fetch import ROOT, BadInput
from support.test_weights import published
from support.testing import GOLDEN, content, run_here, same

LINEAGE = {"dataset": "cub", "init": "facebook/vit-mae-base", "teacher": "None", "rounds": "1",
           "seed": "3", "match": "cls", "pixels": "norm", "stage": "distilled-1", "run": "0f0f"}
WAYS = pytest.mark.parametrize("kind, classes, names, theirs", [
    (mae.MAE, None, "huggingface", "ViTMAEForPreTraining"),
    (mae.MAE, None, "timm", "VisionTransformer"),
    (mae.MAE, "abc", "huggingface", "ViTForImageClassification"),
    (mae.MAE, "abc", "timm", "VisionTransformer"),
    (mlm.MLM, None, "huggingface", "RobertaForMaskedLM"),
    (mlm.MLM, "abc", "huggingface", "RobertaForSequenceClassification")])


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
    for program, run, models in (
            ("finetune", tmp_path / "run", {"": "finetuned-fine-tuning"}),
            ("distill", finished, {"": "distilled-1",
                                   "classifier": "finetuned-self-distillation"})):
        before, out = content(run), tmp_path / program
        run_here(f"{program}.py --smoke --out {run} --export {out}")
        assert content(run) == before
        for folder, name in models.items():
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
