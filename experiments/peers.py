"""The same steps with transformers: its models and losses and torch's AdamW, as people use them.

Every position is predicted, texts are padded, and the teacher runs in every step. Batches and masks
are ours and at hand, but of pictures exactly so many patches are masked.

Letters: B batch, K positions, D width, S side.
"""
import itertools

import torch
from torch import Tensor, nn

import distill
from support import draws, settings
from support.loop import batch
from support.names import ROBERTA_FIELDS, VIT_FIELDS

BATCHES = 8  # different ones, over and over


def theirs(ours: nn.Module, config: settings.Config, tunes: bool, attention: str) -> nn.Module:
    """A new model of the same sizes; tunes: a classifier. attention: "eager" or "sdpa"."""
    import transformers as hub  # whoever compares has installed it
    kind = {("image", False): hub.ViTMAEForPreTraining, ("text", False): hub.RobertaForMaskedLM,
            ("image", True): hub.ViTForImageClassification,
            ("text", True): hub.RobertaForSequenceClassification}[ours.modality, tunes]
    names = {"image": VIT_FIELDS | {"image_size": "image_size", "patch_size": "patch_size"},
             "text": ROBERTA_FIELDS | {"vocab_size": "vocab_size"}}[ours.modality]
    dropout = config.dropout if tunes else config.pretrain_dropout
    sizes = {hub_name: getattr(ours.config, name) for name, hub_name in names.items()} | {
        "hidden_dropout_prob": dropout, "type_vocab_size": 1, "num_labels": 10,
        "attention_probs_dropout_prob": dropout if ours.modality == "text" else 0.0,
        "norm_pix_loss": True, "mask_ratio": config.mask_prob, "attn_implementation": attention}
    return kind(kind.config_class(**sizes)).to(settings.device(config))


class Peer:
    """One step of a stage of training a call, on inputs that a model of ours would take."""

    def __init__(self, stage: str, ours: nn.Module, config: settings.Config, inputs: object,
                 attention: str) -> None:
        self.stage, self.config, self.where = stage, config, settings.device(config)
        self.model, self.teacher = (theirs(ours, config, stage == "fine-tuning", attention)
                                    for _ in range(2))
        self.teacher.eval()
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.loss = self.losses
        if config.compile:  # texts of many lengths compile once
            self.loss = torch.compile(self.losses, dynamic=ours.modality == "text" or None)
        self.batches = itertools.cycle([self.drawn(ours, inputs, i) for i in range(BATCHES)])

    def drawn(self, ours: nn.Module, inputs: object, step: int) -> tuple[Tensor, dict]:
        """A mini-batch as our loop draws one, and what their model is called with."""
        index = draws.batch(len(inputs), len(inputs) // BATCHES, step, "order")  # [B]
        x = batch(inputs, index, self.where)  # [B, 3, S, S] or [B, K], of texts on the CPU
        told = {"pixel_values": x} if x.ndim == 4 else {"input_ids": x, "attention_mask": x != 1}
        if self.stage == "fine-tuning":
            told["labels"] = index % 10
        else:
            masked = distill.mask_input(ours, x, self.config, draws.generator("mask", step))
            told |= {"noise": masked["mask"].float()} if x.ndim == 4 else {
                "input_ids": masked["corrupted"], "labels": x.masked_fill(~masked["mask"], -100)}
        return x.to(self.where), {name: value.to(self.where) for name, value in told.items()}

    def hidden(self, model: nn.Module, x: Tensor) -> Tensor:
        """The first position's hidden state [B, 1, D] of unmasked input."""
        if x.ndim == 2:
            return model.roberta(x, x != 1).last_hidden_state[:, :1]
        order = torch.arange((x.shape[2] // model.config.patch_size)**2, device=x.device)  # [K]
        model.config.mask_ratio, usual = 0.0, model.config.mask_ratio
        states = model.vit(x, noise=order.expand(len(x), -1)).last_hidden_state  # [B, 1+K, D]
        model.config.mask_ratio = usual
        return states[:, :1]

    def losses(self, x: Tensor, told: dict[str, Tensor]) -> Tensor:
        """What a step descends on, a scalar."""
        loss = self.model(**told).loss
        if self.stage == "self-distillation":
            with torch.no_grad():
                target = self.hidden(self.teacher, x)
            loss = loss + distill.distillation_loss(self.hidden(self.model, x), target).mean()
        return loss

    def __call__(self) -> None:
        with settings.autocast(self.config):
            loss = self.loss(*next(self.batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()
