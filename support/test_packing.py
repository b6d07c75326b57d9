"""The plan of a step's indices: right, and the only thing in a step that counts.

That a GPU is never waited for is shown without one, on torch's device "meta", whose tensors have
shapes but no values: there a step fails where it needs a value (how many are masked?), and a watch
on every operation notes what would stop a GPU.
"""
import contextlib
import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import baselines
import distill
import finetune
import mae
import mlm
from support import draws, loop, packing, recall, settings
from support.run import Run
from support.test_helpers import close, config_of, examples, normal, tiny

pytest_plugins = ["support.test_helpers"]  # its fixtures


@pytest.mark.parametrize("prob", [0.0, 0.5, 1.0])
def test_a_plan_puts_every_token_where_it_was(prob):
    mask = torch.rand(5, 7, generator=draws.generator("a mask")) < prob
    mask[:, 6] = True  # no row is full
    x, kept = normal(5, 7, 3), ~mask
    kept[:, 0] = True  # and none empty
    plan = packing.plan(kept, mask, torch.device("cpu"))
    packed, twice = plan.take(x), plan.twice()
    assert torch.equal(packed, x[kept])
    assert torch.equal(plan.unpack(packed), x * kept[..., None])
    assert torch.equal(plan.unpack(packed, torch.ones(3)), x.where(kept[..., None], torch.ones(3)))
    rows = [row[chosen] for row, chosen in zip(x, kept, strict=True)]
    assert torch.equal(plan.rows(packed), nn.utils.rnn.pad_sequence(rows, batch_first=True))
    assert torch.equal(plan.tokens(plan.rows(packed)), packed)
    assert (plan.allowed is None) == (len(kept.sum(1).unique()) == 1)
    for mean, losses, z in zip(plan.mean(x[..., 0][mask]), x[..., 0], mask, strict=True):
        close(mean, losses[z].sum() / max(1, z.sum()), 1e-6)  # float32 in another order
    both = twice.take(torch.cat([x, -x]))
    assert torch.equal(both, torch.cat([packed, -packed]))
    assert torch.equal(twice.tokens(twice.rows(both)), both)


# ----------------------------------------------------------------------------- nothing waits

DEVICE = torch.device("meta")  # shapes without values: what needs a value there, fails
COUNTING = {torch.ops.aten.nonzero.default, torch.ops.aten.masked_select.default,
            torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default}


class Watch(TorchDispatchMode):
    """Notes what a GPU would stop for: operations that count, and copies not made by `bring`."""

    def __init__(self) -> None:
        super().__init__()
        self.stops, self.operations = [], 0

    def __torch_dispatch__(self, function: Callable, types: object, args: tuple = (),
                           kwargs: dict | None = None) -> object:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        there = [x for x in given if x.device == DEVICE]
        self.operations += bool(there)
        by_mask = function is torch.ops.aten.index.Tensor and any(
            x.dtype == torch.bool for x in given[1:])
        if there and (function in COUNTING or by_mask):
            self.stops.append(str(function))
        result = function(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        crossed = len(given) > 0 and not there and any(x.device == DEVICE for x in made)
        if crossed or there and any(x.device.type == "cpu" for x in made):
            self.stops.append(f"copy by {function}")
        return result


def remember(self: recall.Recall) -> None:
    """The memory of a teacher's states on the device; to fill it, once a stage, may wait."""
    positions = () if self.flat else (1 if self.first_only else 5,)
    self.memory = torch.zeros(len(self.inputs.ids) if self.flat else 20, *positions, 32,
                              device=DEVICE)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """Programs compute on a device without values, and are watched."""
    bring, watch = packing.bring, Watch()

    def unwatched(where: torch.device, *tensors: torch.Tensor) -> list[torch.Tensor]:
        with _disable_current_modes():
            return bring(where, *tensors)

    for module in (packing, loop, recall, mae, mlm, finetune):
        if hasattr(module, "bring"):
            monkeypatch.setattr(module, "bring", unwatched)
    for module in (settings, loop, recall):
        monkeypatch.setattr(module, "device", lambda _: DEVICE)
    # what such a device lacks: random states, autocast, fused optimisers, and values to log
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(baselines.Stage, "draws", lambda stage, stream, *_: draws.generator(
        stream, stage.step))
    plain = torch.optim.AdamW.__init__
    monkeypatch.setattr(torch.optim.AdamW, "__init__", lambda self, *args, **given: plain(
        self, *args, **given | {"fused": False}))
    monkeypatch.setattr(recall.Recall, "_remember", remember)
    monkeypatch.setattr(loop.Stage, "_log", lambda *_: None)  # reading waits, on purpose
    monkeypatch.setattr(loop.Stage, "_check", lambda *_: None)
    with watch:
        yield watch


@pytest.mark.parametrize("way", ["hidden", "cls", "prediction", "l2", "mars", *baselines.METHODS])
@pytest.mark.parametrize("kind", ["image", "ragged"])
def test_no_step_waits_for_a_gpu(kind, way, gpu):
    """Of pre-training, first without a teacher, or of fine-tuning."""
    with _disable_current_modes():
        model, inputs = tiny(kind), examples(kind)
        config = config_of(steps=2, batch_size=10, accumulate=2, finetune_steps=2,
                           match="hidden" if way in baselines.METHODS else way)
        config = settings.final(config, model, 20)
        classifier = finetune.Classifier(model.encoder, 3).to(DEVICE)
        model = model.to(DEVICE)
        teacher = copy.deepcopy(model).eval().requires_grad_(False)
    if way in baselines.METHODS:
        finetune.train(classifier, inputs, torch.arange(20) % 3, config, Run(), "row",
                       baselines.METHODS[way])
    else:
        distill.pretrain(copy.deepcopy(model), None, inputs, config, 0, Run())
        distill.pretrain(model, teacher, inputs, config, 1, Run())
    assert gpu.operations > 100 and not gpu.stops


def test_the_watch_sees_what_stops_a_gpu(gpu):
    x, mask = torch.randn(3, 2, device=DEVICE), torch.ones(3, dtype=torch.bool, device=DEVICE)
    for act in (lambda: x[mask], lambda: mask.nonzero(), lambda: x.sum().item()):
        before = len(gpu.stops)
        with contextlib.suppress(RuntimeError, NotImplementedError):
            act()
        assert len(gpu.stops) > before
    torch.zeros(3).to(DEVICE)
    assert gpu.stops[-1].startswith("copy")
