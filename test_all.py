"""The paper, proved: models, Algorithm 1, equation 1, the baselines and the five programs.

    pytest test_all.py  # offline, about a minute on one CPU core

Everything is compared with another's numbers (golden/README.md says whose), with a second way of
computing the same, or with what the mathematics demands; the programs run as their pages say.
"""
import copy
import csv
import gc
import json
import math
import random
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import baselines
import distill
import finetune
import mae
import mlm
from support import draws, loop, program, recall, settings, test_helpers
from support.fetch import ROOT, BadInput
from support.run import Run
from support.test_helpers import batch, both, close, config_of, examples, normal, same, tiny

pytest_plugins = ["support.test_helpers"]  # its fixtures


def linear(encoder: nn.Module) -> list[str]:
    """The names of what MARS measures and projects."""
    return [f"{name}.weight" for name, layer in encoder.named_modules()
            if isinstance(layer, nn.Linear)]


def readme(heading: str) -> str:
    """The README's block of Python that begins with this line."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.search(rf"```python\n({heading}\n.*?)```", text, re.S)[1]


# ============================================================================= mae.py, mlm.py


def test_models_equal_hugging_faces():
    """ViTMAEForPreTraining with three mask counts, RobertaForMaskedLM with padding."""
    model = mae.MAE.from_pretrained(test_helpers.GOLDEN[mae.MAE])
    expected = load_file(test_helpers.GOLDEN[mae.MAE].with_suffix(".expected.safetensors"))
    pictures, mask = expected["images"], expected["mask"]
    assert len(set(mask.sum(1).tolist())) == 3
    with torch.no_grad():  # float32 in another order of summation; values of size 1 to 5
        close(model.encoder(pictures), expected["hidden_full"], 1e-5)
        close(model.reconstruct(pictures, mask), expected["pred"], 1e-5)
        close(model.loss(pictures, mask), expected["loss_per_image_norm_pix"], 1e-5)
        close(model.loss(pictures, mask, norm_pix=False), expected["loss_per_image_raw_pix"], 1e-5)
    model = mlm.MLM.from_pretrained(test_helpers.GOLDEN[mlm.MLM])
    expected = load_file(test_helpers.GOLDEN[mlm.MLM].with_suffix(".expected.safetensors"))
    ids, attention = expected["ids"], expected["attention"]
    with torch.no_grad():  # the same
        close(model.encoder(ids), expected["hidden"], 1e-5, 1e-5)
        close(model.logits(ids), expected["logits"], 1e-5, 1e-5)
        assert torch.equal(model.encoder(ids, attention), model.encoder(ids))


def test_a_texts_loss_is_the_mean_over_its_masked_words():
    """Whatever its batch mates are: here it has none, and no padding."""
    model, ids = tiny("text"), examples("text")
    mask = model.draw_mask(ids, 0.4, draws.generator("a mask"))
    losses = model.loss(ids, mask)  # [B]
    for x, z, loss in zip(ids, mask, losses, strict=True):
        x, z = x[x != 1], z[x != 1]  # 2 of [K]
        scores = model.logits(x.masked_fill(z, 59)[None])[0]  # [K, V]
        nll = F.cross_entropy(scores, x, reduction="none")  # [K]
        # float32 in another order of summation
        close(loss, nll[z].sum() / max(1, z.sum()), 2e-6, 1e-6)
    # with x̂ given, of ids only the masked words count
    other = torch.where(mask, ids, 4 + (ids + 7) % 45)
    assert torch.equal(model.loss(other, mask, ids != 1, ids.masked_fill(mask, 59)), losses)


@both
def test_losses_where_nothing_or_everything_is_masked(modality):
    model, x = tiny(modality), batch(modality, slice(3))
    word = torch.ones(3, 4, dtype=torch.bool) if modality == "image" else x > 3
    mask = word & torch.tensor([[False], [True], [True]])
    loss = model.loss(x, mask)
    assert loss[0] == 0 and (loss[1:] > 0).all()
    loss.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    for rows in (slice(1), slice(1, 2)):  # nothing masked in the whole batch, nothing visible
        assert model.loss(x[rows], mask[rows]).isfinite()
    if modality == "image":
        assert not model.encoder(x, mask)[1:, 1:].any()  # masked rows are zero


def test_patches_and_positions_are_maes():
    """There and back; the sine table; both where pictures have another size and are not square."""
    pictures, table = normal(2, 3, 16, 24), mae.sincos_positions(16, 3)
    patches = mae.patchify(pictures, 8)  # [B, K, P]
    assert torch.equal(mae.unpatchify(patches, 16, 24, 8), pictures)
    for k in range(9):
        for i in range(4):
            column, row = (place * 10000 ** (-i / 4) for place in (k % 3, k // 3))
            expected = [math.sin(column), math.cos(column), math.sin(row), math.cos(row)]
            close(table[0, 1 + k, i::4], torch.tensor(expected), 1e-6)  # float32 of a float64 table
    assert (table[0, 0] == 0).all() and torch.equal(mae.resize_positions(table, 3, 3), table)
    plane = mae.resize_positions(table, 6, 5)[0, 1:].unflatten(0, (6, 5))
    # the half that tells the column still does so alone, but for float32 weights of interpolation
    close(plane[:, :, :8], plane[:1, :, :8].expand(6, -1, -1), 1e-5)
    encoder = tiny("image").encoder
    encoder.blocks = nn.ModuleList()  # what is left are patches and their places
    x = encoder.patch(patches) + mae.resize_positions(encoder.positions, 2, 3)[:, 1:]  # [B, K, D]
    close(encoder(pictures)[:, 1:], encoder.norm(x), 1e-5)  # float32 in another order


def assert_share(found: float, expected: float, n: int) -> None:
    """A share of n independent draws within five of its standard deviations."""
    assert abs(found - expected) < 5 * (expected * (1 - expected) / n) ** 0.5


def test_masks_are_bernoulli_or_of_exact_count():
    """§3.1's law for patches and words; MAE's; special tokens never; the seed decides."""
    numbers = torch.Generator().manual_seed(0)
    mask = mae.bernoulli_mask(400, 100, 0.6, numbers)
    model, ids = tiny("text"), torch.randint(0, 60, (400, 100), generator=numbers)
    words = ~torch.isin(ids, torch.tensor(model.config.special_ids))
    of_text = model.draw_mask(ids, 0.15, numbers)
    assert not of_text[~words].any()
    for z, free, prob in ((mask, torch.ones_like(mask), 0.6), (of_text, words, 0.15)):
        assert_share(z[free].double().mean().item(), prob, int(free.sum()))
        # independent: counts vary as a binomial's; a variance of 400 within 5 of its deviations
        counts = (z.sum(1) - prob * free.sum(1)).double().square().mean()
        assert abs(counts / (prob * (1 - prob) * free.sum() / 400) - 1) < 5 * (2 / 400) ** 0.5
    fixed = mae.fixed_mask(400, 49, 0.75, numbers)
    assert (fixed.sum(1) == 49 - 12).all()  # ⌊49 · 0.25⌋ stay
    for share in fixed.double().mean(0).tolist():
        assert_share(share, 37 / 49, 400)
    again = tiny("image").draw_mask(torch.zeros(400, 3, 80, 80), 0.6, draws.generator("seed"))
    assert torch.equal(again, mae.bernoulli_mask(400, 100, 0.6, draws.generator("seed")))


def test_masked_words_are_replaced_by_80_10_10():
    config, numbers = tiny("text").config, torch.Generator().manual_seed(0)
    ids = torch.randint(4, 59, (400, 100), generator=numbers)
    mask = mae.bernoulli_mask(400, 100, 0.5, numbers)
    plain = mlm.corrupt(ids, mask, "mask", numbers, config)
    assert torch.equal(plain, ids.masked_fill(mask, 59))
    x_hat = mlm.corrupt(ids, mask, "80-10-10", numbers, config)
    assert torch.equal(x_hat[~mask], ids[~mask])
    n, masked = int(mask.sum()), x_hat[mask]
    changed = masked[(masked != 59) & (masked != ids[mask])]
    assert_share(masked.eq(59).double().mean().item(), 0.8, n)
    assert_share(len(changed) / n, 0.1 * 54 / 55, n)  # a random word may be the word itself
    assert set(changed.tolist()) == set(range(4, 59))


@both
def test_bf16_is_near_float32(modality):
    """Loss and hidden states under autocast; bf16 keeps 8 bits of a number, 1 in 256."""
    model, x, values = tiny(modality), batch(modality), []
    mask = model.draw_mask(x, 0.5, draws.generator("a mask"))
    for precision in ("fp32", "bf16"):
        with torch.no_grad(), settings.autocast(config_of(precision=precision)):
            values.append(torch.cat([model.loss(x, mask), model.encoder(x).float().flatten()]))
    close(values[1], values[0], 2e-2, 2e-2)
    assert not torch.equal(*values)


# ============================================================================= distill.py


def same_training(a: nn.Module, b: nn.Module, start: nn.Module) -> None:
    """Of every tensor's way from the start, what differs is rounding that Adam's 1/√v enlarges."""
    for name, x in a.state_dict().items():
        y, z = (model.state_dict()[name] for model in (b, start))
        if name.endswith("qkv.bias"):  # a key's does nothing: Adam makes whole steps of rounding
            x, y, z = (torch.cat([t.chunk(3)[0], t.chunk(3)[2]]) for t in (x, y, z))
        # of 120 runs the worst had 8e-4; forgetting that LayerNorms do not decay makes 1e-2
        assert (x - y).norm() <= 2e-3 * (x - z).norm(), name


def test_distillation_loss_is_line_11():
    student, teacher = (normal(3, 5, 4, seed=s).requires_grad_() for s in (0, 1))
    loss = distill.distillation_loss(student, teacher)
    close(loss, ((student - teacher) ** 2).sum((1, 2)), 1e-5)  # float32 sums of 20 squares
    loss.sum().backward()
    assert student.grad.any() and teacher.grad is None  # StopGrad


@pytest.mark.parametrize("match, positions", [("cls", 1), ("hidden", None)])
@pytest.mark.parametrize("kind", ["image", "text", "ragged"])
def test_algorithm_1_equals_the_readmes(kind, match, positions):
    """Two rounds of `self_distill` are those of the README's plain rewriting, run as it stands."""
    text, names = readme("# Algorithm 1, plainly"), {}
    assert text.count("\n") <= 25
    exec(text, names)
    initial = tiny(kind)
    inputs = batch("image") if kind == "image" else examples(kind)
    expected = names["algorithm_1"](initial, inputs, 2, steps=4, batch_size=6, lr=1e-3,
                                    mask_prob=0.5, positions=positions)
    config = config_of(rounds=2, match=match, betas=(0.9, 0.95), warmup=0.0, clip=0.0)
    found = distill.self_distill(initial, examples(kind), config)
    for ours, theirs in zip(found, expected, strict=True):
        same_training(ours, theirs, initial)
    assert same(found[0], distill.further_pretrain(initial, examples(kind), config))


