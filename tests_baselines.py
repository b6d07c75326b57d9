"""The three baselines against the numbers of their authors' code, and their mathematics."""
import copy
import importlib
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import baselines

GOLDEN = Path(__file__).parent / "golden"
# The same formula in another order of operations: a few roundings of 1e-16 on values near 1.
FLOAT64 = {"rtol": 1e-12, "atol": 1e-12}
# Twenty steps or a row's sum in float32, each operation with a relative error of 6e-8.
FLOAT32 = {"rtol": 1e-6, "atol": 1e-6}


def baseline_golden(name, prefix=""):
    """Tensors of one reference file, and its described entries whose names begin with prefix."""
    entries = json.loads((GOLDEN / f"{name}.json").read_text())["entries"]
    return load_file(GOLDEN / f"{name}.safetensors"), {
        key: entry for key, entry in entries.items() if key.startswith(prefix)}


def baseline_names(name, prefix=""):
    return sorted(baseline_golden(name, prefix)[1])


def baseline_tolerance(tensor):
    return FLOAT32 if tensor.dtype == torch.float32 else FLOAT64


# ----------------------------------------------------------------------------- RecAdam


def recadam_of(entry, parameters, tensors):
    """The optimiser that an entry describes; its groups with w = 0 are ours without anchors."""
    groups = []
    for group, parameter in zip(entry["groups"], parameters):
        ours = {"params": [parameter], "weight_decay": group["weight_decay"]}
        if "target" in group:
            ours["pretrained"] = [tensors[group["target"]]]
        groups.append(ours)
    names = ("lr", "betas", "eps", "correct_bias", "anneal_fun", "anneal_k", "anneal_t0",
             "anneal_w", "pretrain_cof")
    return baselines.RecAdam(groups, **{name: entry[name] for name in names})


@pytest.mark.filterwarnings("ignore:RecAdam's pull")  # one entry is unstable on purpose
@pytest.mark.parametrize("name", baseline_names("recadam", "open/"))
def test_recadam_matches_the_release_on_given_gradients(name):
    tensors, entries = baseline_golden("recadam", name)
    entry, letters = entries[name], "WbV"
    parameters = [nn.Parameter(tensors[f"{name}/{x}_traj"][0].clone()) for x in letters]
    optimizer = recadam_of(entry, parameters, tensors)
    for step in range(entry["steps"]):
        for x, parameter in zip(letters, parameters):
            parameter.grad = tensors[f"open/grad_{x}"][step].to(parameter)
        for group in optimizer.param_groups:
            group["lr"] = tensors[f"{name}/lr"][step].item()
        optimizer.step()
        for x, parameter in zip(letters, parameters):
            expected = tensors[f"{name}/{x}_traj"][step + 1]
            torch.testing.assert_close(parameter.data, expected, **baseline_tolerance(expected))
        torch.testing.assert_close(
            baselines.annealed(optimizer.param_groups[0], step + 1),
            tensors[f"{name}/lambda"][step].item(), **FLOAT64)
    for moment in ("exp_avg", "exp_avg_sq"):
        expected = tensors[f"{name}/W_{moment}_final"]
        torch.testing.assert_close(optimizer.state[parameters[0]][moment], expected,
                                   **baseline_tolerance(expected))


@pytest.mark.parametrize("name", baseline_names("recadam", "closed/"))
def test_recadam_matches_the_release_on_a_classifier(name):
    tensors, entries = baseline_golden("recadam", name)
    parameters = [nn.Parameter(tensors[f"{name}/{x}_traj"][0].clone()) for x in "WbVc"]
    optimizer = recadam_of(entries[name], parameters, tensors)
    W, b, V, c = parameters
    for step in range(entries[name]["steps"]):
        logits = torch.tanh(tensors["closed/X"] @ W.T + b) @ V.T + c  # [B, C]
        loss = F.cross_entropy(logits, tensors["closed/y"])
        torch.testing.assert_close(loss.detach(), tensors[f"{name}/loss"][step], **FLOAT64)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for x, parameter in zip("WbVc", parameters):
            torch.testing.assert_close(parameter.grad, tensors[f"{name}/grad_{x}"][step], **FLOAT64)
            torch.testing.assert_close(parameter.data, tensors[f"{name}/{x}_traj"][step + 1],
                                       **FLOAT64)


