"""The way out: a folder that Hugging Face's transformers or timm opens, with a model card.

What their configurations have no word for stays in the metadata of model.safetensors, so that
`from_pretrained` gives the very same model back, with its lineage.
"""
import json
import re
from dataclasses import asdict
from pathlib import Path

from torch import Tensor, nn

from support import fetch, weights
from support.fetch import BadInput
from support.images import MEAN, STD
from support.names import ROBERTA, ROBERTA_FIELDS, VIT, VIT_FIELDS
from support.recipes import HUB

PUBLISHERS = ("huggingface", "timm")  # columns 1 and 2 of a table of names
# what transformers calls a model (of texts or not, with classes or not): its class and its type
CLASSES = {(False, False): ("ViTMAEForPreTraining", "vit_mae"),
           (False, True): ("ViTForImageClassification", "vit"),
           (True, False): ("RobertaForMaskedLM", "roberta"),
           (True, True): ("RobertaForSequenceClassification", "roberta")}
LICENCES = {HUB["image"]: "cc-by-nc-4.0", HUB["text"]: "mit", "tiny": "mit"}  # of initial weights
CARD = """---
library_name: {library}
license: {licence}
---
# {title}

By an implementation of *Self-Distillation for Further Pre-training of Transformers* (ICLR 2023).

```python
{use}
```

How it was made, in words of `distill.py --help`:
{made}
- licence of the initial weights: {licence}
"""
# what a card leaves out: settings of stages without such a name, and the metadata's hashes
ONLY = {"distil": {"teacher", "rounds", "match", "mae_weight"},
        "further|distil": {"steps", "masking", "mask_prob", "pixels"},
        "(?!)": {"data", "init_weights", "teacher_weights", "code", "run"}}
WORDS = {("match", "cls"): "line 11 compares the class token's hidden state",
         ("match", "hidden"): "line 11 compares all hidden states",
         ("pixels", "norm"): "normalised within their patch", ("teacher", "None"): "the run's own"}


def write(model: nn.Module, folder: str | Path, names: str) -> None:
    """Write a model under other people's names into a folder.

    names: "huggingface" or, for an encoder of pictures with or without a classifier's head, "timm".
    BadInput where there is no such model.
    """
    folder, text = Path(folder), hasattr(model.encoder.config, "vocab_size")
    if names not in PUBLISHERS or text and names == "timm":
        raise BadInput(f"names is {names!r}{fetch.nearest(names, PUBLISHERS)}: use huggingface or, "
                       "for pictures, timm")
    if (folder / "log.jsonl").exists():
        raise BadInput(f"{folder} is a run's folder, whose config.json is another: name a new one")
    about = {"model": "mlm" if text else "mae", **asdict(model.encoder.config)}
    if hasattr(model, "classes"):
        about |= {"model": "classifier", "classes": model.classes}
    files = _timm(about) if names == "timm" else _huggingface(about, model.lineage)
    files = {name: json.dumps(value, indent=1) + "\n" for name, value in files.items()}
    if getattr(model, "tokenizer", None):
        files["tokenizer.json"] = model.tokenizer.to_str(pretty=True)
    files["README.md"] = _card(model.lineage, about, names, folder.resolve().name)
    for name, content in files.items():
        with fetch.whole(folder / name) as part:
            part.write_text(content, encoding="utf-8", errors="backslashreplace")
    weights.write(_renamed(model, PUBLISHERS.index(names) + 1), folder / "model.safetensors",
                  about, **model.lineage)


def convert(kind: type, path: Path, folder: str | Path) -> None:
    """--export: a model that a run has saved, of a class of ours, in a folder for transformers."""
    kind.from_pretrained(path).save_pretrained(folder)
    print(f"exported {path.stem} to {folder}")


def _renamed(model: nn.Module, column: int) -> dict[str, Tensor]:
    """A model's tensors under a publisher's names: stacked ones apart, patches as a convolution."""
    table = ROBERTA if hasattr(model.encoder.config, "vocab_size") else VIT
    found = {}
    for ours, tensor in model.state_dict().items():
        if column == 2 and ours.startswith("decoder."):
            continue
        if ours == "encoder.patch.weight":
            p = model.encoder.config.patch_size
            tensor = tensor.unflatten(1, (p, p, 3)).permute(0, 3, 1, 2)  # [D, 3, p, p]
        theirs = weights.names(ours, table, column)
        found |= dict(zip(theirs, tensor.chunk(len(theirs))))
    return found


