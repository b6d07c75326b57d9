"""Fine-tuning: an encoder f_θ with a fresh classification head h_ω, minimising the cross-entropy.

Paper: §3.1 "Problem Statement" (equation 1), §5 (metrics), §5.2 (gap and distance). The head
follows the released code for images (class token -> linear) and RoBERTa for text (<s> -> dense ->
tanh -> linear).

    python finetune.py                                            # tiny weights, toybirds
    python finetune.py --method recadam --seed 1
    python finetune.py --init runs/distill-toybirds-tiny-seed0/distilled-1.safetensors

With --predict a classifier that a run has saved names the classes of one's own pictures or texts.

Letters: B batch, K positions, D width, C classes, N examples.
"""
import collections
import copy
import csv
import os
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import baselines
import mae
import mlm
from support import fetch, images, parallel, run, settings, texts

# ----------------------------------------------------------------------------- scores (§5)


def accuracy(pred: Tensor, target: Tensor) -> float:
    """Share of predicted classes Long[N] that equal the target Long[N], 0 to 1."""
    return (pred == target).double().mean().item()


def f1(pred: Tensor, target: Tensor, num_classes: int, average: str = "macro") -> float:
    """F1, 0 to 1, of predicted classes Long[N] against Long[N].

    "macro": the mean over all `num_classes`, where a class that is neither predicted nor present
    counts 0; "micro": from the counts of all classes together, which is the accuracy where each
    example has one class.
    """
    if average not in ("macro", "micro"):
        raise ValueError(f"average is macro or micro, not {average!r}")
    hits = torch.bincount(target[pred == target], minlength=num_classes).double()  # [C]
    predicted, present = (torch.bincount(x, minlength=num_classes) for x in (pred, target))  # [C]
    shown = predicted + present  # [C]
    if average == "micro":
        return (2 * hits.sum() / shown.sum()).item()
    return (2 * hits / shown.clamp(min=1)).mean().item()


def score(metric: str, pred: Tensor, target: Tensor, num_classes: int) -> float:
    """The data set's own metric: "accuracy", "macro_f1" or "micro_f1"."""
    if metric == "accuracy":
        return accuracy(pred, target)
    return f1(pred, target, num_classes, metric[:5])


# ----------------------------------------------------------------------------- the classifier


