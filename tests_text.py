"""Tests of mlm.py and support/texts.py: reference numbers, properties, files."""
import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

import mlm
from support import fetch, texts
from support.fetch import BadInput

GOLDEN = Path(__file__).parent / "golden"
TEXT_SMALL = mlm.Config(vocab_size=50, width=16, depth=2, heads=2, mlp=32, max_positions=24, mask_id=49,
                        special_ids=(0, 1, 2, 3, 49), dropout=0.0)


@pytest.fixture(autouse=True)
def text_local_weights(monkeypatch):
    """Weights by path only: these tests need no network."""
    monkeypatch.setattr(fetch, "weights", lambda source, kind: Path(source), raising=False)


def text_model(config=TEXT_SMALL, seed=0):
    torch.manual_seed(seed)
    model = mlm.MLM(config).eval()
    with torch.no_grad():               # biases and LayerNorms start at 0 and 1: make every parameter count
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def text_batch(B=4, K=12, seed=0):
    """Ids [B, K] of ragged texts `<s> … </s>`, padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 49, (B, K), generator=generator)
    ids[:, 0] = 0
    for b in range(B):
        ids[b, K - 1 - 2 * b] = 2
        ids[b, K - 2 * b:] = 1
    return ids


def text_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.add_special_tokens(["<mask>"])
    return tokenizer


def text_hub_folder(tmp_path, change=None, config=True):
    """The golden RobertaForMaskedLM as a hub folder, its tensors changed by `change`."""
    tensors = load_file(GOLDEN / "roberta.safetensors")
    if change:
        change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    if config:
        shutil.copy(GOLDEN / "roberta.config.json", tmp_path / "config.json")
    return tmp_path / "model.safetensors"


# ----------------------------------------------------------------------------- the model


def test_roberta_golden(tmp_path):
    model = mlm.MLM.from_pretrained(text_hub_folder(tmp_path)).eval()
    expected = load_file(GOLDEN / "roberta.expected.safetensors")
    with torch.no_grad():
        hidden, logits = model.encoder(expected["ids"]), model.logits(expected["ids"])
    # float32 in another order of summation; the values are of size 1 to 5
    torch.testing.assert_close(hidden, expected["hidden"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits, expected["logits"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.encoder(expected["ids"], expected["attention"]), hidden, atol=0, rtol=0)


@pytest.mark.skipif("ROBERTA_BASE" not in os.environ, reason="ROBERTA_BASE names no folder with roberta-base")
def test_roberta_base_published():
    model = mlm.MLM.from_pretrained(Path(os.environ["ROBERTA_BASE"]) / "model.safetensors").eval()
    ids = torch.tensor([[0, 31414, 232, 328, 740, 1140, 12695, 69, 46078, 1588, 2]])
    with torch.no_grad():
        hidden, logits = model.encoder(ids)[0, :3, :3], model.logits(ids)[0, :3, :3]
    # 1e-4: what the published numbers, rounded to four places, allow
    torch.testing.assert_close(hidden, torch.tensor(
        [[-0.0231, 0.0782, 0.0074], [-0.1854, 0.0540, -0.0175], [0.0548, 0.0799, 0.1687]]), atol=1e-4, rtol=0)
    torch.testing.assert_close(logits, torch.tensor(
        [[33.8802, -4.3103, 22.7761], [4.6539, -2.8098, 13.6253], [1.8228, -3.6898, 8.8600]]), atol=1e-4, rtol=1e-5)


def test_block_is_pytorchs_encoder_layer():
    block = text_model().encoder.blocks[0]
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, "gelu", norm_first=False, batch_first=True).eval()
    theirs = {"attention.qkv.weight": "self_attn.in_proj_weight", "attention.qkv.bias": "self_attn.in_proj_bias",
              "attention.out": "self_attn.out_proj", "fc1": "linear1", "fc2": "linear2"}
    state = {}
    for name, tensor in block.state_dict().items():
        module, kind = name.rsplit(".", 1)
        state[theirs.get(name) or f"{theirs.get(module, module)}.{kind}"] = tensor
    layer.load_state_dict(state)
    attention = text_batch() != 1
    x = torch.randn(4, 12, 16, generator=torch.Generator().manual_seed(1))
    place = attention.flatten().nonzero().squeeze(1)
    ours = block(x.flatten(0, 1)[place], place, attention)
    expected = layer(x, src_key_padding_mask=~attention).flatten(0, 1)[place]
    torch.testing.assert_close(ours, expected, atol=2e-6, rtol=1e-5)       # float32, two orders of summation


def test_padding_changes_nothing():
    model, ids = text_model(), text_batch()
    hidden = model.encoder(ids)
    for b in range(len(ids)):
        alone = model.encoder(ids[b:b + 1, ids[b] != 1])
        # matrix products of other sizes sum in another order
        torch.testing.assert_close(hidden[b, :alone.shape[1]], alone[0], atol=2e-6, rtol=1e-5)
    assert hidden[ids == 1].eq(0).all() and model.logits(ids)[ids == 1].eq(0).all()


def test_text_loss_alone_and_in_batch():
    model, ids = text_model(), text_batch()
    mask = model.draw_mask(ids, 0.4, torch.Generator().manual_seed(3))
    assert mask.any(1).all()
    alone = torch.cat([model.loss(ids[b:b + 1], mask[b:b + 1]) for b in range(len(ids))])
    torch.testing.assert_close(model.loss(ids, mask), alone, atol=2e-6, rtol=1e-6)


def test_text_loss_is_equation_2():
    model, ids = text_model(), text_batch()
    mask = model.draw_mask(ids, 0.4, torch.Generator().manual_seed(3))
    logits = model.logits(ids.masked_fill(mask, 49))
    nll = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none")                  # [B, K]
    expected = torch.stack([(nll[b] * mask[b] / mask[b].sum()).sum() for b in range(len(ids))])
    torch.testing.assert_close(model.loss(ids, mask), expected, atol=2e-6, rtol=1e-6)
    # a text's other words are seen, not predicted: with x̂ given, the loss asks only for masked words
    other = torch.where(mask, ids, 4 + (ids + 7) % 45)
    attention, x_hat = ids != 1, ids.masked_fill(mask, 49)
    torch.testing.assert_close(model.loss(other, mask, attention, x_hat), model.loss(ids, mask), atol=0, rtol=0)


def test_text_loss_with_nothing_masked():
    model, ids = text_model(), text_batch()
    for rows in (slice(0, 2), slice(0, 4)):                 # some texts without a mask, then all
        mask = model.draw_mask(ids, 0.4, torch.Generator().manual_seed(3))
        mask[rows] = False
        loss = model.loss(ids, mask)
        assert loss[rows].eq(0).all()
        model.zero_grad()
        loss.sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_text_masks_are_bernoulli():
    config = TEXT_SMALL
    model, generator = mlm.MLM(config), torch.Generator().manual_seed(0)
    ids = torch.randint(0, 50, (400, 100), generator=generator)
    mask = model.draw_mask(ids, 0.15, generator)
    words = ~torch.isin(ids, torch.tensor(config.special_ids))
    assert not mask[~words].any()
    share, n = mask[words].float().mean().item(), int(words.sum())
    assert abs(share - 0.15) < 5 * (0.15 * 0.85 / n) ** 0.5                # five standard deviations of a mean of n
    # independent draws: the counts per text vary as a binomial's do, within 5 deviations of a variance
    rows = (mask.sum(1) - 0.15 * words.sum(1)).float().square().mean() / (0.15 * 0.85 * n / 400)
    assert abs(rows - 1) < 5 * (2 / 400) ** 0.5
    again = model.draw_mask(ids, 0.15, torch.Generator().manual_seed(5))
    assert torch.equal(again, model.draw_mask(ids, 0.15, torch.Generator().manual_seed(5)))


def test_corrupt_recipes():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 49, (400, 100), generator=generator)
    mask = torch.rand(ids.shape, generator=generator) < 0.5
    assert torch.equal(mlm.corrupt(ids, mask, "mask", generator, TEXT_SMALL), ids.masked_fill(mask, 49))
    x_hat = mlm.corrupt(ids, mask, "80-10-10", generator, TEXT_SMALL)
    assert torch.equal(x_hat[~mask], ids[~mask])
    n, masked = int(mask.sum()), x_hat[mask]
    changed = masked[(masked != 49) & (masked != ids[mask])]
    for share, expected in ((masked.eq(49).sum() / n, 0.8), (len(changed) / n, 0.1 * 44 / 45)):
        assert abs(share - expected) < 5 * (expected * (1 - expected) / n) ** 0.5         # as above
    assert set(changed.tolist()) == set(range(4, 49))
    with pytest.raises(BadInput, match="mask, 80-10-10"):
        mlm.corrupt(ids, mask, "90-10", generator)


def test_noise_perturbs_but_does_not_train_the_words():
    model, ids = text_model(), text_batch()
    noise = 0.1 * torch.randn(4, 12, 16, generator=torch.Generator().manual_seed(0))
    clean, noised = model.encoder(ids), model.encoder(ids, noise=noise)
    assert (clean - noised).abs().max() > 1e-3
    torch.testing.assert_close(model.encoder(ids, noise=0 * noise), clean, atol=0, rtol=0)
    noised.square().sum().backward()
    assert model.encoder.word.weight.grad is None
    assert model.encoder.position.weight.grad.abs().sum() > 0


def test_text_dropout_has_one_knob():
    model, ids = text_model().train(), text_batch()
    model.encoder.dropout.p = 0.5
    assert not torch.equal(model.encoder(ids), model.encoder(ids))
    model.encoder.dropout.p = 0.0
    assert torch.equal(model.encoder(ids), model.encoder(ids))


# ----------------------------------------------------------------------------- weights


def test_mlm_weights_must_fit(tmp_path):
    layer = "roberta.encoder.layer.1"
    cases = {
        "missing roberta.encoder.layer.1.output.dense.bias": lambda t: t.pop(f"{layer}.output.dense.bias"),
        r"unexpected lm_head.extra \[3\]": lambda t: t.update({"lm_head.extra": torch.zeros(3)}),
        r"fc1.bias is \[95\], expected \[96\]": lambda t: t.update(
            {f"{layer}.intermediate.dense.bias": torch.zeros(95)}),
        "lm_head.decoder.weight differs": lambda t: t.update({"lm_head.decoder.weight": torch.zeros(120, 48)}),
        "lm_head.decoder.bias differs": lambda t: t.update({"lm_head.decoder.bias": torch.ones(120)})}
    for message, change in cases.items():
        with pytest.raises(BadInput, match=message):
            mlm.MLM.from_pretrained(text_hub_folder(tmp_path, change))


def test_mlm_weights_dropped_on_purpose(tmp_path):
    def change(tensors):
        tensors |= {"roberta.embeddings.position_ids": torch.arange(34)[None],
                    "roberta.pooler.dense.weight": torch.zeros(48, 48), "roberta.pooler.dense.bias": torch.zeros(48),
                    "lm_head.decoder.weight": tensors["roberta.embeddings.word_embeddings.weight"].clone(),
                    "lm_head.decoder.bias": tensors["lm_head.bias"].clone()}
    plain = mlm.MLM.from_pretrained(text_hub_folder(tmp_path)).state_dict()
    more = mlm.MLM.from_pretrained(text_hub_folder(tmp_path, change)).state_dict()
    assert plain.keys() == more.keys() and all(torch.equal(plain[name], more[name]) for name in plain)


def test_mlm_sizes_without_config(tmp_path):
    path = text_hub_folder(tmp_path, config=False)
    with pytest.raises(BadInput, match="heads="):
        mlm.MLM.from_pretrained(path)
    found = mlm.MLM.from_pretrained(path, heads=4).encoder.config
    (tmp_path / "with").mkdir()
    assert found == mlm.MLM.from_pretrained(text_hub_folder(tmp_path / "with")).encoder.config


def test_mlm_refuses_an_image_model(tmp_path):
    shutil.copy(GOLDEN / "vit_mae.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(BadInput, match=r"use mae\.py"):
        mlm.MLM.from_pretrained(tmp_path / "model.safetensors")
    shutil.copy(GOLDEN / "vit_mae.config.json", tmp_path / "config.json")
    with pytest.raises(BadInput, match=r"use mae\.py"):
        mlm.MLM.from_pretrained(tmp_path / "model.safetensors")


def test_mlm_save_and_load(tmp_path):
    tokenizer = text_tokenizer()
    size, mask_id = tokenizer.get_vocab_size(), tokenizer.token_to_id("<mask>")
    model = text_model(mlm.Config(size, 16, 2, 2, 32, 24, mask_id=mask_id, special_ids=(0, 1, 2, 3, mask_id)))
    model.tokenizer = tokenizer
    model.save(tmp_path / "own.safetensors", made_by="a test")
    state = torch.random.get_rng_state()
    again = mlm.MLM.from_pretrained(tmp_path / "own.safetensors", dropout=0.3)
    assert torch.equal(state, torch.random.get_rng_state())                # loading draws no random numbers
    assert again.encoder.config == dataclasses.replace(model.encoder.config, dropout=0.3)
    mine, read = model.state_dict(), again.state_dict()
    assert mine.keys() == read.keys() and all(torch.equal(mine[name], read[name]) for name in mine)
    assert again.tokenizer.to_str() == tokenizer.to_str()


# ----------------------------------------------------------------------------- texts


def text_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_texts_batches_like_padding_by_hand():
    lengths = torch.tensor([3, 7, 2, 5, 5])
    pieces = torch.arange(10, 32, dtype=torch.int32).split(lengths.tolist())
    data = texts.Texts(torch.cat(pieces), torch.cat([torch.tensor([0]), lengths.cumsum(0)]), pad_id=1)
    for index in ([0, 2], [4, 1, 1], [2], [3, 0, 4]):
        expected = nn.utils.rnn.pad_sequence([pieces[i].long() for i in index], True, 1)
        assert torch.equal(data[torch.tensor(index)], expected)
        assert torch.equal(data.take(torch.tensor(index))[torch.arange(len(index))], expected)
    assert len(data) == 5 and len(data.take(torch.tensor([], dtype=torch.int64))) == 0


def test_texts_are_cut_and_cached(tmp_path):
    rows = [{"text": "é" * n, "label": "ab"[n % 2]} for n in (1, 2, 30, 31)]
    path, tokenizer = text_jsonl(tmp_path / "mine" / "train.jsonl", rows), text_tokenizer()
    text_jsonl(tmp_path / "mine" / "test.jsonl", [{"text": "a <mask> b", "label": "a"}])
    first = texts.load(str(tmp_path / "mine"), tmp_path, tokenizer, 20)
    assert first.classes == ["a", "b"] and first.train_labels.tolist() == [1, 0, 0, 1]
    assert first.train.truncated == 2 and first.metric == "macro_f1"
    ids = first.train[torch.arange(4)]
    assert ids.shape == (4, 20) and ids[:, 0].eq(0).all() and ids[2:, 19].eq(2).all()
    assert tokenizer.decode(first.test[torch.tensor([0])][0].tolist()) == "a <mask> b"
    assert not first.test[torch.tensor([0])].eq(tokenizer.token_to_id("<mask>")).any()     # its letters, not the token
    cached = list((tmp_path / "cache").glob("*.safetensors"))
    again = texts.load(str(tmp_path / "mine"), tmp_path, tokenizer, 20)
    assert list((tmp_path / "cache").glob("*.safetensors")) == cached and len(cached) == 1
    assert torch.equal(again.train[torch.arange(4)], ids) and again.fingerprint == first.fingerprint
    text_jsonl(Path(path), rows[:3])
    assert texts.load(str(tmp_path / "mine"), tmp_path, tokenizer, 20).fingerprint != first.fingerprint


def test_one_jsonl_file_is_divided(tmp_path):
    rows = [{"text": f"text number {i // 2}", "label": "xyz"[i // 2 % 3]} for i in range(120)]
    data = texts.load(text_jsonl(tmp_path / "a.jsonl", rows), tmp_path, text_tokenizer(), 64)
    assert len(data.train) == 96 and len(data.test) == 24 and data.classes == ["x", "y", "z"]
    tokenizer = text_tokenizer()
    seen = [{tokenizer.decode(part[torch.tensor([i])][0].tolist()) for i in range(len(part))}
            for part in (data.train, data.test)]
    assert not seen[0] & seen[1]                                            # equal texts stay together
    unlabelled = texts.load(text_jsonl(tmp_path / "b.jsonl", [{"text": "a b"}]), tmp_path, text_tokenizer(), 64)
    assert unlabelled.train_labels is None and unlabelled.test is None and unlabelled.classes == []


@pytest.mark.parametrize("content, message", [
    (b'{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2: not JSON"),
    (b'{"text": "a"}\n\n{"txt": "a"}\n', r"a\.jsonl, line 3: no \"text\""),
    (b'{"text": "a", "label": 3}\n', r'line 1: "label" is 3'),
    (b'{"text": "a", "label": "x"}\n{"text": "b"}\n', "line 2: some lines have a label"),
    (b'{"text": "caf\xe9"}\n', "a.jsonl is not UTF-8"), (b"\n", "holds no texts")])
def test_bad_jsonl(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(BadInput, match=message):
        texts.load(str(tmp_path / "a.jsonl"), tmp_path, text_tokenizer(), 64)


def test_bad_text_folders(tmp_path):
    with pytest.raises(BadInput, match="no texts at"):
        texts.load(str(tmp_path / "nowhere"), tmp_path, text_tokenizer(), 64)
    with pytest.raises(BadInput, match=r"tokenizer\.json"):
        texts.load("pydocs", tmp_path, None, 64)
    text_jsonl(tmp_path / "train.jsonl", [{"text": "a", "label": "x"}])
    text_jsonl(tmp_path / "test.jsonl", [{"text": "b", "label": "y"}])
    with pytest.raises(BadInput, match="label 'y'"):
        texts.load(str(tmp_path), tmp_path, text_tokenizer(), 64)


def test_pydocs(tmp_path):
    files, read = texts.sources("pydocs", tmp_path)
    train, test, classes, note = read(files)
    assert (train, test, classes, note) == read(files)
    assert not {text for text, _ in train} & {text for text, _ in test}
    assert {label for _, label in test} == set(classes) and len(train) > 1000
    for text, label in train + test:
        words = "".join(c if c.isascii() and c.isalnum() else " " for c in text.lower()).split()
        assert label not in words and len(text.split()) >= 5


@pytest.mark.skipif("REAL_DATA" not in os.environ, reason="REAL_DATA names no folder with the real data sets")
@pytest.mark.parametrize("name, counts", [("chemprot", (4169, 2427, 3469, 13)), ("acl_arc", (1688, 114, 139, 6)),
                                          ("scierc", (3219, 455, 974, 7)), ("twitter_emotion", (3257, 374, 1421, 4))])
def test_real_texts(name, counts, tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "cache_folder", lambda data_dir: tmp_path)
    data = texts.load(name, os.environ["REAL_DATA"], text_tokenizer(), 512)
    assert (len(data.train), len(data.test), len(data.classes)) == (counts[0], counts[2], counts[3])
    assert f"{counts[1]} development texts" in data.note
    assert data.metric == ("micro_f1" if name == "chemprot" else "macro_f1")
    if name == "twitter_emotion":
        assert data.classes == ["anger", "joy", "optimism", "sadness"]
        assert data.train_labels.bincount().tolist() == [1400, 708, 294, 855]