@pytest.mark.parametrize("name", baseline_names("recadam", "anneal/"))
def test_annealing_curve(name):
    tensors, entries = baseline_golden("recadam", name)
    entry = entries[name]
    ours = [baselines.anneal(step, entry["anneal_fun"], entry["k"], entry["t0"], entry["w"])
            for step in range(1, 1501)]
    # atol 0: far below t0 the sigmoid is tiny and must still be right in its leading digits.
    torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), tensors[name],
                               rtol=1e-12, atol=0)


def test_annealing_refuses_what_it_cannot_compute():
    assert baselines.anneal(1, "sigmoid", 1.0, 1e6, 1.0) == 0.0  # e^(10^6) would overflow
    with pytest.raises(ValueError, match="t0"):
        baselines.anneal(1, "linear", 0.5, 0, 1.0)
    with pytest.raises(ValueError, match="cosine"):
        baselines.anneal(1, "cosine", 0.5, 250, 1.0)
    theta = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="cosine"):
        baselines.RecAdam([{"params": [theta], "pretrained": [theta]}], anneal_fun="cosine")


@pytest.mark.parametrize("anchored", [False, True])
def test_recadam_without_pull_is_adam(anchored):
    """A head, or λ = 1 throughout: Adam written out by hand, and torch's where ε plays no part."""
    draw = torch.Generator().manual_seed(0)
    start, gradients = (torch.randn(*shape, generator=draw, dtype=torch.float64)
                        for shape in ((3,), (30, 3)))
    group = {"pretrained": [start + 1]} if anchored else {}
    for eps in (1e-3, 1e-30):
        theta, other = (nn.Parameter(start.clone()) for _ in range(2))
        ours = baselines.RecAdam([{"params": [theta], **group}], lr=0.01, eps=eps,
                                 betas=(0.8, 0.99), anneal_fun="constant")
        adam = torch.optim.Adam([other], lr=0.01, eps=eps, betas=(0.8, 0.99))
        hand, m, v = start.tolist(), [0.0] * 3, [0.0] * 3
        for t, gradient in enumerate(gradients, start=1):
            theta.grad, other.grad = gradient.clone(), gradient.clone()
            ours.step()
            adam.step()
            for i, g in enumerate(gradient.tolist()):
                m[i] = 0.8 * m[i] + 0.2 * g
                v[i] = 0.99 * v[i] + 0.01 * g * g
                bias = math.sqrt(1 - 0.99**t) / (1 - 0.8**t)
                hand[i] -= 0.01 * bias * m[i] / (math.sqrt(v[i]) + eps)
        torch.testing.assert_close(theta.data, torch.tensor(hand, dtype=torch.float64), **FLOAT64)
    torch.testing.assert_close(theta.data, other.data, **FLOAT64)  # eps is 1e-30 here


def test_recadam_keeps_its_anchors_to_itself():
    """They are copies, in no checkpoint, and a resumed optimiser goes on as if never stopped."""
    draw = torch.Generator().manual_seed(1)
    backbone, head = (nn.Parameter(torch.randn(4, 3, generator=draw)) for _ in range(2))
    anchor, gradients = backbone.detach().clone(), torch.randn(10, 2, 4, 3, generator=draw)

    def optimizer_of(backbone, head, pretrained):
        return baselines.RecAdam([{"params": [backbone], "pretrained": [pretrained]},
                                  {"params": [head]}], lr=1e-4, anneal_t0=5)

    def train(optimizer, steps):
        for step in steps:
            for group, gradient in zip(optimizer.param_groups, gradients[step]):
                group["params"][0].grad = gradient.clone()
            optimizer.step()

    first = optimizer_of(backbone, head, backbone)  # the parameter itself, so a copy must be made
    train(first, range(5))
    saved = copy.deepcopy(first.state_dict())
    assert all("pretrained" not in group for group in saved["param_groups"])
    assert sorted(saved["state"][0]) == ["exp_avg", "exp_avg_sq", "step"]
    again = [nn.Parameter(x.detach().clone()) for x in (backbone, head)]
    second = optimizer_of(*again, anchor)
    second.load_state_dict(saved)
    train(first, range(5, 10))
    train(second, range(5, 10))
    assert torch.equal(backbone, again[0]) and torch.equal(head, again[1])
    assert not torch.equal(backbone, anchor)