def by_hand(student: nn.Module, teacher: nn.Module, x: Tensor, numbers: torch.Generator,
            config: settings.Config) -> tuple[Tensor, Tensor]:
    """L1 and L2 of a mini-batch as Algorithm 1, Table 3 and the flags have them, written out."""
    if x.ndim == 4:
        draw = mae.fixed_mask if config.masking == "fixed" else mae.bernoulli_mask
        z = student.draw_mask(x, 0.5, numbers, draw)
        l1 = student.loss(x, z, config.pixels == "norm")  # [B]
        l2 = (student.reconstruct(x, z) - teacher.reconstruct(x, z)).square().sum((1, 2))  # [B]
    else:
        z, recipe = student.draw_mask(x, 0.5, numbers), config.masking.replace("bernoulli", "mask")
        x_hat = mlm.corrupt(x, z, recipe, numbers, student.config)
        l1 = student.loss(x, z, corrupted=x_hat)  # [B]
        p, q = (model.logits(x_hat).softmax(2) for model in (teacher, student))
        l2 = ((p * (p / q).log()).sum(2) * (x != 1)).sum(1)  # [B]
    if config.match in ("hidden", "cls"):
        positions = slice(1) if config.match == "cls" else slice(None)
        l2 = (student.encoder(x) - teacher.encoder(x))[:, positions].square().sum((1, 2))  # [B]
    pairs = zip(student.encoder.named_parameters(), teacher.encoder.parameters(), strict=True)
    moves = {name: a - b for (name, a), b in pairs if a.requires_grad}
    if config.match == "l2":
        l2 = sum(move.square().sum() for move in moves.values())
    if config.match == "mars":
        l2 = sum(moves[name].abs().sum(1).max() for name in linear(student.encoder))
    return l1.mean(), l2.mean()


