"""What is measured of a model on inputs that it does not learn from, beside its training loss.

mask_input(model, x, config, draws) is `distill.mask_input`: what a model's loss takes beside x.
"""
from collections.abc import Callable

import torch
from torch import Tensor, nn

from support.draws import generator
from support.inputs import as_inputs
from support.loop import batch
from support.settings import Config, autocast, device

MOST = 512  # inputs: about a percent of noise


class Sample:
    """At most MOST inputs from all over a split, with masks that stay."""

    def __init__(self, inputs: object, model: nn.Module, config: Config,
                 mask_input: Callable) -> None:
        chosen = torch.linspace(0, len(inputs) - 1, min(MOST, len(inputs))).long()  # [MOST]
        self.config, self.parts = config, []
        for number, index in enumerate(chosen.split(64)):
            x, draws = batch(inputs, index, device(config)), generator(config.seed, "watch", number)
            self.parts.append((x, mask_input(model, x, config, draws)))

    @torch.no_grad()
    def mae_loss(self, model: nn.Module) -> float:
        """Line 10's mean over the inputs, without dropout."""
        was, model = model.training, model.eval()
        with autocast(self.config):
            losses = torch.cat([model.loss(x, **masked) for x, masked in self.parts])  # [MOST]
        model.train(was)
        return losses.mean().item()

    @torch.no_grad()
    def states(self, model: nn.Module) -> Tensor:
        """What line 11 compares, without dropout, end to end: of --match cls the class tokens."""
        first = slice(1) if self.config.match == "cls" else slice(None)
        was, model = model.training, model.eval()
        with autocast(self.config):
            found = [model.encoder(x)[:, first].float().flatten() for x, _ in self.parts]
        model.train(was)
        return torch.cat(found)


def watch(student: nn.Module, teacher: nn.Module | None, heldout: object, config: Config,
          mask_input: Callable) -> Callable[[], dict[str, float]] | None:
    """A function that measures a student, which is still its initial self; None without held-outs.

    `heldout_mae_loss`: `Sample.mae_loss`. `heldout_distance`: ‖student - teacher‖² over ‖initial -
    teacher‖² of their states.
    """
    if heldout is None:
        return None
    heldout = as_inputs(heldout, student.config, getattr(student, "tokenizer", None))
    sample = Sample(heldout, student, config, mask_input)
    told = sample.states(teacher) if teacher else None
    whole = (sample.states(student) - told).square().sum().item() if teacher else 0

    def measured() -> dict[str, float]:
        values = {"heldout_mae_loss": sample.mae_loss(student)}
        if whole:  # but where the student starts as its own teacher
            left = (sample.states(student) - told).square().sum().item()
            values["heldout_distance"] = left / whole
        return values

    return measured
