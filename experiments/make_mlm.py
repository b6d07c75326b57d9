"""How weights/tokenizer.json and weights/tiny-mlm.safetensors were made.

A small RoBERTa (4 layers of 128 channels, 1.1 M numbers) trained from scratch with Bernoulli masks
(equation 2; γ = 0.4 at first, then 0.15) on the English inside the standard library: long strings
and comments of the modules that the data set `pydocs` does not read. A second phase also guesses a
text's words from `<s>` alone: plain MLM leaves that token idle, and fine-tuning, which reads it,
then stays at the most frequent class for hundreds of steps.

    python -m experiments.make_mlm  # --trial --out FOLDER: a hundredth of the steps
"""
import argparse
import ast
import math
import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import distill
import mlm
from mlm import MLM, Config
from support import settings
from support.fetch import ROOT
from support.texts import PYDOCS, Texts, stdlib
from support.watch import Sample

VOCABULARY, LENGTH, BATCH = 2000, 128, 32
STEPS = 8000, 1200  # of plain MLM, and with words guessed from `<s>`
LR, FIRST_LR, WARMUP, GAMMA = 1e-3, 5e-4, 0.02, 0.15  # warm-up: share of the steps
EARLY, EARLY_GAMMA = 0.4, 0.4  # this share of the steps first, with a higher mask probability


def pydocs_other() -> Iterator[str]:
    """English from the modules that pydocs does not read: long strings and comments, each once."""
    used = {name.strip("_") for label, modules in PYDOCS.items() for name in (label, *modules)}
    seen = set()
    for file in sorted(stdlib().rglob("*.py")):
        parts = file.relative_to(stdlib()).parts
        words = set(re.split(r"[._/]", "/".join(parts)))
        if used & words or {"site-packages", "dist-packages"} & set(parts):
            continue
        try:
            source = file.read_text(encoding="utf-8")
            nodes = list(ast.walk(ast.parse(source)))
        except (SyntaxError, ValueError):  # some tests are wrong on purpose
            continue
        values = [node.value for node in nodes if isinstance(node, ast.Constant)]
        comments = re.findall(r"(?m)(?:^[ \t]*#.*\n)+", source)
        found = [value for value in values if isinstance(value, str)]
        found += [re.sub(r"(?m)^[ \t]*#+", "", comment) for comment in comments]
        for text in (" ".join(text.split()) for text in found):
            letters = sum(c.isascii() and (c.isalpha() or c == " ") for c in text)
            if text.count(" ") < 7 or letters < 0.8 * len(text) or not text.isprintable():
                continue  # too short to say anything, or no English
            if text not in seen:
                seen.add(text)
                yield text