def test_recadam_refuses_anchors_that_do_not_fit():
    theta = nn.Parameter(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="1 parameters and 2 anchors"):
        baselines.RecAdam([{"params": [theta], "pretrained": [theta, theta]}])
    with pytest.raises(ValueError, match=r"\[3, 2\]"):
        baselines.RecAdam([{"params": [theta], "pretrained": [theta.T]}])


@pytest.mark.parametrize("lr, warns", [(1e-3, True), (1e-4, False)])
def test_recadam_warns_when_the_pull_diverges(lr, warns, recwarn):
    theta = nn.Parameter(torch.ones(2))
    optimizer = baselines.RecAdam([{"params": [theta], "pretrained": [torch.zeros(2)]}], lr=lr)
    theta.grad = torch.zeros(2)
    optimizer.step()
    assert bool(recwarn.list) == warns
    assert bool((theta.abs() > 1).all()) == warns  # farther from the anchor than it began


# ----------------------------------------------------------------------------- MARS
#
# The release also sums a depthwise kernel over all of its channels and projects BatchNorm scales.
# Neither layer exists in a ViT or RoBERTa, so those rules have no counterpart here; its Frobenius
# projection and penalty (l2_*) are another method.


@pytest.mark.parametrize("name", [n for n in baseline_names("mars") if not n.startswith("pgm")])
def test_mars_matches_the_release(name):
    tensors, entries = baseline_golden("mars", name)
    weight = tensors[f"{name}/w"].requires_grad_()
    anchor = tensors.get(f"{name}/w0", torch.zeros_like(weight))  # a head has none: it is zero
    close = baseline_tolerance(weight)
    torch.testing.assert_close(baselines.row_lengths(weight, anchor).detach(),
                               tensors[f"{name}/row_l1"], **close)
    distance = baselines.mars_distance(weight, anchor)
    torch.testing.assert_close(distance.detach(), tensors[f"{name}/mars_distance"][0], **close)
    (0.01 * distance).backward()
    torch.testing.assert_close(weight.grad, tensors[f"{name}/mars_penalty_0.01_grad"], **close)
    for radius in entries[name]["gammas"]:
        projected = baselines.mars_project(weight, anchor, radius)
        torch.testing.assert_close(projected, tensors[f"{name}/mars_proj_g{radius}"], **close)
        torch.testing.assert_close(baselines.mars_distance(projected, anchor),
                                   tensors[f"{name}/mars_after_g{radius}"][0], **close)


def test_mars_follows_a_projected_keras_run():
    """Adam's steps do not depend on the weights here, so the wide run's show the narrow run's.

    The two runs had the same gradients, which are not recorded. A row inside the wide ball shows
    its bare Adam step; the narrow run is that step and our projection.
    """
    tensors, _ = baseline_golden("mars")
    narrow, wide = tensors["pgm_adam/traj_g0.05"], tensors["pgm_adam/traj_g0.5"]  # [13, 4, 5]
    anchor, compared, shrunk = narrow[0], 0, 0
    for step in range(1, len(wide)):
        free = baselines.row_lengths(wide[step], anchor) < 0.5 - 1e-6  # [rows], not on the sphere
        stepped = narrow[step - 1] + wide[step] - wide[step - 1]
        ours = baselines.mars_project(stepped, anchor, 0.05)
        # 1e-7: Keras keeps its learning rate in float32.
        torch.testing.assert_close(ours[free], narrow[step][free], rtol=0, atol=1e-7)
        compared += int(free.sum())
        shrunk += int((ours != stepped).any(1)[free].sum())
        assert baselines.mars_distance(wide[step], anchor) <= 0.5 + 1e-7
    assert compared >= 40 and shrunk >= 40  # of 48 row updates


@pytest.mark.parametrize("seed", range(5))
def test_mars_projection_properties(seed):
    draw = torch.Generator().manual_seed(seed)
    anchor = torch.randn(6, 4, 3, generator=draw)
    scale = torch.tensor([0.0, 1e-3, 0.1, 0.3, 1.0, 100.0]).view(6, 1, 1)
    weight = anchor + scale * torch.randn(6, 4, 3, generator=draw)
    before, lengths = weight.clone(), baselines.row_lengths(weight, anchor)
    once = baselines.mars_project(weight, anchor, 1.0)
    inside = lengths <= 1
    assert inside.any() and not inside.all() and torch.equal(weight, before)
    assert torch.equal(once[inside], weight[inside])  # bit for bit
    # A row of 12 values near 1 adds up a rounding of 6e-8 for each of them.
    assert baselines.mars_distance(once, anchor) <= 1 + 2e-6
    torch.testing.assert_close(baselines.mars_project(once, anchor, 1.0), once, rtol=0, atol=1e-6)
    difference = (once - anchor)[~inside].flatten(1), (weight - anchor)[~inside].flatten(1)
    torch.testing.assert_close(F.cosine_similarity(*difference), torch.ones(int((~inside).sum())))
    assert torch.equal(baselines.mars_project(weight, anchor, 0.0), anchor)
    assert torch.equal(baselines.mars_project(weight, anchor, math.inf), weight)


