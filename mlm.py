"""Masked auto-encoding for text: the encoder f_θ and the decoder g_φ of the paper, for RoBERTa.

Section 3.1, equation 2 and Appendix C of "Self-Distillation for Further Pre-training of
Transformers" (Lee et al., ICLR 2023). Each token is masked independently with probability γ
(z_k = 1) and replaced by `<mask>`; the loss of one text is -Σ_k z_k/Z · log p(x_k | x̂) with
Z = Σ_k z_k: cross-entropy, averaged over that text's own masked positions. f_θ is the Transformer
encoder, g_φ the language-model head. The model is RoBERTa (Liu et al. 2019), whose
published weights load into it.

    python mlm.py  # masked words and the model's guesses
    python mlm.py --dataset scierc --init FacebookAI/roberta-base

Letters of shapes: B batch, K positions (tokens), D width, H heads, V vocabulary, N the real tokens
of a batch (at most B·K), M the masked ones. A batch is as wide as its longest text, so most of it
is padding: everything but attention runs on the N real tokens, packed into one [N, D] matrix.
"""
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from support import fetch, parallel, run, settings
from support.fetch import BadInput

RECIPES = ("mask", "80-10-10")


@dataclass(frozen=True)
class Config:
    """Sizes and special tokens; the defaults are RoBERTa-base's."""

    vocab_size: int = 50265
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp: int = 3072
    max_positions: int = 514  # rows of the position table; the first pad_id + 1 stay unused
    pad_id: int = 1
    mask_id: int = 50264
    special_ids: tuple[int, ...] = (0, 1, 2, 3, 50264)  # <s> <pad> </s> <unk> <mask>: never masked
    eps: float = 1e-5
    dropout: float = 0.1

    @property
    def max_length(self) -> int:
        """Tokens that a text may have, `<s>` and `</s>` included."""
        return self.max_positions - self.pad_id - 1


class Attention(nn.Module):
    """Every token attends to all real tokens of its own text."""

    def __init__(self, config: Config, dropout: nn.Dropout):
        super().__init__()
        assert config.width % config.heads == 0, "the heads must share the width equally"
        self.heads, self.dropout = config.heads, dropout
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, place: Tensor, attention: Tensor) -> Tensor:
        B, K = attention.shape
        qkv = unpack(self.qkv(x), place, B, K)  # [B, K, 3D]
        q, k, v = qkv.view(B, K, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # 3 of [B, H, K, D/H]
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=attention[:, None, None],
                                           dropout_p=self.dropout.p if self.training else 0.)
        x = x.transpose(1, 2).reshape(B * K, -1).index_select(0, place)  # [N, D]
        return self.out(x)


class Block(nn.Module):
    """One Transformer layer; each LayerNorm comes after its residual sum ("post-norm")."""

    def __init__(self, config: Config, dropout: nn.Dropout):
        super().__init__()
        self.dropout = dropout
        self.attention = Attention(config, dropout)
        self.norm1 = nn.LayerNorm(config.width, config.eps)
        self.fc1 = nn.Linear(config.width, config.mlp)
        self.fc2 = nn.Linear(config.mlp, config.width)
        self.norm2 = nn.LayerNorm(config.width, config.eps)

    def forward(self, x: Tensor, place: Tensor, attention: Tensor) -> Tensor:
        x = self.norm1(x + self.dropout(self.attention(x, place, attention)))
        return self.norm2(x + self.dropout(self.fc2(F.gelu(self.fc1(x)))))


def add_rows(matrix: Tensor, rows: Tensor, gradient: Tensor) -> None:
    """Add the gradient [N, D] of so many of a matrix's rows Long[N] to the matrix's own."""
    if matrix.grad is None:
        matrix.grad = torch.zeros_like(matrix)
    matrix.grad.index_add_(0, rows, gradient)