class Classifier(nn.Module):
    """h_ω ∘ f_θ: the encoder and a head N(0, 0.02) on its first token."""

    def __init__(self, encoder: nn.Module, num_classes: int,
                 generator: torch.Generator | None = None) -> None:
        super().__init__()
        width = encoder.config.width
        self.encoder = encoder
        self.reads_text = isinstance(encoder, mlm.Encoder)
        if self.reads_text:
            self.dense = nn.Linear(width, width)
        else:
            encoder.positions.requires_grad_(True)  # fixed until now
        self.linear = nn.Linear(width, num_classes)
        for name, parameter in self.head().items():
            nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.normal_(
                parameter, std=0.02, generator=generator)

    def head(self) -> dict[str, nn.Parameter]:
        """ω by name: everything that is not the encoder's."""
        return {name: p for name, p in self.named_parameters() if not name.startswith("encoder.")}

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Normalised pictures [B, 3, S, S] or token ids [B, K] -> logits [B, C].

        noise (R3F) joins the pictures, or in the encoder the detached word embeddings [B, K, D].
        """
        if not self.reads_text:
            hidden = self.encoder(x if noise is None else x + noise)  # [B, 1+K, D]
            return self.linear(hidden[:, 0])  # [B, C]
        first = self.encoder(x, noise=noise)[:, 0]  # [B, D]
        return self.linear(torch.tanh(self.dense(self.encoder.dropout(first))))  # [B, C]


@torch.no_grad()
def predict(classifier: Classifier, inputs: object, config: settings.Config) -> Tensor:
    """Logits float32 [N, C], on the CPU, of all examples in eval mode, without augmentation."""
    classifier.eval()
    where, order = settings.device(config), torch.arange(len(inputs))
    logits = torch.zeros(len(inputs), classifier.linear.out_features, device=where)  # [N, C]
    if isinstance(inputs, texts.Texts):
        order = inputs.offsets.diff().argsort()  # alike lengths together: little padding
    for index in order.split(256)[parallel.rank()::parallel.world()]:
        with settings.autocast(config):
            logits[index] = classifier(run.batch(inputs, index, where)).float()
    return parallel.total(logits).cpu()


def distance(before: nn.Module, after: nn.Module) -> float:
    """‖θ_init - θ‖₂ over all tensors of two encoders (§5.2, Figure 5b)."""
    squares = [(a.cpu().double() - b.cpu().double()).square().sum()
               for a, b in zip(before.state_dict().values(), after.state_dict().values())]
    return torch.stack(squares).sum().sqrt().item()


# ----------------------------------------------------------------------------- equation 1


def make_optimiser(classifier: Classifier, config: settings.Config) -> torch.optim.Optimizer:
    """AdamW, or RecAdam with the encoder's present weights as its anchors.

    As released for this stage, biases, tokens and positions do not decay but LayerNorms do; for
    text, where nothing is released, LayerNorms do not either.
    """
    groups = {}
    for name, parameter in classifier.named_parameters():
        free = name.endswith("bias") or "cls_token" in name or "positions" in name or (
            classifier.reads_text and parameter.ndim == 1)
        in_encoder = name.startswith("encoder.")
        groups.setdefault((in_encoder, free), []).append(parameter)
    split = [{"params": params, "weight_decay": 0.0 if free else config.finetune_weight_decay,
              **({"pretrained": params} if in_encoder and config.method == "recadam" else {})}
             for (in_encoder, free), params in groups.items()]
    if config.method == "recadam":
        return baselines.RecAdam(split, lr=config.finetune_lr, anneal_k=config.recadam_k,
                                 anneal_t0=config.recadam_t0, pretrain_cof=config.recadam_cof)
    return torch.optim.AdamW(split, lr=config.finetune_lr, fused=True)


def check_recadam(config: settings.Config) -> None:
    """Refuse a pull towards θ_init that diverges: lr × γ of 2 or more (`BadInput`).

    While the task weight λ(t) is small, a step multiplies θ - θ_init by 1 - lr·γ.
    """
    pull = config.finetune_lr * config.recadam_cof
    if config.method == "recadam" and pull >= 2:
        raise fetch.BadInput(
            f"RecAdam would diverge: learning rate {config.finetune_lr:g} times --recadam-cof "
            f"{config.recadam_cof:g} is {pull:g}, and from 2 on every step, while the task weighs "
            "little, ends farther from the initial weights than it began; use --recadam-cof "
            f"{0.5 / config.finetune_lr:g}")


def train(classifier: Classifier, inputs: object, labels: Tensor, config: settings.Config,
          this: run.Run, stage: str) -> None:
    """Equation 1, (θ*, ω*) = A(L_CE; θ, D_tr), with A by --method; in place."""
    where, encoder = settings.device(config), classifier.encoder
    optimiser = make_optimiser(classifier, config)
    pairs = baselines.mars_pairs(encoder, encoder.state_dict()) if config.method == "mars" else []
    inputs = run.place(inputs, where)
    run.compiled(classifier, config)
    model = parallel.wrap(classifier.train())
    for step in this.stage(stage, 0, classifier, optimiser, config.finetune_steps,
                           config.finetune_lr, config.finetune_warmup, config):
        index = run.draw_batch(len(inputs), config.finetune_batch_size, config.seed,
                               "labelled order", 0, step)
        x, y = run.batch(inputs, index, where), labels[index].to(where)
        if not classifier.reads_text:  # the release's only augmentation: a horizontal flip, p = 0.5
            flip = torch.rand(len(x), generator=run.generator(config.seed, "flip", 0, step)) < 0.5
            x = torch.where(flip.to(where)[:, None, None, None], x.flip(3), x)
        if config.method == "r3f":
            shape = (*x.shape, encoder.config.width) if classifier.reads_text else x.shape
            noise = torch.randn(shape, generator=run.generator(config.seed, "noise", 0, step))
            # smaller than bf16's rounding of the input
            exact, noise = replace(config, precision="fp32"), noise.to(where) * config.r3f_eps
        logged = collections.defaultdict(float)
        for part in parallel.parts(model, len(x), config.accumulate):
            with settings.autocast(exact if config.method == "r3f" else config):
                logits = model(x[part])  # [B, C]
                if config.method == "r3f":
                    noised = model(x[part], noise[part])  # [B, C]
                    losses = baselines.r3f_loss(logits, noised, y[part], config.r3f_weight)  # [B]
                    kl = baselines.symmetric_kl(logits.detach(), noised.detach())  # [B]
                    logged["kl"] += parallel.share(kl, len(x))
                else:
                    losses = F.cross_entropy(logits.float(), y[part], reduction="none")  # [B]
            loss = parallel.share(losses, len(x))
            loss.backward()
            logged["loss"] += loss.detach()
        norm = run.clip_gradient(classifier, config.finetune_clip)
        optimiser.step()
        optimiser.zero_grad()
        if pairs:
            logged["projected"] = baselines.project_all(pairs, config.mars_radius)
        this.log(index, **logged, grad_norm=norm)


ROWS = {"finetune": "fine-tuning", "recadam": "RecAdam", "mars": "MARS", "r3f": "R3F"}


def fine_tune(model: nn.Module, data: fetch.Data, config: settings.Config, this: run.Run, row: str,
              initial: nn.Module | None = None) -> dict:
    """Fine-tune a copy of a model's encoder and measure it: the row of results.json.

    The score is on the test split; train_loss is over the whole training split without augmentation
    and in eval mode, so that gap = test_loss - train_loss compares like with like. distance is from
    `initial`'s encoder (θ_init; the model's own where none is given) to the fine-tuned one.
    """
    encoder = copy.deepcopy(model.encoder)
    encoder.dropout.p = config.dropout
    classifier = Classifier(encoder, len(data.classes), run.generator(config.seed, "head"))
    classifier.to(settings.device(config))
    train(classifier, data.train, data.train_labels, config, this,
          "fine-tuning" if row == "fine-tuning" else f"fine-tuning, {row}")
    train_logits, test_logits = (predict(classifier, x, config) for x in (data.train, data.test))
    train_loss = F.cross_entropy(train_logits, data.train_labels).item()
    test_loss = F.cross_entropy(test_logits, data.test_labels).item()
    if this.folder:
        about = {"model": "classifier", "classes": data.classes, **asdict(model.config)}
        path = this.folder / f"finetuned-{row.replace(' ', '-')}.safetensors"
        fetch.save_weights(classifier.state_dict(), about, path, **this.lineage, row=row,
                           method=config.method, step=str(config.finetune_steps))
    return {"method": row, "seed": config.seed, "metric": data.metric,
            "score": score(data.metric, test_logits.argmax(1), data.test_labels, len(data.classes)),
            "train_loss": train_loss, "test_loss": test_loss, "gap": test_loss - train_loss,
            "distance": distance((initial or model).encoder, classifier.encoder)}


# ----------------------------------------------------------------------------- predictions


def read_classifier(path: Path) -> tuple[Classifier, list[str]]:
    """The classifier that `fine_tune` saved, and its classes; `BadInput` for any other file."""
    tensors, about = fetch.read_weights(path)
    classes = about.get("classes")
    if about.get("model") != "classifier" or not isinstance(classes, list) or not classes or any(
            not isinstance(name, str) for name in classes):
        raise fetch.BadInput(f"{path} holds no classifier with its classes: --predict needs --init "
                             "with a finetuned-….safetensors of a run")
    kind = mlm if "vocab_size" in about else mae

    def sizes() -> object:
        own = about | {"special_ids": tuple(about["special_ids"])} if kind is mlm else about
        config = kind.Config(**{item.name: own[item.name] for item in fields(kind.Config)})
        return mlm.sound(config) if kind is mlm else config

    classifier = fetch.blank(lambda config: Classifier(kind.Encoder(config), len(classes)), sizes,
                             tensors, path)
    wanted = classifier.state_dict()
    found = fetch.translate(tensors, {name: name for name in wanted}, wanted)
    classifier.to_empty(device="cpu").load_state_dict(found)
    return classifier.eval(), classes


def write_predictions(config: settings.Config) -> Path:
    """A .csv with the most probable class of each input and every class's probability."""
    path = fetch.weights(config.init, "mae")
    classifier, classes = read_classifier(path)
    sizes = classifier.encoder.config
    if not os.path.exists(config.predict):
        raise fetch.BadInput(f"--predict: there is no {config.predict!r}")
    if classifier.reads_text:
        if not os.path.isfile(config.predict):
            raise fetch.BadInput(f"{path} reads texts, and {config.predict} is no file of them")
        beside = path.with_name("tokenizer.json")
        if not beside.exists():
            raise fetch.BadInput(f"there is no {beside}: put the run's tokenizer.json there")
        tokenizer = mlm.read_tokenizer(beside, sizes)
        names, inputs = texts.plain(config.predict, tokenizer, sizes.max_length)
    else:
        names, inputs = images.plain(config.predict, sizes.image_size)
    classifier.to(settings.device(config))
    probabilities = predict(classifier, inputs, config).softmax(1)  # [N, C]
    name = f"predictions-{Path(config.predict).resolve().stem[:50]}.csv"
    target = Path(config.out or path.parent) / name
    # names may have bytes that are no UTF-8
    with fetch.whole(target) as part, open(part, "w", encoding="utf-8", newline="",
                                           errors="backslashreplace") as file:
        rows = csv.writer(file)
        rows.writerow(["text" if classifier.reads_text else "file", "class", *classes])
        for name, chances in zip(names, probabilities):
            rows.writerow([name, classes[chances.argmax()], *(f"{p:.6f}" for p in chances)])
    return target