def make_tokenizer(lines: list[str]) -> Tokenizer:
    """Byte-level BPE with RoBERTa's special tokens where RoBERTa has them: 0 to 3 and the last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(lines, trainers.BpeTrainer(
        vocab_size=VOCABULARY - 1, special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer.add_special_tokens(["<mask>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    return tokenizer


def sequences(encoded: Iterable[list[int]]) -> Iterator[list[int]]:
    """`<s> … </s>` of at most LENGTH tokens: long texts in pieces, short ones joined."""
    waiting: list[int] = []
    for ids in encoded:
        if waiting and len(waiting) + len(ids) > LENGTH - 2:
            yield [0, *waiting, 2]
            waiting = []
        waiting = waiting + ids
        while len(waiting) >= LENGTH // 3:
            yield [0, *waiting[:LENGTH - 2], 2]
            waiting = waiting[LENGTH - 2:]
    if waiting:
        yield [0, *waiting, 2]


def corpus(lines: list[str], tokenizer: Tokenizer) -> Texts:
    """All sequences of the training English, as one tensor."""
    encoded = [e.ids for e in tokenizer.encode_batch(lines, add_special_tokens=False)]
    found = list(sequences(encoded))
    offsets = torch.tensor([0] + [len(ids) for ids in found]).cumsum(0)
    flat = torch.tensor([i for ids in found for i in ids], dtype=torch.int32)
    return Texts(flat, offsets, pad_id=1)


@torch.no_grad()
def initialise(model: MLM, train: Texts) -> None:
    """A start that shortens the long plateau where a small model knows nothing but frequencies.

    The head's bias knows them from the start, but of special tokens, which are never masked;
    weights are as large as a width of 128 asks for (RoBERTa's 0.02 suits 768), and positions are
    sinusoids, so that neighbours are easy to find.
    """
    counts = torch.bincount(train.ids.long(), minlength=VOCABULARY).float()  # [V]
    counts[list(model.config.special_ids)] = 0
    model.head.bias.copy_(((counts + 0.1) / (counts + 0.1).sum()).log())
    model.encoder.word.weight.mul_(2)
    for module in [*model.encoder.blocks.modules(), model.head.dense]:
        if isinstance(module, torch.nn.Linear):
            module.weight.mul_(3)
    rows, width = model.encoder.position.weight.shape
    angle = torch.arange(rows)[:, None] / 1000 ** (torch.arange(width // 2) * 2 / width)
    model.encoder.position.weight.copy_(0.06 * torch.cat([angle.sin(), angle.cos()], 1))


def words_from_first(model: MLM, ids: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """A scalar: cross-entropy of all of a text's words, each guessed from `<s>` of x̂ alone."""
    hidden = model.encoder(mlm.corrupt(ids, z, "mask", None, model.config), ids != 1)  # [B, K, D]
    logp = model.head(hidden[:, 0], model.encoder.word.weight).log_softmax(-1)  # [B, V]
    words = ~torch.isin(ids, torch.tensor(model.config.special_ids))  # [B, K]
    return -logp.gather(1, ids)[words].mean()


def fit(model: MLM, train: Texts, steps: int, lr: float, generator: torch.Generator,
        first: bool = False) -> None:
    """Line 10's loss alone, or with `first` plus that of the words guessed from `<s>`; in place."""
    # so small a model does not overfit a million tokens: dropout would only slow it
    model.encoder.dropout.p = 0.0
    config = settings.Config(lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    optimiser = distill.adamw(model, config)
    for group in optimiser.param_groups:
        group["eps"] = 1e-6
    warmup = max(1, int(WARMUP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(
        (step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps)))
    begin, model = time.time(), model.train()
    for step in range(steps):
        at = step * BATCH % (len(train) - BATCH + 1)
        if step == 0 or at < BATCH:
            order = torch.randperm(len(train), generator=generator)
        ids = train[order[at:at + BATCH]].long()  # [B, K]
        gamma = EARLY_GAMMA if step < EARLY * steps and not first else GAMMA
        z = model.draw_mask(ids, gamma, generator)  # [B, K]
        loss = (model.loss(ids, z) * z.sum(1)).sum() / z.sum()  # short texts are noisy: less weight
        if first:
            loss = loss + words_from_first(model, ids, z)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 99 or step + 1 == steps:
            print(f"step {step + 1}: loss {loss:.3f}, {time.time() - begin:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trial", action="store_true", help="a hundredth of the steps")
    parser.add_argument("--out", type=Path, default=ROOT / "weights")
    flags = parser.parse_args()
    steps, first_token_steps = (n // (100 if flags.trial else 1) for n in STEPS)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)

    lines = list(pydocs_other())
    tokenizer = make_tokenizer(lines)
    everything = corpus(lines, tokenizer)
    order = torch.randperm(len(everything), generator=generator)
    held, train = (everything.take(part) for part in order.tensor_split([len(order) // 20]))
    size = tokenizer.get_vocab_size()
    assert size == VOCABULARY and tokenizer.token_to_id("<mask>") == size - 1
    model = MLM(Config(size, width=128, depth=4, heads=4, mlp=512, max_positions=LENGTH + 2,
                       mask_id=size - 1, special_ids=(0, 1, 2, 3, size - 1)))
    model.tokenizer = tokenizer
    print(f"{len(lines)} texts, {len(train)} sequences, {len(train.ids)} tokens; "
          f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)

    initialise(model, train)
    unseen = Sample(held, model, settings.Config("pydocs", mask_prob=GAMMA), distill.mask_input)
    fit(model, train, steps, LR, generator)
    print(f"held-out L_MAE {unseen.mae_loss(model):.3f}")
    fit(model, train, first_token_steps, FIRST_LR, generator, first=True)
    result = f"held-out L_MAE {unseen.mae_loss(model):.3f}"
    print(result)
    model.save(flags.out / "tiny-mlm.safetensors", seed="0", result=result,
               corpus=f"standard library of Python {sys.version.split()[0]}",
               steps=f"{steps} + {first_token_steps}")


if __name__ == "__main__":
    main()
