"""The three regularised ways of fine-tuning that the paper compares with: section 5, "Baselines".

All start at the pre-trained weights θ_init and keep the fine-tuned model near it, each in its way.
The paper gives none of their settings; the defaults here are those of the methods' own releases.

    RecAdam   an optimiser that pulls every weight back towards θ_init
              Chen et al., EMNLP 2020, https://arxiv.org/abs/2004.12651
    MARS      a projection, after each step, of every weight's rows onto balls around θ_init
              Gouk et al., ICLR 2021, https://arxiv.org/abs/2002.08253
    R3F       a term of the loss that wants one answer for an input and for the same with noise
              Aghajanyan et al., ICLR 2021, https://arxiv.org/abs/2008.03156

Shapes: B batch, C classes; a weight is [rows, ...], one row for each output unit.

    python baselines.py                               # the bundled tiny ViT on generated birds
    python baselines.py --dataset pydocs --seed 1     # the bundled tiny RoBERTa on docstrings
"""
import math
import warnings
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ----------------------------------------------------------------------------- RecAdam


def anneal(step: int, fun: str, k: float, t0: float, w: float) -> float:
    """λ(t), the weight of the task while the pull has w - λ(t): Chen et al.'s objective shifting.

    step: the optimiser's own count, the first is 1. fun: "sigmoid", w / (1 + e^(-k (t - t0)));
    "linear", w min(1, t / t0); "constant", w, which leaves no pull at all.
    ValueError for another name, and for "linear" without t0 > 0.
    """
    if fun == "sigmoid":
        x = k * (step - t0)
        small = math.exp(-abs(x))  # a power that cannot overflow, however far t0 is away
        return w * (1.0 if x >= 0 else small) / (1.0 + small)
    if fun == "linear":
        if t0 <= 0:
            raise ValueError(f"linear annealing divides by t0, which must be positive, not {t0}")
        return w * min(1.0, step / t0)
    if fun == "constant":
        return w
    raise ValueError(f"anneal_fun is sigmoid, linear or constant, not {fun!r}")


def annealed(group: dict, step: int) -> float:
    """λ(t) with the settings of one of RecAdam's groups."""
    return anneal(step, *(group[f"anneal_{name}"] for name in ("fun", "k", "t0", "w")))