# ----------------------------------------------------------------------------- the program


def prepare(program: str, config: settings.Config
            ) -> tuple[nn.Module, fetch.Data, settings.Config, run.Run]:
    """The model and data that the settings name, the settings filled in, and the run's folder."""
    with parallel.in_turn():
        model = run.load_model(mlm.MLM if config.modality == "text" else mae.MAE, config)
        data = run.load_data(config, model)
    settings.check_sizes(program, config, data)
    config = settings.fill(config, model, len(data.train))
    folder = run.folder(program, config, model, len(data.train))
    check_recadam(config if program != "baselines" else replace(config, method="recadam"))
    return model, data, config, run.Run(folder, config, data=data.fingerprint,
                                        source=data.note, init_weights=run.digest(model))


def measure(rows: dict[str, tuple[nn.Module, str]], initial: nn.Module, data: fetch.Data,
            config: settings.Config, this: run.Run) -> dict:
    """Fine-tune every row's model by its method and finish the run; returns results.json."""
    if this.folder and initial.modality == "text":
        initial.save_tokenizer(this.folder)  # --predict reads it
    results = []
    for row, (model, method) in rows.items():
        own = replace(config, method=method)
        results.append(this.measured(row, lambda: fine_tune(model, data, own, this, row, initial),
                                     own, model.encoder, initial.encoder))
    return this.finish(data, results)


def main() -> None:
    config = settings.parse("finetune", __doc__)
    if config.predict:
        print(f"wrote {write_predictions(config)}")
        return
    model, data, config, this = prepare("finetune", config)
    rows = {ROWS[config.method]: (model, config.method)}
    this.report(this.results() or measure(rows, model, data, config, this))


if __name__ == "__main__":
    run.program(main)
