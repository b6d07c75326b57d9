"""What a caller in Python has, as models take it: pictures or texts in one of their usual forms."""
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from support import images, texts
from support.fetch import BadInput

PICTURES = "give uint8 pixels [N, 3, S, S], a list of paths or a list of PIL pictures"
TEXTS = "give a list of strings, token ids Long[N, K] or texts.Texts"


def as_inputs(x: object, config: object, tokenizer: object = None) -> Tensor | texts.Texts:
    """Inputs of which x[Long[B]] is a batch; config: the model's. BadInput, one sentence, if not.

    Pictures: uint8 or normalised tensors [N, 3, S, S], lists of paths or of PIL's pictures. Texts:
    lists of strings, token ids [N, K] or `texts.Texts`.
    """
    if isinstance(x, texts.Texts | images.Small):
        return x
    text = hasattr(config, "vocab_size")
    what, wanted = ("texts", TEXTS) if text else ("pictures", PICTURES)
    x = torch.from_numpy(x) if isinstance(x, np.ndarray) else x
    if isinstance(x, list | tuple) and x:
        kinds = str if text else str | Path | Image.Image
        if all(isinstance(one, kinds) for one in x):
            return _tokenised(list(x), config, tokenizer) if text else images.decode_all(
                [Path(one) if isinstance(one, str) else one for one in x], config.image_size)
    if not torch.is_tensor(x):
        raise BadInput(f"{what} came as {type(x).__name__}: {wanted}")
    if not len(x):
        raise BadInput(f"there are no {what}: {wanted}")
    return _ids(x, config) if text else _pixels(x, config)


def _tokenised(words: list[str], config: object, tokenizer: object) -> texts.Texts:
    if tokenizer is None:
        raise BadInput("the model has no tokenizer to read strings with: give token ids [N, K]")
    ids, offsets, _ = texts.tokenise(words, tokenizer, config.max_length)
    return texts.Texts(ids, offsets, config.pad_id)


def _ids(x: Tensor, config: object) -> Tensor:
    if x.ndim != 2 or x.is_floating_point() or x.dtype == torch.bool:
        raise BadInput(f"texts are {x.dtype} {list(x.shape)}: {TEXTS}")
    if x.min() < 0 or x.max() >= config.vocab_size or x.shape[1] > config.max_length:
        raise BadInput(f"token ids from {int(x.min())} to {int(x.max())}, {x.shape[1]} a text: the "
                       f"model has {config.vocab_size} and takes {config.max_length} a text")
    return x


def _pixels(x: Tensor, config: object) -> Tensor:
    if x.ndim != 4 or x.shape[1] != 3:
        turned = ", channels last (x.permute(0, 3, 1, 2) turns them)" * (
            x.ndim == 4 and x.shape[3] == 3)
        raise BadInput(f"pictures are {list(x.shape)}{turned}: {PICTURES}")
    if x.shape[2] % config.patch_size or x.shape[3] % config.patch_size:
        raise BadInput(f"pictures of {x.shape[2]} x {x.shape[3]} do not divide into patches of "
                       f"{config.patch_size}: resize them, to {config.image_size} if you can")
    if x.dtype != torch.uint8 and not x.is_floating_point():
        raise BadInput(f"pictures are {x.dtype}: {PICTURES}")
    if x.is_floating_point() and x.min() >= 0:  # normalised ones have a mean of about 0
        raise BadInput(f"pictures are numbers from {x.min():.3g} to {x.max():.3g}, which are not "
                       "normalised: give uint8, or what support.images.normalise makes of it")
    return x