class RecAdam(torch.optim.Optimizer):
    """Adam on λ(t)·task + (w - λ(t))·γ/2·||θ - θ_init||², the pull decoupled as weight decay is.

    param_groups: as for torch.optim.Adam. A group's "pretrained" lists θ_init, a tensor for each of
    its parameters in the same order; a group without it (a new head) gets plain Adam. These anchors
    are copied, so before training the parameters themselves may be passed, and state_dict() leaves
    them out. pretrain_cof is γ and anneal_w is w. ValueError where anchors do not fit their
    parameters or the annealing cannot be computed.
    Source: Chen et al.; the order of the update is their released optimiser's.
    """

    def __init__(self, param_groups: Iterable, lr: float = 1e-3,
                 betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.0, anneal_fun: str = "sigmoid", anneal_k: float = 0.5,
                 anneal_t0: float = 250, anneal_w: float = 1.0, pretrain_cof: float = 5000.0,
                 correct_bias: bool = True) -> None:
        self.anchors: dict[Tensor, Tensor] = {}  # parameter -> its part of θ_init
        super().__init__(param_groups, {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "anneal_fun": anneal_fun, "anneal_k": anneal_k, "anneal_t0": anneal_t0,
            "anneal_w": anneal_w, "pretrain_cof": pretrain_cof, "correct_bias": correct_bias})

    def add_param_group(self, param_group: dict) -> None:
        """Add a group, its anchors aside: inside it they would double every checkpoint."""
        param_group = dict(param_group)
        anchors = param_group.pop("pretrained", None)
        super().add_param_group(param_group)
        if anchors is None:
            return
        group = self.param_groups[-1]
        parameters = group["params"]
        annealed(group, 1)  # a schedule that cannot be computed fails here, before any training
        # zip alone would drop the longer list's surplus, or pull weights to a stranger's values.
        if len(anchors) != len(parameters):
            raise ValueError(f"a group has {len(parameters)} parameters and {len(anchors)} anchors")
        for theta, anchor in zip(parameters, anchors):
            if theta.shape != anchor.shape:
                raise ValueError(f"an anchor is {list(anchor.shape)} where its parameter is "
                                 f"{list(theta.shape)}")
            self.anchors[theta] = anchor.detach().to(theta, copy=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update of every parameter that has a gradient; returns what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for theta in group["params"]:
                if theta.grad is not None:  # without one there is no pull either, as released
                    self._update(theta, group)
        return loss

    def _update(self, theta: Tensor, group: dict) -> None:
        state = self.state[theta]
        if not state:
            # A tensor, as in torch's own optimisers: whatever saves their state saves this one.
            state.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(theta),
                         exp_avg_sq=torch.zeros_like(theta))
        state["step"] += 1
        t, m, v = int(state["step"]), state["exp_avg"], state["exp_avg_sq"]
        lr, (beta1, beta2), grad = group["lr"], group["betas"], theta.grad

        # 1. Adam's moments see the task's gradient alone: the pull never enters them.
        m.mul_(beta1).add_(grad, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)

        # 2. ε joins √v before its bias is corrected. torch.optim.Adam adds it afterwards.
        size = lr
        if group["correct_bias"]:
            size *= math.sqrt(1 - beta2**t) / (1 - beta1**t)
        scale = v.sqrt().add_(group["eps"])

        # 3. The task moves θ, then the pull moves what came of that, with the bare learning rate.
        anchor = self.anchors.get(theta)
        if anchor is None:
            theta.addcdiv_(m, scale, value=-size)
        else:
            task = annealed(group, t)
            pull = lr * (group["anneal_w"] - task) * group["pretrain_cof"]
            if pull >= 2:  # |1 - pull| >= 1: each step ends farther from θ_init than it began
                warnings.warn("RecAdam's pull overshoots and may diverge: lower lr or pretrain_cof "
                              "until their product is below 2", stacklevel=2)
            theta.addcdiv_(m, scale, value=-size * task)
            theta.sub_(theta - anchor, alpha=pull)

        # 4. Weight decay comes last, on the θ of step 3, as a difference: in float32 the factor
        # 1 - lr·decay of a small lr·decay would keep few of its digits.
        if group["weight_decay"] > 0:
            theta.sub_(theta, alpha=lr * group["weight_decay"])


# ----------------------------------------------------------------------------- MARS


def row_lengths(weight: Tensor, anchor: Tensor) -> Tensor:
    """L1 length of each output row of weight - anchor, [rows, ...] -> [rows], in float32 or wider.

    A convolution's row is its input channels and both kernel axes together, as Gouk et al. have it.
    ValueError for different shapes and for fewer than two axes.
    """
    if weight.shape != anchor.shape or weight.ndim < 2:
        raise ValueError(f"MARS compares two matrices or kernels of one shape, not "
                         f"{list(weight.shape)} and {list(anchor.shape)}")
    wide = torch.promote_types(weight.dtype, torch.float32)  # a row adds up to thousands of values
    return (weight.to(wide) - anchor.to(wide)).abs().flatten(1).sum(1)  # [rows]


def mars_distance(weight: Tensor, anchor: Tensor) -> Tensor:
    """max_j Σ_i |W_ji - U_ji|, a scalar that gradients flow through; errors as in row_lengths.

    Source: the paper, section 5; Gouk et al., the maximum absolute row sum norm.
    """
    return row_lengths(weight, anchor).max()


@torch.no_grad()
def mars_project(weight: Tensor, anchor: Tensor, radius: float) -> Tensor:
    """The weight [rows, ...], in its dtype, with each row that left its ball drawn straight back.

    A row's ball has the L1 radius `radius` around the anchor's row: rows inside come back bit for
    bit, radius 0 gives the anchor. ValueError for a negative radius and as in row_lengths.
    Source: Gouk et al., the projected variant (MARS-PGM). A row keeps the direction of its move,
    which the nearest point of an L1 ball would not; and no row's length matters to another.
    """
    if not radius >= 0:
        raise ValueError(f"the radius of MARS is an L1 length, zero or more, not {radius}")
    lengths = row_lengths(weight, anchor).view(-1, *[1] * (weight.ndim - 1))  # [rows, 1, ...]
    wide = anchor.to(lengths.dtype)
    # Where a row is outside, its length is above the radius and so above 0; elsewhere where() drops
    # the quotient, be it 0/0.
    shrunk = wide + (weight.to(lengths.dtype) - wide) * (radius / lengths)  # [rows, ...]
    return torch.where(lengths > radius, shrunk.to(weight.dtype), weight)