@pytest.mark.parametrize("changes", [
    {"match": "hidden"}, {"match": "cls", "mae_weight": 0.5}, {"match": "prediction"},
    {"match": "l2", "mae_weight": 0.5}, {"match": "mars"}, {"masking": "the other"},
    {"pixels": "raw"}], ids=str)
@pytest.mark.parametrize("kind", ["image", "ragged"])
def test_a_step_is_its_formula(kind, changes, tmp_path):
    """L1, L2 and the length of ∂(λ L1 + L2), as the first step of a round logs them."""
    if "masking" in changes:
        changes = {"masking": "fixed" if kind == "image" else "80-10-10"}
    initial, config = tiny(kind), config_of(seed=3, **changes)
    teacher = distill.self_distill(initial, examples(kind), config,
                                   run=Run(tmp_path, config))[0].requires_grad_(False)
    line = next(line for line in test_helpers.log_of(tmp_path) if "distill_loss" in line)
    assert (line["stage"], line["round"], line["step"]) == ("self-distillation", 1, 0)
    student, x = copy.deepcopy(initial), batch(kind, draws.batch(20, 6, 0, 3, "order", 1))
    L1, L2 = by_hand(student, teacher, x, draws.generator(3, "mask", 1, 0), config)
    (config.mae_weight * L1 + L2).backward()
    norm = torch.stack([p.grad.norm() for p in student.parameters() if p.grad is not None]).norm()
    for name, value in (("mae_loss", L1), ("distill_loss", L2), ("grad_norm", norm)):
        # float32 in another order; differences of nearly equal states lose some digits
        assert line[name] == pytest.approx(value.item(), rel=1e-4), name


@pytest.mark.parametrize("match", ["hidden", "cls", "prediction", "l2", "mars"])
@pytest.mark.parametrize("kind", ["image", "ragged"])
def test_what_is_only_faster_or_smaller_learns_the_same(kind, match, tmp_path, monkeypatch):
    """Four parts of 6 examples, each with its own normaliser; a teacher that remembers."""
    initial, config = tiny(kind), config_of(match=match)

    def student(**changes: object) -> nn.Module:
        return distill.self_distill(initial, examples(kind), config, **changes)[1]

    plain = student()
    same_training(plain, student(accumulate=4), initial)
    assert same(plain, student(run=Run(tmp_path, config)))
    assert not same(plain, student(pretrain_dropout=0.1))
    monkeypatch.setattr(recall, "MOST", 0)  # no room: the teacher is asked each time
    same_training(plain, student(), initial)


@both
def test_held_out_inputs_are_measured_with_masks_that_stay_and_without_dropout(modality, tmp_path):
    initial, config, x = tiny(modality), config_of(pretrain_dropout=0.1), batch(modality)
    teacher, student = distill.self_distill(initial, examples(modality), config,
                                            heldout=examples(modality), run=Run(tmp_path, config))
    line = test_helpers.log_of(tmp_path)[-1]
    masked = distill.mask_input(initial, x, config, draws.generator(0, "watch", 0))
    left, whole = (distill.distillation_loss(model.encoder(x), teacher.encoder(x)).sum().item()
                   for model in (student, initial))
    # float32 in another order
    assert line["heldout_mae_loss"] == pytest.approx(student.loss(x, **masked).mean().item())
    assert line["heldout_distance"] == pytest.approx(left / whole, rel=1e-4)