def test_mars_computes_bfloat16_in_float32():
    draw = torch.Generator().manual_seed(0)
    anchor, move = torch.randn(8, 512, generator=draw), torch.randn(8, 512, generator=draw)
    weight, anchor = (anchor + 0.1 * move).bfloat16(), anchor.bfloat16()
    projected = baselines.mars_project(weight, anchor, 5.0)
    assert projected.dtype == torch.bfloat16
    assert baselines.mars_distance(weight, anchor).dtype == torch.float32
    wide = baselines.mars_project(weight.float(), anchor.float(), 5.0)
    assert torch.equal(projected, wide.bfloat16()) and not torch.equal(projected, weight)


def test_mars_takes_the_linear_weights_and_projects_them_in_place():
    encoder = nn.ModuleDict({"patch": nn.Linear(12, 4), "norm": nn.LayerNorm(4),
                             "words": nn.Embedding(7, 4), "mlp": nn.Sequential(nn.Linear(4, 8))})
    pairs = baselines.mars_pairs(encoder, encoder.state_dict())  # live views: it must copy
    assert [weight for weight, _ in pairs] == [encoder["patch"].weight, encoder["mlp"][0].weight]
    assert baselines.project_all(pairs, 0.1) == 0
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(1.0)
        encoder["patch"].weight[1:].sub_(1.0)
        encoder["patch"].weight[1:].copy_(pairs[0][1][1:])
    free = {name: x.clone() for name, x in encoder.state_dict().items()
            if name not in ("patch.weight", "mlp.0.weight")}
    # 1 of 4 rows and 8 of 8.
    assert float(baselines.project_all(pairs, 0.1)) == pytest.approx(9 / 12)
    assert all(bool(baselines.mars_distance(*pair) <= 0.1 + 1e-6) for pair in pairs)
    assert all(torch.equal(encoder.state_dict()[name], x) for name, x in free.items())
    assert baselines.mars_pairs(encoder["patch"], encoder["patch"].state_dict())
    with pytest.raises(ValueError, match="mlp.0.weight"):
        baselines.mars_pairs(encoder, {"patch.weight": encoder["patch"].weight})


@pytest.mark.parametrize("module, first", [("mae", ["patch"]), ("mlm", [])])
def test_mars_constrains_the_matrices_of_our_encoders(module, first):
    module = importlib.import_module(module)
    sizes = {"image_size": 8, "patch_size": 4} if first else {"vocab_size": 9, "mask_id": 8,
                                                              "special_ids": (0, 1, 2, 3, 8)}
    config = module.Config(width=4, depth=1, heads=2, mlp=8, **sizes)
    encoder = (module.MAE if first else module.MLM)(config).encoder
    names = {parameter: name for name, parameter in encoder.named_parameters()}
    chosen = [names[weight] for weight, _ in baselines.mars_pairs(encoder, encoder.state_dict())]
    parts = [name.split(".")[-2:] for name in chosen]
    assert sorted(parts) == sorted([x, "weight"] for x in [*first, "qkv", "out", "fc1", "fc2"])


def test_mars_refuses_what_it_cannot_compare():
    for weight, anchor in ((torch.ones(2, 3), torch.ones(3)), (torch.ones(3), torch.ones(3))):
        with pytest.raises(ValueError, match="one shape"):
            baselines.mars_distance(weight, anchor)
    with pytest.raises(ValueError, match="radius"):
        baselines.mars_project(torch.ones(2, 2), torch.ones(2, 2), -1.0)


# ----------------------------------------------------------------------------- R3F

# The release adds two float32 divergences and may itself be off by 1e-7 (it is negative for equal
# logits); sums over four rows of values near 1 add their roundings.
R3F_RELEASE = {"rtol": 0, "atol": 1e-6}