def mars_pairs(encoder: nn.Module, anchors: dict[str, Tensor]) -> list[tuple[nn.Parameter, Tensor]]:
    """The weights that MARS constrains, every nn.Linear's, each with a copy of its anchor.

    The ViT's patch embedding is one, a linear map of flattened patches; a fused query-key-value
    weight needs no splitting, as rows are projected one by one. Gouk et al. constrain no bias, and
    their networks have no LayerNorm, embedding table or token: these stay free.
    anchors: the pre-trained encoder's state_dict(), which may be the encoder's own before training.
    ValueError where an anchor is missing.
    """
    pairs = []
    for name, layer in encoder.named_modules():
        if isinstance(layer, nn.Linear):
            key = f"{name}.weight".lstrip(".")  # the encoder's own name is ""
            if key not in anchors:
                raise ValueError(f"MARS needs the pre-trained value of {key}")
            pairs.append((layer.weight, anchors[key].detach().to(layer.weight.device, copy=True)))
    return pairs


@torch.no_grad()
def project_all(pairs: list[tuple[nn.Parameter, Tensor]], radius: float) -> Tensor:
    """Project all of mars_pairs in place, after a whole optimiser step; the share of rows it moved.

    One radius serves every layer, as in Gouk et al.'s release; the optimiser's moments stay as they
    are. Errors as in mars_project.
    """
    moved = 0
    for weight, anchor in pairs:
        projected = mars_project(weight, anchor, radius)
        moved = moved + (projected != weight).flatten(1).any(1).sum()
        weight.copy_(projected)
    return moved / sum(len(weight) for weight, _ in pairs)


# ----------------------------------------------------------------------------- R3F
#
# The release (fairseq) draws noise for RoBERTa that never reaches its encoder, so there only two
# dropout masks differ. Here both passes get what they are given: the noise must be in the logits.


def symmetric_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p||q) + KL(q||p) in nats, [B, C] and [B, C] -> [B], in float32 or wider.

    Written as Σ_c (p - q)(log p - log q): equal logits give exactly 0, and both factors have one
    sign, where the sum of two divergences in float32 is off by 1e-7 and may be negative.
    Gradients flow through both arguments. ValueError for different shapes.
    Source: Aghajanyan et al.: the plain sum of both directions, without a half.
    """
    if p_logits.shape != q_logits.shape:
        raise ValueError(f"symmetric_kl compares logits of one shape, not {list(p_logits.shape)} "
                         f"and {list(q_logits.shape)}")
    wide = torch.promote_types(p_logits.dtype, torch.float32)
    log_p, log_q = (F.log_softmax(logits, -1, dtype=wide) for logits in (p_logits, q_logits))
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)  # [B]


def r3f_loss(clean_logits: Tensor, noised_logits: Tensor, target: Tensor,
             weight: float = 1.0) -> Tensor:
    """Cross-entropy of the clean input plus λ times symmetric_kl to the noised one -> [B].

    clean_logits, noised_logits [B, C] from the input and from the input plus fresh Gaussian noise;
    target [B], the classes' indices; weight is λ, 1 in the release. Errors as in symmetric_kl.
    Source: the paper, section 5; Aghajanyan et al., the objective of R3F.
    """
    wide = torch.promote_types(clean_logits.dtype, torch.float32)
    cross_entropy = F.cross_entropy(clean_logits.to(wide), target, reduction="none")  # [B]
    return cross_entropy + weight * symmetric_kl(clean_logits, noised_logits)  # [B]


# ----------------------------------------------------------------------------- the program


def main() -> None:
    """Fine-tune once by each method, plain fine-tuning first, and print a row for each."""
    import finetune  # finetune uses this file, so the arrow back is drawn only here
    from support import settings

    config = settings.parse("baselines", __doc__)
    model, data, config, this = finetune.prepare("baselines", config)
    rows = {row: (model, method) for method, row in finetune.ROWS.items()}
    this.report(this.results() or finetune.measure(rows, model, data, config, this))


if __name__ == "__main__":
    from support.run import program
    program(main)