@both
def test_what_the_caller_has_stays_as_it_was(modality):
    """The given model and the random state of torch, numpy and Python, after both functions."""
    model, data, config = test_helpers.labelled(modality, dropout=0.1, pretrain_dropout=0.1)
    model.encoder.dropout.p = 0.1
    before = copy.deepcopy(model)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    distill.self_distill(model, data.train, config)
    finetune.fine_tune(model, data, config, Run(), "fine-tuning")
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]
    assert same(model, before) and model.encoder.dropout.p == 0.1 and not model.training
    for p, q in zip(model.parameters(), before.parameters(), strict=True):
        assert p.requires_grad == q.requires_grad and p.grad is None


@both
def test_a_loss_that_is_not_finite_stops_the_run(modality):
    model, inputs = tiny(modality), examples(modality)
    model.encoder.norm.weight.data[0] = math.nan
    with pytest.raises(FloatingPointError, match="further pre-training.* step 0 .*mae_loss.* nan"):
        distill.further_pretrain(model, inputs, config_of())


def test_batches_are_epochs_laid_end_to_end():
    epochs = torch.cat([draws.batch(20, 6, step, "order") for step in range(10)]).view(3, 20)
    assert torch.equal(epochs.sort().values, torch.arange(20).expand(3, -1))
    assert len(epochs.unique(dim=0)) == 3


def test_a_step_leaves_nothing_behind(monkeypatch):
    """As many tensors live after 60 steps as after 10, whatever was logged between."""
    living = []

    def count(stage: loop.Stage) -> None:
        if stage.step in (9, 59):
            gc.collect()
            living.append(sum(type(x) is Tensor for x in gc.get_objects()))

    monkeypatch.setattr(loop.Stage, "_due", count)
    distill.further_pretrain(tiny("image"), examples("image"), config_of(steps=60))
    assert living[0] == living[1]


# ============================================================================= finetune.py


def test_scores_equal_their_definitions():
    """Accuracy, macro and micro F1, by precision and recall of each class, on random answers."""
    numbers = torch.Generator().manual_seed(0)
    for n in (1, 2, 5, 40) * 10:
        pred, target = torch.randint(0, 5, (2, n), generator=numbers)
        scores, share = [], sum(pred == target).item() / n
        for c in range(5):
            hit = sum((pred == c) & (target == c)).item()
            precision = hit / max(1, sum(pred == c).item())
            found = hit / max(1, sum(target == c).item())
            scores.append(2 * precision * found / (precision + found) if hit else 0)
        assert finetune.f1(pred, target, 5) == pytest.approx(sum(scores) / 5)
        assert finetune.f1(pred, target, 5, "micro") == pytest.approx(share)
        assert finetune.accuracy(pred, target) == pytest.approx(share)


@both
def test_heads_are_the_releases_and_feel_noise(modality):
    """Linear on the class token; of RoBERTa dense, tanh and linear on <s>; biases start at 0."""
    encoder, x = tiny(modality).encoder, batch(modality)
    classifier = finetune.Classifier(encoder, 7)
    noise, first, positions = normal(20, 3, 16, 16), encoder(x)[:, 0], "positions"
    if modality == "text":
        noise, positions = normal(20, 9, 32), "position.weight"
        first = torch.tanh(first @ classifier.dense.weight.T)
    close(classifier(x), first @ classifier.linear.weight.T, 1e-6)  # float32, values below 1
    assert torch.equal(classifier(x, 0 * noise), classifier(x))
    assert not torch.equal(classifier(x, noise), classifier(x))
    classifier(x, noise).sum().backward()
    assert encoder.get_parameter(positions).grad.any()  # as released, a picture's were fixed before
    if modality == "text":  # R3F trains all but what it perturbs
        assert encoder.word.weight.grad is None


@both
def test_fitting_equals_a_hand_written_loop(modality):
    model, data, config = test_helpers.labelled(modality, finetune_warmup=0.5, dropout=0.1, seed=3)
    start = finetune.new_classifier(model, list("abcd"), config)
    mine = copy.deepcopy(start).train()
    names = ["abcd"[label] for label in data.train_labels]
    got = finetune.fit(model, data.train, names, config, steps=6, batch_size=8, lr=1e-3)
    free = {name for name, p in mine.named_parameters() if name.endswith("bias") or (
        "cls_token" in name or "positions" in name if modality == "image" else p.ndim == 1)}
    optimiser = torch.optim.AdamW([
        {"params": [p], "weight_decay": 0.0 if name in free else 0.01}
        for name, p in mine.named_parameters()])
    for step in range(6):
        for group in optimiser.param_groups:  # linear warm-up over 3 steps, then linear to 0 at 6
            group["lr"] = 1e-3 * (step / 3 if step < 3 else (6 - step) / 3)
        index = draws.batch(12, 8, step, 3, "labelled order", 0)
        x = batch(modality, index)
        flips = torch.rand(8, generator=draws.generator(3, "flip", 0, step)) < 0.5
        for i in flips.nonzero().flatten() if modality == "image" else ():
            x[i] = x[i].flip(-1)
        optimiser.zero_grad()
        torch.manual_seed(draws.seed_of(3, "dropout", 0, step))
        F.cross_entropy(mine(x), data.train_labels[index]).backward()
        nn.utils.clip_grad_norm_(mine.parameters(), 1.0)
        optimiser.step()
    same_training(got, mine, start)


