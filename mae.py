"""Masked auto-encoding of images: a Vision Transformer predicts the patches it was not shown.

Paper: §3.1 "Masked Auto-Encoding" (equation 2), Appendix C (the pixel likelihood) and lines 7-10 of
Algorithm 1. References: ViT (Dosovitskiy et al., 2021), MAE (He et al., 2022).

    python mae.py                                              # the drawn birds, bundled weights
    python mae.py --dataset cub --init facebook/vit-mae-base   # needs a network once

draws original | masked | reconstruction.

Letters: B batch, S side in pixels, K patches, P values in a patch, D width, H heads, N the visible
tokens of a batch, L the longest row of them.

Appendix C puts a "mask" token wherever z_k = 1 into the encoder. MAE, whose weights the paper
starts from, removes those patches from the encoder and puts mask tokens into the decoder: so do we.
"""
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support import fetch, run, settings
from support.images import denormalise, grid, normalise, spread


@dataclass(frozen=True)
class Config:
    """Sizes of the encoder f_θ and the decoder g_φ; the defaults are the paper's ViT-B/16."""

    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp: int = 3072
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    decoder_mlp: int = 2048
    eps: float = 1e-12  # of LayerNorm, as in Hugging Face's files; facebookresearch's have 1e-6
    dropout: float = 0.0


# ----------------------------------------------------------------------------- masks (line 7)


def bernoulli_mask(B: int, K: int, prob: float, generator: torch.Generator) -> Tensor:
    """z ~ p_{γ,K}: Bool[B, K], each position masked (True) on its own with probability γ (§3.1)."""
    return torch.rand(B, K, generator=generator) < prob


def fixed_mask(B: int, K: int, prob: float, generator: torch.Generator) -> Tensor:
    """MAE's exact-count shuffle (`--masking fixed`): Bool[B, K], K - ⌊K(1 - γ)⌋ masked a row."""
    rank = torch.rand(B, K, generator=generator).argsort(1).argsort(1)  # [B, K]
    return rank >= int(K * (1 - prob))


# ----------------------------------------------------------------------------- patches, positions


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Pictures [B, 3, S, S] as rows of patches [B, K, P], P in (row, column, channel) order."""
    height, width = images.shape[2:]
    if height % patch_size or width % patch_size:
        raise ValueError(f"images of {height} x {width} do not divide into patches of "
                         f"{patch_size}")
    x = images.unflatten(3, (-1, patch_size))  # [B, 3, height, columns, p]
    x = x.unflatten(2, (-1, patch_size))  # [B, 3, rows, p, columns, p]
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # [B, K, P]


def unpatchify(patches: Tensor, height: int, width: int, patch_size: int) -> Tensor:
    """The way back from [B, K, P] to images [B, 3, height, width]."""
    grid = (height // patch_size, width // patch_size)
    x = patches.unflatten(2, (patch_size, patch_size, 3))  # [B, K, p, p, 3]
    x = x.unflatten(1, grid)  # [B, rows, columns, p, p, 3]
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)  # [B, 3, height, width]


def sincos_positions(width: int, side: int) -> Tensor:
    """MAE's fixed 2-D table [1, 1+K, D]: the column in the first half of D, the row in the second.

    The class token's row is zero.
    """
    frequency = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * frequency  # [side, D/4]
    code = torch.cat([angle.sin(), angle.cos()], 1)  # [side, D/2]
    table = torch.cat([code.repeat(side, 1), code.repeat_interleave(side, 0)], 1)  # [K, D]
    return F.pad(table, (0, 0, 1, 0)).float()[None]  # [1, 1+K, D]


def resize_positions(table: Tensor, rows: int, columns: int) -> Tensor:
    """A square table [1, 1+K, D] interpolated to rows x columns; the class token's row stays."""
    side = round((table.shape[1] - 1) ** 0.5)
    if (rows, columns) == (side, side):
        return table
    plane = table[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)  # [1, D, side, side]
    plane = F.interpolate(plane, (rows, columns), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], plane.flatten(2).transpose(1, 2)], 1)  # [1, 1+rows*columns, D]