def _huggingface(about: dict, lineage: dict[str, str]) -> dict[str, dict]:
    """transformers' config.json, what no shape tells, and what it makes inputs with."""
    title, kind = CLASSES["vocab_size" in about, "classes" in about]
    found = {"architectures": [title], "model_type": kind, "hidden_act": "gelu"}
    fields = ROBERTA_FIELDS if kind == "roberta" else VIT_FIELDS
    found |= {theirs: about[ours] for ours, theirs in fields.items()
              if kind == "vit_mae" or not ours.startswith("decoder_")}
    if kind == "vit_mae" and "pixels" in lineage:  # never guessed
        found["norm_pix_loss"] = lineage["pixels"] == "norm"
    if classes := about.get("classes"):
        found |= {"id2label": dict(enumerate(classes)),
                  "label2id": {name: number for number, name in enumerate(classes)}}
    if kind != "roberta":  # as `support.images`: squashed to a square, bilinear
        side = about["image_size"]
        return {"config.json": found, "preprocessor_config.json": {
            "image_processor_type": "ViTImageProcessor", "size": {"height": side, "width": side},
            "resample": 2, "image_mean": MEAN, "image_std": STD}}
    start, _, end, *_ = about["special_ids"]
    found |= {"attention_probs_dropout_prob": about["dropout"], "type_vocab_size": 1,
              "bos_token_id": start, "eos_token_id": end}
    return {"config.json": found, "tokenizer_config.json": {  # its own <mask> eats a blank
        "tokenizer_class": "RobertaTokenizer", "mask_token": "<mask>",
        "model_max_length": about["max_positions"] - about["pad_id"] - 1}}


def _timm(about: dict) -> dict[str, dict]:
    """timm's config.json; it has no word for eps, which the card tells instead."""
    side, classes = about["image_size"], about.get("classes", [])
    return {"config.json": {
        "architecture": "vit_base_patch16_224", "num_classes": len(classes), "global_pool": "token",
        "model_args": {"img_size": side, "patch_size": about["patch_size"],
                       "embed_dim": about["width"], "depth": about["depth"],
                       "num_heads": about["heads"], "mlp_ratio": about["mlp"] / about["width"]},
        "pretrained_cfg": {
            "input_size": (3, side, side), "interpolation": "bilinear", "crop_mode": "squash",
            "crop_pct": 1.0, "mean": MEAN, "std": STD, "num_classes": len(classes),
            "label_names": classes or None, "classifier": "head"}}}


def _card(lineage: dict[str, str], about: dict, names: str, folder: str) -> str:
    """README.md: how to open this and, by its lineage, how it was made."""
    title, library = CLASSES["vocab_size" in about, "classes" in about][0], "transformers"
    use = f'from transformers import {title}\nmodel = {title}.from_pretrained("{folder}")'
    if "classes" not in about:
        encoder = "RobertaModel" if "vocab_size" in about else "ViTModel"
        use += f'\n# the encoder: {encoder}.from_pretrained("{folder}", add_pooling_layer=False)'
    if names == "timm":
        title, library = "VisionTransformer", "timm"
        use = ("import functools, timm, torch\n"
               f"norm = functools.partial(torch.nn.LayerNorm, eps={about['eps']})\n"
               f'model = timm.create_model("local-dir:{folder}", pretrained=True, norm_layer=norm)')
    unused = set() if "patch_size" in about else {"pixels"}
    for stages, settings in ONLY.items():
        if not re.search(stages, lineage.get("stage", "distilled")):
            unused |= settings
    made = "\n".join(f"- {name}: {WORDS.get((name, value), value)}"
                     for name, value in sorted(lineage.items()) if name not in unused)
    return CARD.format(title=title, library=library, use=use, made=made or "- not recorded",
                       licence=LICENCES.get(lineage.get("init"), "unknown"))