@both
def test_a_row_measures_the_classifier_that_is_saved(modality, tmp_path):
    """Score, losses, gap and distance, computed again from what `predict` says of the file."""
    model, data, config = test_helpers.labelled(modality)
    row = finetune.fine_tune(model, data, config, Run(tmp_path, config), "fine-tuning")
    saved = finetune.Classifier.from_pretrained(tmp_path / "finetuned-fine-tuning.safetensors")
    assert saved.classes == data.classes and not saved.training
    chances = {split: saved.predict(getattr(data, split)) for split in ("train", "test")}
    assert chances["test"].shape == (8, 4) and chances["test"].dtype == torch.float32
    close(chances["test"], saved(batch(modality, slice(12, 20))).softmax(1), 1e-6)  # float32
    for split, labels in (("train", data.train_labels), ("test", data.test_labels)):
        loss = F.nll_loss(chances[split].log(), labels).item()
        assert row[f"{split}_loss"] == pytest.approx(loss, rel=1e-5)  # a logarithm undone
    assert row["gap"] == row["test_loss"] - row["train_loss"]
    assert row["score"] == finetune.f1(chances["test"].argmax(1), data.test_labels, 4)
    squares = [(after.double() - before.double()).square().sum() for after, before in
               zip(saved.encoder.state_dict().values(), model.encoder.state_dict().values())]
    assert row["distance"] == pytest.approx(math.sqrt(sum(squares)), rel=1e-9)


PIXELS = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)


@pytest.mark.parametrize("kind, inputs, said", [
    ("image", PIXELS.permute(0, 2, 3, 1), "pictures are [4, 16, 16, 3], channels last"),
    ("image", PIXELS[:, :1], "pictures are [4, 1, 16, 16]: give uint8"),
    ("image", PIXELS / 255, "pictures are numbers from 0 to 0, which are not normalised"),
    ("image", PIXELS[..., :13], "pictures of 16 x 13 do not divide into patches of 8"),
    ("image", PIXELS[:0], "there are no pictures"),
    ("image", torch.utils.data.TensorDataset(PIXELS), "pictures came as TensorDataset: give"),
    ("text", ["a word"] * 4, "the model has no tokenizer to read strings with"),
    ("text", torch.full((4, 5), 60), "token ids from 60 to 60, 5 a text: the model has 60"),
    ("text", PIXELS, "texts are torch.uint8 [4, 3, 16, 16]: give a list of strings")])
def test_what_a_model_cannot_take_is_refused_in_a_sentence(kind, inputs, said):
    model = tiny(kind)
    for use in (lambda: distill.self_distill(model, inputs, config_of()),
                lambda: finetune.fit(model, inputs, list("abab"), config_of()),
                lambda: finetune.Classifier(model.encoder, 2).predict(inputs)):
        with pytest.raises(BadInput, match=f"^{re.escape(said)}"):
            use()
    with pytest.raises(BadInput, match="there are 20 inputs and 4 labels: give one each"):
        finetune.fit(model, examples(kind), list("abab"))


# ============================================================================= baselines.py

# The same formula in another order of operations: a few roundings of 1e-16 on values near 1.
FLOAT64 = {"rtol": 1e-12, "atol": 1e-12}
# Twenty steps or a row's sum in float32, each operation with a relative error of 6e-8.
FLOAT32 = {"rtol": 1e-6, "atol": 1e-6}
EXACT = {torch.float32: FLOAT32, torch.float64: FLOAT64}
# The R3F release adds two float32 divergences and may itself be off by 1e-7 (it is negative for
# equal logits); sums over four rows of values near 1 add their roundings.
R3F_RELEASE = {"rtol": 0.0, "atol": 1e-6}


def golden(release: str, *beginnings: str) -> pytest.MarkDecorator:
    """A test a release's entry that begins so: its tensors, without its name, and its description.

    Tensors of other entries are there, too, under their whole names.
    """
    tensors = load_file(ROOT / "golden" / f"{release}.safetensors")
    found = json.loads((ROOT / "golden" / f"{release}.json").read_text())["entries"]
    return pytest.mark.parametrize("tensors, about", [
        pytest.param({key.removeprefix(name).strip("/"): tensor for key, tensor in tensors.items()}
                     | tensors, about, id=name)
        for name, about in found.items() if name.startswith(beginnings)])


@pytest.mark.filterwarnings("ignore:RecAdam's pull")  # one entry is unstable on purpose
@golden("recadam", "open/", "closed/")
def test_recadam_is_the_release(tensors, about):
    """Trajectories under given gradients (open), and those of a small classifier (closed)."""
    parameters = {x: nn.Parameter(tensors[f"{x}_traj"][0].clone()) for x in "WbVc"
                  if f"{x}_traj" in tensors}
    groups = []
    for group, parameter in zip(about["groups"], parameters.values(), strict=True):
        # groups with w = 0 are ours without anchors
        anchor = {"pretrained": [tensors[group["target"]]]} if "target" in group else {}
        groups.append({"params": [parameter], "weight_decay": group["weight_decay"]} | anchor)
    named = baselines.RecAdam([torch.zeros(1)]).defaults.keys() & about.keys()
    optimizer = baselines.RecAdam(groups, **{name: about[name] for name in named})
    for step in range(about["steps"]):
        if about["kind"].startswith("open"):
            for x, parameter in parameters.items():
                parameter.grad = tensors[f"open/grad_{x}"][step].to(parameter)
            for group in optimizer.param_groups:
                group["lr"] = tensors["lr"][step].item()
        else:
            optimizer.zero_grad()
            W, b, V, c = parameters.values()
            logits = torch.tanh(tensors["closed/X"] @ W.T + b) @ V.T + c  # [B, C]
            F.cross_entropy(logits, tensors["closed/y"]).backward()
        optimizer.step()
        for x, parameter in parameters.items():
            expected = tensors[f"{x}_traj"][step + 1]
            close(parameter.data, expected, **EXACT[expected.dtype])