# ----------------------------------------------------------------------------- the transformer


class Packing(NamedTuple):
    """Where rows of different lengths lie when their N tokens stand one after another, unpadded.

    Every layer but attention works on tokens one by one, so only attention needs the rows apart.
    """

    slots: Tensor  # [N] each token's place in the padded [B·L]
    allowed: Tensor  # Bool[B, 1, 1, L] False: padding, never attended to

    def pad(self, x: Tensor) -> Tensor:
        """[N, D] -> [B, L, D]"""
        B, L = self.allowed.shape[0], self.allowed.shape[3]
        padded = x.new_zeros(B * L, x.shape[1]).index_copy(0, self.slots, x)  # [B·L, D]
        return padded.unflatten(0, (B, L))  # [B, L, D]

    def pack(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [N, D]"""
        return x.flatten(0, 1)[self.slots]  # [N, D]


def pack_rows(kept: Tensor) -> Packing:
    """The packing of the tokens that kept Bool[B, 1+K] selects, in their order."""
    lengths = kept.sum(1)  # [B]
    L = int(lengths.max())
    rows = torch.arange(len(kept), device=kept.device)[:, None]  # [B, 1]
    places = rows * L + kept.cumsum(1) - 1  # [B, 1+K]
    allowed = torch.arange(L, device=kept.device) < lengths[:, None]  # [B, L]
    return Packing(places[kept], allowed[:, None, None])  # [N], [B, 1, 1, L]


class Attention(nn.Module):
    """Multi-head self-attention over rows [B, L, D], or over the rows of a packing's [N, D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        assert width % heads == 0, "the heads must share the width equally"
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, packing: Packing | None) -> Tensor:
        qkv = self.qkv(x)
        if packing:
            qkv = packing.pad(qkv)
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # 3 [B, H, L, D/H]
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=packing.allowed if packing else None)
        x = x.transpose(1, 2).flatten(2)  # [B, L, D]
        return self.out(packing.pack(x) if packing else x)