@pytest.mark.parametrize("name", baseline_names("r3f", "kl/"))
def test_symmetric_kl_matches_the_release(name):
    tensors, _ = baseline_golden("r3f")
    for ending, close in (("", R3F_RELEASE), ("_f64_own", FLOAT64)):
        expected = tensors[f"{name}/symm_kl{ending}"][0]
        p, q = (tensors[f"{name}/{x}_logits"].detach().to(expected.dtype).requires_grad_()
                for x in ("clean", "noised"))
        mean = baselines.symmetric_kl(p, q).mean()
        mean.backward()
        torch.testing.assert_close(mean.detach(), expected, **close)
        torch.testing.assert_close(p.grad, tensors[f"{name}/grad_clean{ending}"], **close)
        torch.testing.assert_close(q.grad, tensors[f"{name}/grad_noised{ending}"], **close)


@pytest.mark.parametrize("name", baseline_names("r3f", "crit/"))
def test_r3f_loss_matches_the_release(name):
    tensors, entries = baseline_golden("r3f", name)
    start = f"{name}/param/"
    params = {key.removeprefix(start): value.requires_grad_() for key, value in tensors.items()
              if key.startswith(start)}
    words = params["encoder.sentence_encoder.embed_tokens.weight"]

    def logits_of(embedded):
        hidden = F.linear(embedded, params["mid.weight"], params["mid.bias"]).tanh()  # [B, K, D]
        return F.linear(hidden.mean(1), params["classification_heads.h.weight"],
                        params["classification_heads.h.bias"])  # [B, C]

    embedded = F.embedding(tensors[f"{name}/tokens"], words, padding_idx=1)  # [B, K, D]
    clean, noised = logits_of(embedded), logits_of(embedded.detach() + tensors[f"{name}/noise"])
    torch.testing.assert_close(noised.detach(), tensors[f"{name}/noised_logits"], **R3F_RELEASE)
    loss = baselines.r3f_loss(clean, noised, tensors[f"{name}/target"],
                              entries[name]["r3f_lambda"])  # [B]
    torch.testing.assert_close(loss.sum().detach(), tensors[f"{name}/loss_sum"][0], **R3F_RELEASE)
    torch.testing.assert_close(baselines.symmetric_kl(clean, noised).sum().detach(),
                               tensors[f"{name}/symm_kl_times_n"][0], **R3F_RELEASE)
    loss.mean().backward()
    for key, value in params.items():
        torch.testing.assert_close(value.grad, tensors[f"{name}/grad/{key}"], **R3F_RELEASE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_symmetric_kl_properties(dtype):
    draw = torch.Generator().manual_seed(0)
    p, q = (3 * torch.randn(64, 7, generator=draw).to(dtype) for _ in range(2))
    p.requires_grad_()
    q.requires_grad_()
    kl = baselines.symmetric_kl(p, q)
    assert kl.shape == (64,) and kl.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(kl, baselines.symmetric_kl(q, p)) and bool((kl > 0).all())
    assert torch.equal(baselines.symmetric_kl(p, p), torch.zeros_like(kl))  # exactly
    close = baselines.symmetric_kl(p, p + 1e-6 * q)
    assert bool((close >= 0).all())  # rounding must not turn the sign
    # Adding a constant changes no probability; what is left is the square of a rounding of 1e-6.
    assert bool((baselines.symmetric_kl(p.float(), p.float() + 2) < 1e-11).all())
    kl.sum().backward()
    assert bool(p.grad.abs().sum() > 0) and bool(q.grad.abs().sum() > 0)


def test_r3f_loss_is_the_cross_entropy_and_the_weighted_divergence():
    draw = torch.Generator().manual_seed(0)
    clean, noised = (torch.randn(5, 3, generator=draw, dtype=torch.float64) for _ in range(2))
    target = torch.tensor([0, 1, 2, 0, 1])
    p, q = clean.softmax(-1), noised.softmax(-1)
    both = (p * (p / q).log()).sum(-1) + (q * (q / p).log()).sum(-1)  # [B]
    expected = -p[range(5), target].log() + 0.7 * both
    torch.testing.assert_close(baselines.r3f_loss(clean, noised, target, 0.7), expected, **FLOAT64)
    with pytest.raises(ValueError, match="one shape"):
        baselines.symmetric_kl(clean, noised[:1])  # would broadcast