@golden("recadam", "anneal/")
def test_annealing_curve_is_the_releases(tensors, about):
    how = [about[key] for key in ("anneal_fun", "k", "t0", "w")]
    ours = [baselines.anneal(step, *how) for step in range(1, 1501)]
    # atol 0: far below t0 the sigmoid is tiny and must still be right in its leading digits
    close(torch.tensor(ours, dtype=torch.float64), tensors[""], atol=0, rtol=1e-12)


def test_recadam_pulls_to_its_own_copy_of_the_anchors():
    """Of the parameters themselves, if need be, and kept in no checkpoint."""
    theta = nn.Parameter(normal(4, 3))
    start, anchored = theta.detach().clone(), {"params": [theta], "pretrained": [theta]}
    optimizer = baselines.RecAdam([anchored], lr=1e-4, anneal_t0=1e9)  # the pull alone
    theta.data += 1
    for _ in range(10):
        theta.grad = torch.zeros(4, 3)
        optimizer.step()
    # each step keeps 1 - lr·γ = 0.5 of the way; float32, values near 1
    close(theta.data, start + 0.5**10, 1e-6)
    assert all("pretrained" not in group for group in optimizer.state_dict()["param_groups"])


@golden("mars", "linear", "conv", "head", "one", "not")
def test_mars_is_the_release(tensors, about):
    weight = tensors["w"].requires_grad_()
    anchor = tensors.get("w0", torch.zeros_like(weight))  # a head has none: it is zero
    tolerance, distance = EXACT[weight.dtype], baselines.mars_distance(weight, anchor)
    rows = [baselines.mars_distance(w[None], a[None]) for w, a in zip(weight, anchor, strict=True)]
    close(torch.stack(rows).detach(), tensors["row_l1"], **tolerance)
    close(distance.detach(), tensors["mars_distance"][0], **tolerance)
    (0.01 * distance).backward()
    close(weight.grad, tensors["mars_penalty_0.01_grad"], **tolerance)
    for radius in about["gammas"]:
        projected = baselines.mars_project(weight, anchor, radius)
        close(projected, tensors[f"mars_proj_g{radius}"], **tolerance)
        close(baselines.mars_distance(projected, anchor), tensors[f"mars_after_g{radius}"][0],
              **tolerance)


@golden("mars", "pgm_adam")
def test_mars_follows_the_releases_projected_run(tensors, about):
    """Adam's steps do not depend on the weights here, so the wide run's show the narrow run's.

    The two runs had the same gradients, which are not recorded. A row inside the wide ball shows
    its bare Adam step; the narrow run is that step and our projection.
    """
    narrow, wide = (tensors[f"traj_g{radius}"] for radius in about["gammas"])  # 2 of [13, 4, 5]
    anchor, compared, shrunk = narrow[0], 0, 0
    for step in range(1, len(wide)):
        free = (wide[step] - anchor).abs().sum(1) < 0.5 - 1e-6  # [rows], not on the sphere
        stepped = narrow[step - 1] + wide[step] - wide[step - 1]
        ours = baselines.mars_project(stepped, anchor, 0.05)
        close(ours[free], narrow[step][free], 1e-7)  # Keras keeps its learning rate in float32
        compared += int(free.sum())
        shrunk += int((ours != stepped).any(1)[free].sum())
    assert compared >= 40 and shrunk >= 40  # of 48 row updates


def test_mars_projects_all_matrices_at_once():
    """As one by one; a row inside its ball stays, bit for bit."""
    scale = torch.tensor([0.0, 1e-3, 0.1, 0.3, 1.0, 100.0])[:, None]
    anchors = [normal(6, size) for size in (4, 9)]
    weights = [anchor + scale * normal(*anchor.shape, seed=1) for anchor in anchors]
    outside = [(w - a).abs().sum(1) > 1 for w, a in zip(weights, anchors, strict=True)]
    pairs = [(w.clone(), a) for w, a in zip(weights, anchors, strict=True)]
    moved = baselines.project_all(pairs, 1.0)
    for (found, anchor), weight, out in zip(pairs, weights, outside, strict=True):
        expected = baselines.mars_project(weight, anchor, 1.0)
        close(found, expected, 1e-6)  # in another order of operations
        assert all(torch.equal(x[~out], weight[~out]) for x in (found, expected))
    assert 0 < moved < 1 and moved == torch.cat(outside).float().mean()