class Block(nn.Module):
    """One pre-norm layer: attention, then two linear maps with a GELU between, each added to x."""

    def __init__(self, width: int, heads: int, mlp: int, eps: float, dropout: nn.Dropout) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.fc1 = nn.Linear(width, mlp)
        self.fc2 = nn.Linear(mlp, width)
        self.dropout = dropout

    def attend(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        return x + self.dropout(self.attention(self.norm1(x), packing))

    def transform(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.fc2(F.gelu(self.fc1(self.norm2(x)))))

    def forward(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        return self.transform(self.attend(x, packing))


class Encoder(nn.Module):
    """f_θ: pictures -> hidden states after the last LayerNorm."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        assert config.image_size % config.patch_size == 0, "pictures must divide into patches"
        side = config.image_size // config.patch_size
        self.dropout = nn.Dropout(config.dropout)  # one for all blocks: fine-tuning turns it on
        self.patch = nn.Linear(3 * config.patch_size**2, config.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        # fixed while pre-training; `finetune.Classifier` lets them train
        self.positions = nn.Parameter(sincos_positions(config.width, side), requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, config.mlp, config.eps, self.dropout)
            for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=config.eps)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalised images [B, 3, S, S] -> [B, 1+K, D], class token first.

        Masked patches (mask Bool[B, K]) are taken out before the first layer, and their rows come
        back as zeros. A picture's result does not depend on the others in its batch.
        """
        p, (height, width) = self.config.patch_size, images.shape[2:]
        positions = resize_positions(self.positions, height // p, width // p)  # [1, 1+K, D]
        x = F.pad(patchify(images, p), (0, 0, 1, 0))  # [B, 1+K, P] a row for the class token
        positions = positions.expand(len(x), -1, -1)  # [B, 1+K, D]
        is_cls = (torch.arange(x.shape[1], device=x.device) == 0).expand(len(x), -1)  # [B, 1+K]
        packing = None
        if mask is not None:
            kept = F.pad(~mask, (1, 0), value=True)  # [B, 1+K]
            packing = pack_rows(kept)
            x, positions, is_cls = x[kept], positions[kept], is_cls[kept]  # [N, P], [N, D], [N]
        x = torch.where(is_cls[..., None], self.cls_token[0], self.patch(x)) + positions
        x = self.dropout(x)  # [B, 1+K, D] or [N, D]
        for block in self.blocks:
            x = block(x, packing)
        x = self.norm(x)
        if mask is None:
            return x
        zeros = x.new_zeros(*kept.shape, x.shape[1])
        return zeros.masked_scatter(kept[..., None], x)  # [B, 1+K, D]


class Decoder(nn.Module):
    """g_φ: hidden states of the visible patches -> a prediction for every patch."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        width, side = config.decoder_width, config.image_size // config.patch_size
        self.embed = nn.Linear(config.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(sincos_positions(width, side), requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(width, config.decoder_heads, config.decoder_mlp, config.eps, nn.Dropout(0.0))
            for _ in range(config.decoder_depth))
        self.norm = nn.LayerNorm(width, eps=config.eps)
        self.predict = nn.Linear(width, 3 * config.patch_size**2)

    def forward(self, hidden: Tensor, mask: Tensor, rows: int, columns: int,
                masked_only: bool = False) -> Tensor:
        """Hidden states [B, 1+K, D], mask Bool[B, K] -> patches [B, K, P], or M masked [M, P]."""
        shown = F.pad(~mask, (1, 0), value=True)  # [B, 1+K]
        x = self.embed(hidden[shown])  # [N, decoder width]
        x = self.mask_token.to(x.dtype).expand(*shown.shape, -1).masked_scatter(shown[..., None], x)
        x = x + resize_positions(self.positions, rows, columns)  # [B, 1+K, decoder width]
        wanted = F.pad(mask if masked_only else torch.ones_like(mask), (1, 0))  # [B, 1+K]
        for block in self.blocks[:-1]:
            x = block(x)
        x = self.blocks[-1].attend(x)[wanted]  # [M, decoder width] from here each on its own
        x = self.predict(self.norm(self.blocks[-1].transform(x)))  # [M, P]
        return x if masked_only else x.unflatten(0, mask.shape)  # [B, K, P]


class MAE(nn.Module):
    """g_φ ∘ f_θ with its masked auto-encoding loss; Xavier-uniform weights from `generator`."""

    modality = "image"

    def __init__(self, config: Config = Config(), generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
        for token in (self.encoder.cls_token, self.decoder.mask_token):
            nn.init.normal_(token, std=0.02, generator=generator)

    def draw_mask(self, images: Tensor, prob: float, generator: torch.Generator,
                  draw=bernoulli_mask) -> Tensor:
        """Lines 7-8: Bool[B, K] for images [B, 3, S, S], drawn on the CPU, then moved to them."""
        B, _, height, width = images.shape
        K = (height // self.config.patch_size) * (width // self.config.patch_size)
        return draw(B, K, prob, generator).to(images.device)

    def reconstruct(self, images: Tensor, mask: Tensor, masked_only: bool = False) -> Tensor:
        """g_φ(f_θ(x̂)): patches [B, K, P] predicted from what mask Bool[B, K] leaves of images.

        masked_only: the M masked ones alone, [M, P].
        """
        rows, columns = (side // self.config.patch_size for side in images.shape[2:])
        return self.decoder(self.encoder(images, mask), mask, rows, columns, masked_only)

    def target(self, images: Tensor, norm_pix: bool) -> Tensor:
        """What is predicted, [B, K, P]: pixels, raw or with their patch's mean 0 and variance 1."""
        patches = patchify(images, self.config.patch_size).float()  # [B, K, P]
        if not norm_pix:
            return patches
        mean, variance = patches.mean(2, keepdim=True), patches.var(2, keepdim=True)  # [B, K, 1]
        return (patches - mean) / (variance + 1e-6).sqrt()

    def loss(self, images: Tensor, mask: Tensor, norm_pix: bool = True) -> Tensor:
        """Line 10, [B]: ℓ¹_j = Σ_k z_k/Z · ‖x_k - μ_k‖²/P, the masked patches' mean squared error.

        Appendix C's -log p(x_k|x̂) up to its constants. An image without a mask (Z = 0) gives 0.
        """
        predicted = self.reconstruct(images, mask, masked_only=True).float()  # [M, P]
        error = (predicted - self.target(images, norm_pix)[mask]).square().mean(1)  # [M]
        error = torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, error)  # [B, K]
        return error.sum(1) / mask.sum(1).clamp(min=1)  # [B]

    def forward(self, images: Tensor, mask: Tensor, unmasked: bool,
                norm_pix: bool = True) -> tuple[Tensor, Tensor | None]:
        """Line 10's ℓ¹_j [B] and, if `unmasked`, line 11's f_θ(x_j) [B, 1+K, D], else None.

        One call, as torch's DistributedDataParallel wants it.
        """
        loss = self.loss(images, mask, norm_pix)  # [B]
        return loss, self.encoder(images) if unmasked else None

    def save(self, path: str | Path, **lineage: str) -> None:
        """Write the weights as safetensors, with their configuration and lineage as metadata."""
        described = {"model": "mae", **asdict(self.config)}
        fetch.save_weights(self.state_dict(), described, path, **lineage)

    @classmethod
    def from_pretrained(cls, source: str | Path, **sizes: int) -> "MAE":
        """Weights from a .safetensors file, a folder, a hub id or "tiny".

        Reads our own names, Hugging Face's `ViTMAEForPreTraining` and facebookresearch/mae's.
        `sizes` (fields of `Config`) fill in what neither the file's configuration nor its shapes
        tell. Raises `BadInput`, listing names and shapes, for whatever does not fit.
        """
        path = fetch.weights(source, "mae")
        tensors, described = fetch.read_weights(path)
        if described.get("model", "mae") != "mae":
            raise fetch.BadInput(f"{path} holds a model of the kind {described['model']!r}, not a "
                                 "ViT-MAE: give the weights of a pre-training stage")
        # a convolution over patches is a linear map of their values
        tensors = {name: t.permute(0, 2, 3, 1).flatten(1) if t.ndim == 4 else t
                   for name, t in tensors.items()}
        if "encoder.cls_token" in tensors:
            table = {name: name for name in tensors}
        else:
            table = _foreign_names(tensors, path)
        model = fetch.blank(cls, lambda: Config(**_sizes(tensors, table, described, sizes)),
                            tensors, path)
        wanted = model.state_dict()
        if not _has_decoder(tensors):
            print(f"NOTE: {path} holds an encoder only: the decoder starts FRESH (untrained).",
                  flush=True)
            wanted = {name: t for name, t in wanted.items() if name.startswith("encoder.")}
        found = fetch.translate(tensors, {ours: table.get(ours, ours) for ours in wanted}, wanted)
        # seeded, as an encoder-only file leaves the decoder as drawn here
        model = cls(model.config, run.generator(0, "fresh decoder"))
        model.load_state_dict(found, strict=len(wanted) == len(model.state_dict()))
        return model.eval()


# ----------------------------------------------------------------------------- other people's names

# per block: our name -> (Hugging Face's, facebookresearch's); a tuple is stacked
_BLOCK = {
    "norm1": ("layernorm_before", "norm1"),
    "attention.qkv": (("attention.attention.query", "attention.attention.key",
                       "attention.attention.value"), "attn.qkv"),
    "attention.out": ("attention.output.dense", "attn.proj"),
    "norm2": ("layernorm_after", "norm2"),
    "fc1": ("intermediate.dense", "mlp.fc1"),
    "fc2": ("output.dense", "mlp.fc2"),
}
_OUTER = {
    "encoder.cls_token": ("vit.embeddings.cls_token", "cls_token"),
    "encoder.positions": ("vit.embeddings.position_embeddings", "pos_embed"),
    "encoder.patch": ("vit.embeddings.patch_embeddings.projection", "patch_embed.proj"),
    "encoder.norm": ("vit.layernorm", "norm"),
    "decoder.embed": ("decoder.decoder_embed", "decoder_embed"),
    "decoder.mask_token": ("decoder.mask_token", "mask_token"),
    "decoder.positions": ("decoder.decoder_pos_embed", "decoder_pos_embed"),
    "decoder.norm": ("decoder.decoder_norm", "decoder_norm"),
    "decoder.predict": ("decoder.decoder_pred", "decoder_pred"),
}
_BARE = ("encoder.cls_token", "encoder.positions", "decoder.mask_token", "decoder.positions")
# head counts are in no tensor's shape: the published ViTs', by width
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
_DECODER_HEADS = {512: 16}


def _foreign_names(tensors: dict[str, Tensor], path: Path) -> dict[str, str | tuple[str, ...]]:
    """The table our name -> their name, for as many blocks as the file has."""
    if "vit.embeddings.cls_token" in tensors:
        theirs, encoder, decoder = 0, "vit.encoder.layer", "decoder.decoder_layers"
        if any(name.startswith("decoder.decoder_encoder.") for name in tensors):
            decoder = "decoder.decoder_encoder.layer"  # as transformers writes it since 5.0
    elif "cls_token" in tensors:
        theirs, encoder, decoder = 1, "blocks", "decoder_blocks"
    else:
        raise fetch.BadInput(
            f"{path} holds no ViT-MAE (its first tensors are {sorted(tensors)[:3]}): "
            "pass an image model's weights; text models are mlm.py's")
    table = {}
    for ours, names in _OUTER.items():
        for kind in [""] if ours in _BARE else [".weight", ".bias"]:
            table[ours + kind] = names[theirs] + kind
    for stem, prefix in (("encoder", encoder), ("decoder", decoder)):
        for i in range(_depth(tensors, prefix)):
            for ours, names in _BLOCK.items():
                for kind in (".weight", ".bias"):
                    parts = [names[theirs]] if isinstance(names[theirs], str) else names[theirs]
                    table[f"{stem}.blocks.{i}.{ours}{kind}"] = tuple(
                        f"{prefix}.{i}.{part}{kind}" for part in parts)
    return table


def _depth(tensors: dict[str, Tensor], prefix: str) -> int:
    """How many numbers follow a prefix such as "blocks" in the tensors' names."""
    start = prefix.count(".") + 1
    return len({name.split(".")[start] for name in tensors if name.startswith(prefix + ".")})


# our field -> the entry of Hugging Face's config.json
_HUB_FIELDS = {
    "image_size": "image_size", "patch_size": "patch_size", "width": "hidden_size",
    "depth": "num_hidden_layers", "heads": "num_attention_heads", "mlp": "intermediate_size",
    "decoder_width": "decoder_hidden_size", "decoder_depth": "decoder_num_hidden_layers",
    "decoder_heads": "decoder_num_attention_heads", "decoder_mlp": "decoder_intermediate_size",
    "eps": "layer_norm_eps", "dropout": "hidden_dropout_prob"}


def _sizes(tensors: dict[str, Tensor], table: dict, described: dict, given: dict) -> dict:
    """Config's fields: the file's own description wins, then what the caller gave, then shapes."""
    if described.get("model") == "mae":  # written by `MAE.save`
        return {field.name: described.get(field.name) for field in fields(Config)}

    def shape(ours: str) -> torch.Size:
        name = table.get(ours, ours)
        name = name if isinstance(name, str) else name[0]
        if name not in tensors:
            raise fetch.BadInput(f"the weights do not fit: missing {name} (for {ours})")
        return tensors[name].shape

    def depth(stem: str) -> int:
        return sum(name.startswith(stem) and name.endswith("norm1.bias") for name in table)

    width, P = shape("encoder.patch.weight")
    patch_size = round((P / 3) ** 0.5)
    sizes = {"width": width, "patch_size": patch_size, "depth": depth("encoder"),
             "image_size": patch_size * round((shape("encoder.positions")[1] - 1) ** 0.5),
             "mlp": shape("encoder.blocks.0.fc1.bias")[0],
             "eps": 1e-6 if "cls_token" in tensors else 1e-12}
    if _has_decoder(tensors):
        sizes |= {"decoder_width": shape("decoder.embed.bias")[0],
                  "decoder_depth": depth("decoder"),
                  "decoder_mlp": shape("decoder.blocks.0.fc1.bias")[0]}
    sizes |= given | {ours: described[theirs] for ours, theirs in _HUB_FIELDS.items()
                      if theirs in described}
    for heads, wide, published in (("heads", "width", _HEADS),
                                   ("decoder_heads", "decoder_width", _DECODER_HEADS)):
        if heads not in sizes and wide in sizes:
            if sizes[wide] not in published:
                raise fetch.BadInput(
                    f"nothing says how many heads a {wide} of {sizes[wide]} has: put a config.json "
                    f"beside the weights or call MAE.from_pretrained(source, {heads}=...)")
            sizes[heads] = published[sizes[wide]]
    return sizes


def _has_decoder(tensors: dict[str, Tensor]) -> bool:
    return any(name.startswith("decoder") or name == "mask_token" for name in tensors)


# ----------------------------------------------------------------------------- pictures


@torch.no_grad()
def pictures(model: MAE, pixels: Tensor, mask: Tensor, norm_pix: bool = True) -> list[list[Tensor]]:
    """Rows of original | masked | reconstruction, each uint8 [3, S, S]; pixels: uint8 [B, 3, S, S].

    With norm_pix the prediction has no brightness of its own: each patch borrows the original's
    mean and variance, so the picture looks better than what the model knows.
    """
    p, (height, width) = model.config.patch_size, pixels.shape[2:]
    x = normalise(pixels)
    predicted, original = model.reconstruct(x, mask).float(), patchify(x, p)  # [B, K, P]
    if norm_pix:
        mean, variance = original.mean(2, keepdim=True), original.var(2, keepdim=True)  # [B, K, 1]
        predicted = predicted * (variance + 1e-6).sqrt() + mean
    grey = torch.zeros_like(original)
    columns = [original, torch.where(mask[..., None], grey, original),
               torch.where(mask[..., None], predicted, original)]
    columns = [denormalise(unpatchify(patches, height, width, p)) for patches in columns]
    return [list(row) for row in zip(*columns)]


def main() -> None:
    """Draw eight test images, what a mask leaves of them, and what the model makes of that."""
    config = settings.parse("mae", __doc__)
    model = run.load_model(MAE, config)
    data = run.load_data(config, model)
    config = settings.fill(config, model, len(data.train))
    folder = run.folder("mae", config, model, len(data.train))
    pixels = spread(data.train if data.test is None else data.test, 8)
    mask = model.draw_mask(pixels, config.mask_prob, run.generator(config.seed, "mask"))
    rows = pictures(model.eval(), pixels, mask, config.pixels == "norm")
    grid(rows, folder / "reconstructions.png", ["original", "masked", "reconstruction"])
    print(f"wrote {folder / 'reconstructions.png'}")


if __name__ == "__main__":
    run.program(main)
