"""What the tests share: surroundings, small models, what they learn from, programs, folders."""
import functools
import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mae
import mlm
from support import images, run, settings
from support.data import Data
from support.fetch import ROOT
from support.texts import Texts

GOLDEN = {mae.MAE: ROOT / "golden" / "vit_mae.safetensors",
          mlm.MLM: ROOT / "golden" / "roberta.safetensors"}
both = pytest.mark.parametrize("modality", ["image", "text"])


@pytest.fixture(scope="session", autouse=True)
def surroundings(tmp_path_factory):
    """One place for data, one thread (more are slower for small models), the code hashed once."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATA_DIR", str(tmp_path_factory.mktemp("data")))
        patch.setenv("OMP_NUM_THREADS", "1")  # of programs that are started
        patch.setattr(run, "code", functools.cache(run.code))
        yield


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a run that has finished."""
    folder = tmp_path_factory.mktemp("finished")
    run_here(f"distill.py --smoke --out {folder}")
    return folder


def close(a: Tensor, b: Tensor, atol: float, rtol: float = 0.0) -> None:
    """Equal to a tolerance, whose reason stands at each call."""
    torch.testing.assert_close(a, b, atol=atol, rtol=rtol)


def same(a: nn.Module | dict, b: nn.Module | dict) -> bool:
    """The same tensors under the same names, bit for bit."""
    a, b = (x.state_dict() if isinstance(x, nn.Module) else x for x in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tiny(kind: str, seed: int = 0) -> nn.Module:
    """A model of two layers without dropout: 4 patches of 16 x 16 pixels, or 60 words."""
    numbers = torch.Generator().manual_seed(seed)
    sizes = dict(width=32, depth=2, heads=4, mlp=64, dropout=0.0)
    if kind == "image":
        model = mae.MAE(mae.Config(image_size=16, patch_size=8, decoder_width=16, decoder_depth=2,
                                   decoder_heads=2, decoder_mlp=32, **sizes), numbers)
    else:
        model = mlm.MLM(mlm.Config(vocab_size=60, max_positions=20, mask_id=59,
                                   special_ids=(0, 1, 2, 3, 59), **sizes), numbers)
    for p in model.parameters():  # biases and LayerNorms start at 0 and 1: make each one count
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape, generator=numbers)
    return model.eval()


def examples(kind: str) -> Tensor | Texts:
    """20 pictures uint8 [20, 3, 16, 16], or texts of 5 to 9 tokens, padded or ("ragged") not."""
    numbers = torch.Generator().manual_seed(1)
    if kind == "image":
        return torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8, generator=numbers)
    ids, length = torch.randint(4, 59, (20, 9), generator=numbers), torch.arange(20) % 5 + 5
    ids[:, 0] = 0
    for text, end in enumerate(length):
        ids[text, end - 1], ids[text, end:] = 2, 1
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), length.cumsum(0)])  # [21]
    return Texts(ids[ids != 1].int(), offsets, 1) if kind == "ragged" else ids


def batch(kind: str, index: slice | Tensor = slice(None)) -> Tensor:
    """Examples as a model takes them: normalised pictures, or ids."""
    x = examples(kind)[index]
    return images.normalise(x) if kind == "image" else x


def config_of(**changes: object) -> settings.Config:
    usual = dict(steps=4, batch_size=6, lr=1e-3, mask_prob=0.5, match="hidden", device="cpu",
                 precision="fp32")
    return settings.Config(**usual | changes)


def labelled(kind: str, **changes: object) -> tuple[nn.Module, Data, settings.Config]:
    """A small model, 12 labelled training and 8 test examples, and the settings to learn them."""
    model, x, y = tiny(kind), examples(kind), torch.arange(20) % 4
    data = Data(name="made", train=x[:12], train_labels=y[:12], test=x[12:], test_labels=y[12:],
                classes=list("abcd"), metric="macro_f1", fingerprint="0", note="")
    config = config_of(steps=5, finetune_steps=6, finetune_batch_size=8, finetune_lr=1e-3)
    return model, data, settings.final(replace(config, **changes), model, 12)


def run_here(line: str) -> None:
    """Run a program in this process, as its command line would."""
    name, *words = line.split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *words])
        importlib.import_module(name.removesuffix(".py")).main()


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def rows_of(folder: Path) -> list[dict]:
    return json.loads((folder / "results.json").read_text())["rows"]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