@golden("r3f", "kl/")
def test_symmetric_kl_is_the_release(tensors, about):
    for ending, tolerance in (("", R3F_RELEASE), ("_f64_own", FLOAT64)):
        expected = tensors[f"symm_kl{ending}"][0]
        p, q = (tensors[f"{x}_logits"].detach().to(expected.dtype).requires_grad_()
                for x in ("clean", "noised"))
        kl = baselines.symmetric_kl(p, q)
        # the release's may be negative, and not 0 for equal logits
        assert torch.equal(kl, baselines.symmetric_kl(q, p)) and (kl >= 0).all()
        assert (kl == 0).all() == torch.equal(p, q)
        kl.mean().backward()
        close(kl.mean().detach(), expected, **tolerance)
        close(p.grad, tensors[f"grad_clean{ending}"], **tolerance)
        close(q.grad, tensors[f"grad_noised{ending}"], **tolerance)


@golden("r3f", "crit/")
def test_r3f_loss_is_the_release(tensors, about):
    params = {key.removeprefix("param/"): value.detach().requires_grad_()
              for key, value in tensors.items() if key.startswith("param/")}
    words, middle, head = (params[key] for key in (
        "encoder.sentence_encoder.embed_tokens.weight", "mid.weight",
        "classification_heads.h.weight"))

    def logits_of(embedded: Tensor) -> Tensor:
        hidden = F.linear(embedded, middle, params["mid.bias"]).tanh()  # [B, K, D]
        return F.linear(hidden.mean(1), head, params["classification_heads.h.bias"])  # [B, C]

    embedded = F.embedding(tensors["tokens"], words, padding_idx=1)  # [B, K, D]
    clean, noised = logits_of(embedded), logits_of(embedded.detach() + tensors["noise"])
    loss = baselines.r3f_loss(clean, noised, tensors["target"], about["r3f_lambda"])  # [B]
    close(noised.detach(), tensors["noised_logits"], **R3F_RELEASE)
    close(loss.sum().detach(), tensors["loss_sum"][0], **R3F_RELEASE)
    loss.mean().backward()
    for key, value in params.items():
        close(value.grad, tensors[f"grad/{key}"], **R3F_RELEASE)


@both
def test_each_method_does_what_it_is_for(modality, tmp_path):
    """RecAdam stays nearer, MARS's matrices stay in their balls, R3F's noise is in the logits."""
    model, data, config = test_helpers.labelled(modality, mars_radius=0.005, r3f_eps=0.1)
    rows, last = {}, {}
    for name, method in baselines.METHODS.items():
        rows[name], parts = (
            finetune.fine_tune(model, data, replace(config, accumulate=n), run, name, method=method)
            for n, run in ((1, Run(tmp_path / name, config)), (3, Run())))
        last[name] = test_helpers.log_of(tmp_path / name)[-1]
        for key in ("train_loss", "test_loss", "distance"):
            # float32 sums in another order, a few steps long
            assert parts[key] == pytest.approx(rows[name][key], rel=1e-4), (name, key)
    assert len({row["train_loss"] for row in rows.values()}) == 4
    assert rows["RecAdam"]["distance"] < rows["fine-tuning"]["distance"]
    assert last["R3F"]["kl"] > 1e-7 and 0 < last["MARS"]["projected"] <= 1  # float32 has 1e-7
    saved = finetune.Classifier.from_pretrained(tmp_path / "MARS" / "finetuned-MARS.safetensors")
    pairs = zip(saved.encoder.named_parameters(), model.encoder.parameters(), strict=True)
    for (name, after), before in pairs:  # embeddings, positions, tokens and what is 1-D are free
        move = (after - before).reshape(-1, after.shape[-1]).abs().sum(1).max()
        # a row of 192 weights near 0.1 adds up as many roundings of 4e-9
        assert (move <= 0.005 + 1e-6) == (name in linear(model.encoder)), name


# ============================================================================= the programs

PROGRAMS = ("mae", "mlm", "finetune", "baselines", "distill")  # each may import those before it
ROWS = {"finetune.py": ["fine-tuning"], "baselines.py": ["fine-tuning", "RecAdam", "MARS", "R3F"],
        "distill.py": ["fine-tuning", "further pre-training", "self-distillation"]}


