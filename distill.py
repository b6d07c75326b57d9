"""Algorithm 1: further pre-training, then rounds of self-distillation; the program of the paper.

Paper: §3.2 (equation 3), Algorithm 1; variants of Table 3 (`--match`) and Table 6 (`--mae-weight`).
Lee et al., "Self-Distillation for Further Pre-training of Transformers", ICLR 2023.

    python distill.py                   # drawn birds, bundled weights, offline, minutes on a laptop
    python distill.py --dataset pydocs  # the same with text
    python distill.py --dataset cub     # the paper's own experiment: a GPU and a network

θ is an encoder's parameters, φ a decoder's; a model here is both, g_φ ∘ f_θ (`mae.MAE`, `mlm.MLM`).

Letters: B batch, K positions, D width, V vocabulary, N examples.
"""
import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import baselines
import finetune
import mae
import mlm
from support import fetch, images, parallel, run, settings
from support.settings import Config

# ----------------------------------------------------------------------------- line 10: L_MAE


def mask_input(model: nn.Module, x: Tensor, config: Config,
               draws: torch.Generator) -> tuple[Tensor, dict]:
    """Lines 7-9: a mask z Bool[B, K] for x, and what else the model's loss needs to know."""
    if model.modality == "image":
        draw = mae.fixed_mask if config.masking == "fixed" else mae.bernoulli_mask
        mask = model.draw_mask(x, config.mask_prob, draws, draw)
        return mask, {"norm_pix": config.pixels == "norm"}
    mask = model.draw_mask(x, config.mask_prob, draws)
    recipe = "80-10-10" if config.masking == "80-10-10" else "mask"
    return mask, {"corrupted": mlm.corrupt(x, mask, recipe, draws, model.config)}


# ----------------------------------------------------------------------------- line 11: L_Distill


def distillation_loss(student_hidden: Tensor, teacher_hidden: Tensor) -> Tensor:
    """Line 11, [B]: ℓ²_j = ‖f_θt(x_j) - StopGrad(f_θ0(x_j))‖²₂.

    Hidden states [B, 1+K, D] or [B, K, D] are summed over positions and channels; padding is zero
    in both and adds nothing.
    """
    difference = student_hidden.float() - teacher_hidden.detach().float()  # [B, K, D]
    return difference.square().flatten(1).sum(1)  # [B]


def prediction_matching(student: nn.Module, teacher: nn.Module, x: Tensor, mask: Tensor,
                        known: dict) -> Tensor:
    """Table 3, Prediction-Matching, [B]: both predict x from the same x̂, each by its own decoder.

    Images: ‖g_φ∘f_θ(x̂) - g_φ0∘f_θ0(x̂)‖²₂. Text: Σ_k KL(p_θ0,φ0(x_k|x̂) ‖ p_θ,φ(x_k|x̂)).
    """
    if student.modality == "image":
        with torch.no_grad():
            target = teacher.reconstruct(x, mask)  # [B, K, P]
        return distillation_loss(student.reconstruct(x, mask), target)
    attention = x != student.config.pad_id  # [B, K]

    def log_p(model: nn.Module) -> Tensor:  # [N, V], of the N real tokens
        hidden = model.encoder(known["corrupted"], attention)[attention]  # [N, D]
        return model.head(hidden, model.encoder.word.weight).float().log_softmax(1)

    with torch.no_grad():
        target = log_p(teacher)  # [N, V]
    kl = F.kl_div(log_p(student), target, reduction="none", log_target=True).sum(1)  # [N]
    return torch.zeros(x.shape, device=x.device).masked_scatter(attention, kl).sum(1)  # [B]


def weight_matching(student: nn.Module, teacher: nn.Module, distance: str) -> Tensor:
    """Table 3, Weight-Matching, a scalar: Σ_ℓ ‖θ_ℓ - θ_0,ℓ‖² (l2) or Σ_ℓ MARS(θ_ℓ, θ_0,ℓ) (mars).

    MARS is a norm of linear maps: it leaves out biases, LayerNorms, tokens and embeddings.
    """
    if distance == "l2":
        pairs = zip(student.encoder.parameters(), teacher.encoder.parameters())
        return torch.stack([(a - b).square().sum() for a, b in pairs if a.requires_grad]).sum()
    layers = zip(student.encoder.modules(), teacher.encoder.modules())
    return torch.stack([baselines.mars_distance(a.weight, b.weight) for a, b in layers
                        if isinstance(a, nn.Linear)]).sum()


def matching(student: nn.Module, teacher: nn.Module, x: Tensor, mask: Tensor, known: dict,
             config: Config) -> Tensor:
    """What stands in line 11's place under --match prediction, l2 or mars: [B]."""
    if config.match == "prediction":
        return prediction_matching(student, teacher, x, mask, known)
    return weight_matching(student, teacher, config.match).expand(len(x))  # [B] the same for all


# ----------------------------------------------------------------------------- Algorithm 1