class Encoder(nn.Module):
    """f_θ: token ids to one vector a token."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.word = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Embedding(config.max_positions, config.width)
        self.token_type = nn.Parameter(torch.zeros(1, config.width))  # one type of token
        self.norm = nn.LayerNorm(config.width, config.eps)
        self.dropout = nn.Dropout(config.dropout)  # one for all layers: its p is the model's
        self.blocks = nn.ModuleList(Block(config, self.dropout) for _ in range(config.depth))

    def forward(self, ids: Tensor, attention: Tensor | None = None, noise: Tensor | None = None,
                tied: bool = False) -> Tensor:
        """Hidden states [B, K, D] of ids [B, K], zero where `attention` [B, K] is False.

        attention defaults to what is not padding. noise [B, K, D] is added to the word embeddings,
        which are then constants: R3F (Aghajanyan et al. 2021) does not train what it perturbs.
        tied: the head uses the word embedding, too, in the same loss, and `.backward()` is called
        on it: `torch.autograd.grad` would miss these rows.
        """
        config, (B, K) = self.config, ids.shape
        assert K <= config.max_length, f"{K} tokens, the model takes at most {config.max_length}"
        real = ids != config.pad_id
        attention = real if attention is None else attention.bool()
        place = attention.flatten().nonzero().squeeze(1)  # [N]
        order = (real.cumsum(1) * real).flatten()[place]  # [N], counts from 1
        rows = ids.flatten()[place]  # [N]
        word = self.word(rows)  # [N, D]
        if tied and word.requires_grad and parallel.world() == 1:  # several would average too early
            # the head's gradient [V, D] is there by then: few rows go into it, not another [V, D]
            word = word.detach().requires_grad_()
            word.register_hook(partial(add_rows, self.word.weight, rows))
        if noise is not None:
            word = word.detach() + noise.flatten(0, 1)[place]  # [N, D]
        # RoBERTa's positions start behind the padding id
        x = self.dropout(self.norm(word + self.position(config.pad_id + order) + self.token_type))
        for block in self.blocks:
            x = block(x, place, attention)
        return unpack(x, place, B, K)  # [B, K, D]


class Head(nn.Module):
    """g_φ: one score a vocabulary entry; its last matrix is the word embedding ("tied")."""

    def __init__(self, config: Config):
        super().__init__()
        self.dense = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, config.eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: Tensor, word: Tensor) -> Tensor:
        return F.linear(self.norm(F.gelu(self.dense(x))), word, self.bias)


def unpack(x: Tensor, place: Tensor, B: int, K: int) -> Tensor:
    """Put N packed rows back to their places in a batch [B, K, …] that is zero elsewhere."""
    return x.new_zeros(B * K, x.shape[1]).index_copy(0, place, x).view(B, K, -1)  # [B, K, …]


class MLM(nn.Module):
    """The masked language model g_φ ∘ f_θ, with its loss and its weights on disk."""

    modality = "text"

    def __init__(self, config: Config = Config(), generator: torch.Generator | None = None):
        super().__init__()
        self.config = config
        self.encoder, self.head = Encoder(config), Head(config)
        self.tokenizer: Tokenizer | None = None
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02, generator=generator)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.encoder.word.weight[config.pad_id].detach())

    def draw_mask(self, ids: Tensor, prob: float, generator: torch.Generator) -> Tensor:
        """z ~ Bernoulli(γ), Bool [B, K] for ids [B, K], True = masked; special tokens never are."""
        z = torch.rand(ids.shape, generator=generator) < prob  # [B, K]
        return z.to(ids.device) & ~torch.isin(ids, ids.new_tensor(self.config.special_ids))

    def logits(self, ids: Tensor, attention: Tensor | None = None) -> Tensor:
        """Scores [B, K, V] for ids [B, K], zero at padding."""
        attention = ids != self.config.pad_id if attention is None else attention.bool()
        x = self.encoder(ids, attention)  # [B, K, D]
        place = attention.flatten().nonzero().squeeze(1)  # [N]
        x = x.flatten(0, 1).index_select(0, place)  # [N, D]
        scores = self.head(x, self.encoder.word.weight)  # [N, V]
        return unpack(scores, place, *ids.shape)  # [B, K, V]

    def loss(self, ids: Tensor, mask: Tensor, attention: Tensor | None = None,
             corrupted: Tensor | None = None) -> Tensor:
        """Line 10 of Algorithm 1, [B]: -Σ_k z_k/Z · log p(x_k | x̂), 0 where nothing is masked.

        ids [B, K] are the words to predict, mask [B, K] is z, corrupted [B, K] is x̂ (default:
        `<mask>` wherever z = 1).
        """
        x_hat = ids.masked_fill(mask, self.config.mask_id) if corrupted is None else corrupted
        attention = ids != self.config.pad_id if attention is None else attention
        return self.nll(self.encoder(x_hat, attention), ids, mask)  # [B]

    def nll(self, hidden: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """The loss [B] of hidden states f_θ(x̂) [B, K, D]."""
        # only the masked positions go through the head: nobody asks for the other scores
        place = mask.flatten().nonzero().squeeze(1)  # [M]
        masked = hidden.flatten(0, 1).index_select(0, place)  # [M, D]
        scores = self.head(masked, self.encoder.word.weight)  # [M, V]
        nll = F.cross_entropy(scores.float(), ids[mask], reduction="none")  # [M]
        nll = torch.zeros(ids.shape, device=ids.device).masked_scatter(mask, nll)  # [B, K]
        Z = mask.sum(1)  # [B]
        return nll.sum(1) / Z.clamp(min=1)

    def forward(self, ids: Tensor, mask: Tensor, unmasked: bool,
                corrupted: Tensor) -> tuple[Tensor, Tensor | None]:
        """Line 10's ℓ¹_j [B] and, if `unmasked`, line 11's f_θ(x_j) [B, K, D], else None.

        One call, as torch's DistributedDataParallel wants it, and x̂ and x as one batch of 2B:
        fewer, larger products. Both go into one loss (the encoder's `tied`).
        """
        attention = ids != self.config.pad_id  # [B, K]
        if not unmasked:
            return self.nll(self.encoder(corrupted, attention, tied=True), ids, mask), None
        both = torch.cat([corrupted, ids])  # [2B, K]
        both = self.encoder(both, attention.repeat(2, 1), tied=True)  # [2B, K, D]
        masked, hidden = both.chunk(2)  # 2 of [B, K, D]
        return self.nll(masked, ids, mask), hidden

    @classmethod
    def from_pretrained(cls, source: str | Path, **sizes: int) -> "MLM":
        """The model stored at `source`: RobertaForMaskedLM's tensors (safetensors) or our own.

        `source` is a .safetensors file, a folder, a hub id or "tiny"; `sizes`, fields of Config,
        fill in what the file's configuration does not say. A tokenizer.json in the same folder
        becomes `.tokenizer`. Raises BadInput for a file that is not wholly understood.
        """
        path = fetch.weights(source, "mlm")
        tensors, stored = fetch.read_weights(path)
        model = fetch.blank(cls, lambda: read_config(path, tensors, stored, sizes), tensors, path)
        config, wanted = model.config, model.state_dict()
        if any(name.startswith("roberta.") for name in tensors):
            refuse_untied(path, tensors)
            table = hub_names(config.depth)
            found = fetch.translate(tensors, table, wanted, dropped=dropped(tensors))
        else:
            found = fetch.translate(tensors, {name: name for name in wanted}, wanted)
        model.to_empty(device="cpu").load_state_dict(found)
        beside = path.parent / "tokenizer.json"
        if beside.exists():
            model.tokenizer = read_tokenizer(beside, config)
        return model.eval()

    def save_tokenizer(self, folder: Path) -> None:
        """Write tokenizer.json into a folder, where the model has a tokenizer."""
        if self.tokenizer is not None:
            with fetch.whole(folder / "tokenizer.json") as part:
                part.write_text(self.tokenizer.to_str(pretty=True), encoding="utf-8")

    def save(self, path: str | Path, **lineage: str) -> None:
        """Write weights, with configuration and lineage as metadata; the tokenizer goes beside."""
        path = Path(path)
        config = {"model": "mlm", **asdict(self.config)}
        self.save_tokenizer(path.parent)  # first, so that no weights ever lack theirs
        fetch.save_weights(self.state_dict(), config, path, **lineage)


def corrupt(ids: Tensor, mask: Tensor, recipe: str, generator: torch.Generator,
            config: Config = Config()) -> Tensor:
    """x̂ [B, K] from ids [B, K] and z [B, K]: the paper's "mask" or RoBERTa's "80-10-10".

    "80-10-10" (Devlin et al. 2019) makes 80 % of the masked positions `<mask>`, 10 % a random word
    and leaves 10 % as they are; all of them are predicted. Raises BadInput for another recipe.
    """
    if recipe not in RECIPES:
        raise BadInput(f"no recipe {recipe!r} to corrupt text: choose one of {', '.join(RECIPES)}")
    if recipe == "mask":
        return ids.masked_fill(mask, config.mask_id)
    special = sorted(config.special_ids)
    u = torch.rand(ids.shape, generator=generator).to(ids.device)  # [B, K]
    words = torch.randint(config.vocab_size - len(special), ids.shape, generator=generator)
    for s in special:  # step over the special ids
        words += words >= s
    x_hat = ids.masked_fill(mask & (u < 0.8), config.mask_id)
    return torch.where(mask & (u >= 0.9), words.to(ids.device), x_hat)


# ----------------------------------------------------------------------------- weights


def hub_names(depth: int) -> dict[str, str | tuple[str, ...]]:
    """Our name -> RobertaForMaskedLM's; several of theirs are stacked along the first axis."""
    table = {"encoder.word.weight": "roberta.embeddings.word_embeddings.weight",
             "encoder.position.weight": "roberta.embeddings.position_embeddings.weight",
             "encoder.token_type": "roberta.embeddings.token_type_embeddings.weight",
             "head.bias": "lm_head.bias"}
    for kind in ("weight", "bias"):
        table[f"encoder.norm.{kind}"] = f"roberta.embeddings.LayerNorm.{kind}"
        table[f"head.dense.{kind}"] = f"lm_head.dense.{kind}"
        table[f"head.norm.{kind}"] = f"lm_head.layer_norm.{kind}"
        for i in range(depth):
            ours, theirs = f"encoder.blocks.{i}", f"roberta.encoder.layer.{i}"
            table[f"{ours}.attention.qkv.{kind}"] = tuple(
                f"{theirs}.attention.self.{part}.{kind}" for part in ("query", "key", "value"))
            table[f"{ours}.attention.out.{kind}"] = f"{theirs}.attention.output.dense.{kind}"
            table[f"{ours}.norm1.{kind}"] = f"{theirs}.attention.output.LayerNorm.{kind}"
            table[f"{ours}.fc1.{kind}"] = f"{theirs}.intermediate.dense.{kind}"
            table[f"{ours}.fc2.{kind}"] = f"{theirs}.output.dense.{kind}"
            table[f"{ours}.norm2.{kind}"] = f"{theirs}.output.LayerNorm.{kind}"
    return table


# Copies of other tensors that some files carry; one that differs is a model without tied weights.
TWINS = {"lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
         "lm_head.decoder.bias": "lm_head.bias"}


def dropped(tensors: dict[str, Tensor]) -> tuple[str, ...]:
    """Names left out on purpose: copies, the constant 0, 1, 2, …, and the layer of another task."""
    return tuple(name for name in tensors if name in TWINS or name.startswith("roberta.pooler.")
                 or name == "roberta.embeddings.position_ids")


def refuse_untied(path: Path, tensors: dict[str, Tensor]) -> None:
    """Raise BadInput where a copy differs: that would be a model without tied weights."""
    for copy, twin in TWINS.items():
        if copy in tensors and twin in tensors and not torch.equal(tensors[copy], tensors[twin]):
            raise BadInput(f"{path}: {copy} differs from {twin}, but here they are one tensor")


# Our field -> the entry of a hub's config.json.
HUB_FIELDS = {"vocab_size": "vocab_size", "width": "hidden_size", "depth": "num_hidden_layers",
              "heads": "num_attention_heads", "mlp": "intermediate_size",
              "max_positions": "max_position_embeddings", "pad_id": "pad_token_id",
              "eps": "layer_norm_eps", "dropout": "hidden_dropout_prob"}
PUBLISHED_HEADS = {768: 12, 1024: 16}  # by width: roberta-base, roberta-large


def read_config(path: Path, tensors: dict[str, Tensor], stored: dict, given: dict) -> Config:
    """A stored model's sizes: from our own metadata, else a hub's config.json, else the tensors."""
    kind = stored.get("model") or stored.get("model_type", "roberta")
    if kind == "mlm":
        own = stored | {"special_ids": tuple(stored["special_ids"])}
        return sound(Config(**{item.name: own[item.name] for item in fields(Config)}))
    rows = {name: tensor.shape[0] for name, tensor in tensors.items() if tensor.ndim}
    word = "roberta.embeddings.word_embeddings.weight"
    if kind != "roberta" or word not in rows:
        image = kind == "mae" or "vit" in str(kind) or any("patch" in name for name in tensors)
        hint = ": this is an image model, use mae.py" if image else ""
        raise BadInput(f"{path} holds no RoBERTa masked language model (its kind is {kind!r}, its "
                       f"first tensor {min(tensors, default='none')}){hint}")
    sizes = {ours: stored[theirs] for ours, theirs in HUB_FIELDS.items() if theirs in stored}
    if not stored:
        layers = {name.split(".")[3] for name in tensors if ".encoder.layer." in name}
        width = tensors[word].shape[1]
        sizes = {"vocab_size": rows[word], "width": width, "depth": len(layers),
                 "heads": PUBLISHED_HEADS.get(width),
                 "mlp": rows.get("roberta.encoder.layer.0.intermediate.dense.weight", 1),
                 "max_positions": rows.get("roberta.embeddings.position_embeddings.weight", 1)}
    sizes = given | sizes if stored else sizes | given
    if sizes["heads"] is None:
        raise BadInput(f"nothing says into how many heads {path} splits {sizes['width']} channels: "
                       "put its config.json beside it or call from_pretrained(source, heads=...)")
    mask_id = sizes["vocab_size"] - 1  # the last entry; <s> <pad> </s> <unk> are the first
    return sound(Config(**{"mask_id": mask_id, "special_ids": (0, 1, 2, 3, mask_id)} | sizes))


def sound(config: Config) -> Config:
    """The same; AssertionError where a model could not read a single word with it."""
    ids = (config.pad_id, config.mask_id, *config.special_ids)
    assert max(ids) < config.vocab_size, "its special tokens are not in its vocabulary"
    assert config.max_length > 2, "there is no room for a word"
    return config


def read_tokenizer(path: Path, config: Config) -> Tokenizer:
    """A model's tokenizer.json; BadInput where it is another model's or none."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises no narrower kind
        raise BadInput(f"{path} is no tokenizer ({error})") from error
    for token, wanted in (("<mask>", config.mask_id), ("<pad>", config.pad_id)):
        if (found := tokenizer.token_to_id(token)) != wanted:
            raise BadInput(f"{path} is not this model's tokenizer: its {token} is {found}, the "
                           f"model's is {wanted}")
    if {tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")} - set(config.special_ids):
        raise BadInput(f"{path} is not this model's tokenizer: its <s> or </s> is another")
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise BadInput(f"{path} is not this model's tokenizer: it has {tokenizer.get_vocab_size()} "
                       f"words, the model {config.vocab_size}")
    return tokenizer


# ----------------------------------------------------------------------------- demonstration


def main() -> None:
    """Print masked words of a few texts beside what the model guesses for them."""
    config = settings.parse("mlm", __doc__)
    model = run.load_model(MLM, config).eval()
    data = run.load_data(config, model)
    config = settings.fill(config, model, len(data.train))
    sizes, tokenizer, generator = model.config, model.tokenizer, run.generator(config.seed, "mlm")
    ids = data.train[torch.randperm(len(data.train), generator=generator)[:4]]  # [B, K]
    z = model.draw_mask(ids, config.mask_prob, generator)  # [B, K]
    x_hat = corrupt(ids, z, "mask", generator, sizes)  # [B, K]
    with torch.no_grad():
        chance, guess = model.logits(x_hat).softmax(-1).topk(3)  # 2 of [B, K, 3]
        loss = model.loss(ids, z)  # [B]
    for b in range(len(ids)):
        words = x_hat[b, 1:(ids[b] != sizes.pad_id).sum() - 1]  # without <s> and </s>
        print(f"\n{tokenizer.decode(words.tolist(), skip_special_tokens=False)}")
        for k in z[b].nonzero().flatten().tolist():
            best = ", ".join(f"{tokenizer.decode([t])!r} {p:.0%}" for t, p in
                             zip(guess[b, k].tolist(), chance[b, k].tolist(), strict=True))
            print(f"    {tokenizer.decode(ids[b, k:k + 1].tolist())!r:<16} guesses: {best}")
        print(f"    loss {loss[b]:.2f} over {z[b].sum()} masked tokens")


if __name__ == "__main__":
    run.program(main)