def own_pictures(folder: Path, *classes: str) -> list[Path]:
    """24 pictures of classes that take turns."""
    paths = [folder / classes[i % len(classes)] / f"{i:02}.png" for i in range(24)]
    for i, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 255, (50, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return sorted(paths)


def documented() -> list[str]:
    """Every command of the README and of the root files' docstrings that runs a root file."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    pages = re.findall(r"```sh\n(.*?)```", text, re.S)
    pages += [module.__doc__ for module in (mae, mlm, finetune, baselines, distill)]
    pattern = rf"(?:python|torchrun --\S+) ((?:{'|'.join(PROGRAMS)})\.py[^\n#]*)"
    return sorted({command.strip() for page in pages for command in re.findall(pattern, page)})


@pytest.mark.parametrize("command", documented())
def test_documented_commands_run(command, tmp_path, monkeypatch, capsys):
    """With --smoke; of those that need a download or an earlier result the flags alone."""
    monkeypatch.chdir(tmp_path)
    own_pictures(tmp_path / "mine", "an owl", "ein Spatz")
    for path in re.findall(r"runs/\S+", command):  # what an earlier command leaves
        mae.MAE.from_pretrained("tiny").save(path)
    Path("mine.jsonl").write_text("".join(json.dumps({"text": f"word {i}", "label": "ab"[i % 2]})
                                          + "\n" for i in range(100)))
    name, *words = command.replace("path/to/my/pictures", "mine").replace(
        "path/to/my/texts.jsonl", "mine.jsonl --init tiny").split()
    config = program.parse(name.removesuffix(".py"), "", words)
    if config.dataset not in ("toybirds", "pydocs", "mine", "mine.jsonl") or config.predict:
        return
    test_helpers.run_here(" ".join([name, *words, "--smoke"]))
    said = capsys.readouterr().out
    if name == "mlm.py":
        assert said.count("guesses:") > 3 and "<mask>" in said
        return
    out, = Path("runs").glob("*-smoke-*")
    rows = [row for row in ROWS.get(name, []) if config.method in ("all", row.lower())]
    files = [f"finetuned-{row.replace(' ', '-')}.safetensors" for row in rows]
    files += ["config.json", "log.jsonl", "timing.jsonl", "curves.png"] if rows else []
    if name == "distill.py":
        files += ["further.safetensors", f"distilled-{config.rounds}.safetensors"]
    if name in ("mae.py", "distill.py") and config.modality == "image":
        files.append("reconstructions.png")
        assert np.asarray(Image.open(out / files[-1])).std() > 20  # not blank
    assert all((out / file).exists() for file in files)
    assert not (out / "checkpoint.safetensors").exists()
    assert not rows or [row["method"] for row in test_helpers.rows_of(out)] == rows
    assert all(row in said for row in rows)


def test_the_readmes_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(readme("# From Python"), names)
    assert "tensor([[0." in capsys.readouterr().out
    for folder, made in (("student", names["models"][-1]), ("classifier", names["classifier"])):
        assert (tmp_path / "runs" / folder / "config.json").exists()
        assert same(type(made).from_pretrained(f"runs/{folder}/model.safetensors"), made)


def test_a_teacher_is_taken_where_it_is_given_and_only_there(finished, tmp_path):
    """Then only the student is trained and fine-tuned, and is the same."""
    teacher, foreign, taught = finished / "further.safetensors", tmp_path / "a", tmp_path / "b"
    foreign.mkdir()
    shutil.copy(teacher, foreign)
    with pytest.raises(BadInput, match="was not made by this run.*--teacher"):
        test_helpers.run_here(f"distill.py --smoke --seed 5 --out {foreign}")
    test_helpers.run_here(f"distill.py --smoke --out {taught} --teacher {teacher}")
    assert test_helpers.rows_of(taught) == test_helpers.rows_of(finished)[2:]
    assert len({line["stage"] for line in test_helpers.log_of(taught)}) == 2
    made = {path.name for path in taught.glob("*.safetensors")}
    assert made == {"distilled-1.safetensors", "finetuned-self-distillation.safetensors"}
    assert all(same(load_file(taught / name), load_file(finished / name)) for name in made)


def test_frozen_features_are_probed_a_line_a_model(finished, capsys):
    test_helpers.run_here(f"distill.py --smoke --out {finished} --probe")
    told = capsys.readouterr().out.partition("frozen features")[2].splitlines()[1:]
    assert [re.split("  +", line)[0] for line in told] == [
        "initial weights", "further pre-training", "self-distillation, 1"]


@both
def test_predictions_are_a_table_of_probabilities(modality, tmp_path, capsys):
    """`finetune.py --predict` writes what `Classifier.predict` says of paths or of strings."""
    dataset = {"image": "toybirds", "text": "pydocs"}[modality]
    test_helpers.run_here(f"finetune.py --smoke --dataset {dataset} --out {tmp_path}")
    path = tmp_path / "finetuned-fine-tuning.safetensors"
    classifier = finetune.Classifier.from_pretrained(path)
    inputs, source = ["Return the sum.", "Open a file."], tmp_path / "new.txt"
    source.write_text("\n".join(inputs))
    if modality == "image":
        inputs = own_pictures(source := tmp_path / "new", *classifier.classes)
    test_helpers.run_here(f"finetune.py --init {path} --predict {source}")
    with open(tmp_path / "predictions-new.csv", newline="", encoding="utf-8") as file:
        heading, *rows = csv.reader(file)
    assert heading[1:] == ["class", *classifier.classes]
    for row, expected in zip(rows, classifier.predict(inputs), strict=True):
        close(torch.tensor([float(x) for x in row[2:]]), expected, 1e-6)  # six places are written
        assert row[1] == classifier.classes[int(expected.argmax())]
    right = sum(file.startswith(f"{found}/") for file, found, *_ in rows)
    said = f"{right} of 24 are of their folder's class"
    assert (said in capsys.readouterr().out) == (modality == "image")


def imported(path: Path) -> set[str]:
    """The packages and modules that a file imports, anywhere in it."""
    return set(re.findall(r"(?m)^ *(?:import|from) (\w+)", path.read_text(encoding="utf-8")))


def test_the_root_files_import_little_and_arrows_point_one_way():
    packages = {"torch", "numpy", "PIL", "tokenizers", "safetensors", *sys.stdlib_module_names}
    for place, name in enumerate(PROGRAMS):
        assert imported(ROOT / f"{name}.py") <= packages | {"support", *PROGRAMS[:place]}, name
    assert imported(ROOT / "test_all.py") <= packages | {"support", "pytest", *PROGRAMS}
    for path in (ROOT / "support").glob("*.py"):
        if not path.name.startswith("test"):
            assert not imported(path) & {*PROGRAMS, "experiments"}, path
