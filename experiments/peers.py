"""The same steps with transformers: its models and losses and torch's AdamW, as people use them.

Every position is predicted, texts are padded, and the teacher runs in every step. Batches and masks
are ours and at hand, but of pictures exactly so many patches are masked.

Letters: B batch, K positions, D width, S side.
"""
import itertools

import torch
from torch import Tensor, nn

import distill
import mae
import mlm
from support import draws, settings
from support.loop import batch

BATCHES = 8  # different ones, over and over


def theirs(ours: nn.Module, config: settings.Config, tunes: bool, attention: str) -> nn.Module:
    """A new model of the same sizes; tunes: a classifier. attention: "eager" or "sdpa"."""
    import transformers as hub  # whoever compares has installed it
    text, sizes = ours.modality == "text", ours.config
    if text:
        kind = hub.RobertaForSequenceClassification if tunes else hub.RobertaForMaskedLM
        about = hub.RobertaConfig(vocab_size=sizes.vocab_size, type_vocab_size=1)
    else:
        kind = hub.ViTForImageClassification if tunes else hub.ViTMAEForPreTraining
        about = (hub.ViTConfig if tunes else hub.ViTMAEConfig)(
            image_size=sizes.image_size, patch_size=sizes.patch_size)
    for name, their_name in (mlm if text else mae).HUB_FIELDS.items():
        setattr(about, their_name, getattr(sizes, name))
    about.num_labels, about.norm_pix_loss, about.mask_ratio = 100, True, config.mask_prob
    about._attn_implementation = attention
    about.hidden_dropout_prob = config.dropout if tunes else config.pretrain_dropout
    about.attention_probs_dropout_prob = about.hidden_dropout_prob if text else 0.0
    return kind(about).to(settings.device(config))


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
            told["labels"] = index % 100
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