def adamw(model: nn.Module, config: Config) -> torch.optim.AdamW:
    """The optimiser of lines 14-15; as released for this stage, what is 1-D does not decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
              {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def pretrain(student: nn.Module, teacher: nn.Module | None, inputs: object, config: Config, t: int,
             this: run.Run) -> nn.Module:
    """Lines 4-16 for round t, in place; t = 0 has no teacher: equation 2, further pre-training."""
    where = settings.device(config)
    name = "self-distillation" if teacher else "further pre-training"
    student.to(where).train()
    run.compiled(student, config)
    model, optimiser = parallel.wrap(student), adamw(student, config)
    inputs, weight = run.place(inputs, where), config.mae_weight if teacher else 1.0
    of_states = teacher is not None and config.match in ("hidden", "cls")
    matched = slice(1) if config.match == "cls" else slice(None)  # of the K positions
    if of_states:
        target = run.remembered(lambda x: teacher.encoder(x)[:, matched], inputs, config,
                                this.folder)
    for step in this.stage(  # 4
            name, t, student, optimiser, config.steps, config.lr, config.warmup, config):
        index = run.draw_batch(len(inputs), config.batch_size, config.seed, "order", t, step)
        x = run.batch(inputs, index, where)  # 5: {x_j} from D_u
        draws = run.generator(config.seed, "mask", t, step)
        mask, known = mask_input(student, x, config, draws)  # 7-9: z_j, Z_j, x̂_j
        L1 = L2 = torch.zeros((), device=where)
        for part in parallel.parts(model, len(x), config.accumulate):  # 6: for all j, at once
            x_j, z_j, known_j = x[part], mask[part], run.cut(known, part)
            with settings.autocast(config):
                l1, hidden = model(x_j, z_j, of_states, **known_j)  # 10: ℓ¹_j
                l2 = torch.zeros_like(l1)
                if of_states:  # 11: ℓ²_j
                    l2 = distillation_loss(hidden[:, matched], target(index[part], x_j))
                elif teacher:
                    l2 = matching(student, teacher, x_j, z_j, known_j, config)
            l1, l2 = parallel.share(l1, len(x)), parallel.share(l2, len(x))  # 13: 1/B Σ_j ℓ_j
            (weight * l1 + l2).backward()
            L1, L2 = L1 + l1.detach(), L2 + l2.detach()
        norm = run.clip_gradient(student, config.clip)
        optimiser.step()  # 14-15: θ by ∂(L1 + L2)/∂θ; φ by ∂L1/∂φ, as φ is not in line 11's L2
        optimiser.zero_grad()
        losses = {"mae_loss": L1} | ({"distill_loss": L2} if teacher else {})
        this.log(index, **losses, grad_norm=norm)
    return student.eval()


def further_pretrain(model: nn.Module, inputs: object, config: Config,
                     this: run.Run | None = None) -> nn.Module:
    """Line 1: a copy of (θ_init, φ_init) trained on L_MAE alone; the model itself stays as it is.

    inputs: unlabelled D_u, of which inputs[Long[B]] is a batch: uint8 or normalised pictures
    [N, 3, S, S], `texts.Texts`, or token ids [N, K].
    """
    config = settings.fill(config, model, len(inputs))
    return pretrain(copy.deepcopy(model), None, inputs, config, 0, this or run.Run())


def self_distill(initial_model: nn.Module, inputs: object, config: Config,
                 this: run.Run | None = None) -> list[nn.Module]:
    """Algorithm 1: whole models [θ_0, θ_1, …, θ_T'], the first of further pre-training alone.

    inputs: as in `further_pretrain`. What the run's folder already holds is not trained again.
    """
    config, this = settings.fill(config, initial_model, len(inputs)), this or run.Run()
    models = [this.kept("further", initial_model,
                        lambda: further_pretrain(initial_model, inputs, config, this))]  # 1: θ_0
    for t in range(1, config.rounds + 1):  # 2
        # θ_0 <- θ_t-1: what line 1 or the last round made, frozen
        teacher = copy.deepcopy(models[-1]).to(settings.device(config)).eval().requires_grad_(False)
        student = copy.deepcopy(initial_model)  # 3: θ_t <- θ_init, φ_t <- φ_init
        models.append(this.kept(
            f"distilled-{t}", initial_model,
            lambda: pretrain(student, teacher, inputs, config, t, this),  # 4-16
            "further" if t == 1 else f"distilled-{t - 1}"))
    return models  # Algorithm 1 returns the last


# ----------------------------------------------------------------------------- the program


def draw_reconstructions(models: dict[str, nn.Module], data: fetch.Data, config: Config,
                         path: Path) -> None:
    """Write eight pictures as original | masked | one reconstruction for each of the models."""
    pixels = images.spread(data.train if data.test is None else data.test, 8)
    draws, columns = run.generator(config.seed, "pictures"), []
    mask = next(iter(models.values())).draw_mask(pixels, config.mask_prob, draws)
    for model in models.values():
        model = copy.deepcopy(model).cpu().eval()
        drawn = mae.pictures(model, pixels, mask, config.pixels == "norm")
        original, masked, reconstructed = zip(*drawn)
        columns.append(reconstructed)
    rows = list(zip(original, masked, *columns))
    images.grid(rows, path, ["original", "masked", *models])


def main() -> None:
    config = settings.parse("distill", __doc__)
    model, data, config, this = finetune.prepare("distill", config)
    if not (results := this.results()):
        models = self_distill(model, data.train, config, this)
        made = {"further pre-training": models[0], "self-distillation": models[-1]}
        if not config.rounds:
            del made["self-distillation"]
        if this.folder and model.modality == "image":
            draw_reconstructions({"initial weights": model, **made}, data, config,
                                 this.folder / "reconstructions.png")
        rows = {"fine-tuning": model, **made}
        if data.train_labels is None or data.test_labels is None:
            print(f"{data.name} is not labelled in both splits: pre-trained, not fine-tuned")
            rows = {}
        rows = {row: (model, config.method) for row, model in rows.items()}
        results = finetune.measure(rows, model, data, config, this)
    this.report(results)


if __name__ == "__main__":
    run.program(main)
