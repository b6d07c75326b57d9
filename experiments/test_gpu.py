"""The benchmark's clock and page, and every check of a GPU: on one, or on a CPU in small."""
import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from experiments import bench, gpu_check
from support.fetch import ROOT
from support.settings import Config

SLOW = {gpu_check.check_compile, gpu_check.check_processes}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that CUDA sees")
@pytest.mark.parametrize("check", gpu_check.CHECKS, ids=lambda check: check.__name__)
def test_on_a_gpu(check):
    check("cuda")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(gpu_check, "STEPS", 6)
    monkeypatch.setattr(gpu_check, "TOYS", {"image": "toybirds"})


@pytest.mark.parametrize("check", [
    pytest.param(check, marks=[pytest.mark.slow] * (check in SLOW)) for check in gpu_check.CHECKS
    if check is not gpu_check.check_waits], ids=lambda check: check.__name__)
def test_every_check_runs_on_a_cpu(check, small):
    line = gpu_check.attempt(check, "cpu")
    assert line["told"] and not line["failed"]


def test_steps_may_not_wait_from_the_second_on_until_they_log(monkeypatch, small):
    """Six steps of a stage log all: each but the first is strict, and at its end may wait again."""
    modes, stage = [], ["default"] + ["error", "default"] * 5
    monkeypatch.setattr(gpu_check, "ways", lambda device: [gpu_check.algorithm_1(device, "image")])
    assert gpu_check.check_waits("cpu", modes.append) == {"ways": 1, "steps": 2 * 5}
    assert modes == stage + stage + ["default"]


def test_a_wrong_result_fails_and_the_page_says_so():
    def check(device: str) -> dict:
        """two and two are four"""
        return gpu_check.within({"off by": 0.5})

    rows = [{"model": "image", "step": step, "batch": batch, "products": "bf16", "gflop": 3000,
             "bytes": 2**31, "seconds": {"ours": [0.03, 0.01, 0.02]}} for step, batch in zip(
                 bench.STAGES, (64, 64, 32))]
    rows[0]["seconds"]["sdpa"] = [0.03, 0.02, 0.06]
    page = bench.page({"name": "gpu", "command": "c", "machine": "m", "minutes": 9.4, "rows": rows,
                       "checks": [gpu_check.attempt(check, "cpu")], "peak": 300.0})
    for text in ("| `check` | two and two are four | **FAILS**: AssertionError: {'off by': 0.5}",
                 " 64 | bf16 | 0.02 (0.015–0.025) | 150 | 50 | 2 | 0.03 (0.025–0.045) | "
                 "2 (1.5–2.5) × |",  # the quartiles lie halfway between neighbours
                 "| further pre-training | 20000 of 64 | 6.7 | 89.5 |"):  # 0.02 s each
        assert text in page


def test_turns_read_the_clock_around_each_side(monkeypatch):
    """A clock moved by hand: our steps take 3, theirs 5, their first 100."""
    time, theirs = [0.0], []
    monkeypatch.setattr(bench, "now", lambda: time[0])
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)])

    def loop() -> None:
        while True:
            time[0] += 3
            optimiser.step()

    def other() -> None:
        time[0] += 5 if theirs else 100
        theirs.append(None)
        optimiser.step()  # which is not counted as ours

    assert bench.by_turns(loop, 2, 4, {"theirs": other}) == {"ours": [3, 3], "theirs": [5, 5]}
    assert len(theirs) == 3 * 4


@pytest.mark.parametrize("modality", ["image", "text"])
@pytest.mark.parametrize("stage", bench.STAGES)
def test_small_models_are_measured_as_large_ones_are(stage, modality):
    compare = importlib.util.find_spec("transformers") is not None  # whoever compares installs it
    config = Config(gpu_check.TOYS[modality], device="cpu", batch_size=4, finetune_batch_size=4)
    row = bench.measure(stage, config, 2, compare, tiny=True)
    assert [len(values) for values in row["seconds"].values()] == [2] * (1 + compare)


def test_without_a_gpu_the_check_is_one_sentence():
    done = subprocess.run([sys.executable, "-m", "experiments.bench", "--gpu-check"], cwd=ROOT,
                          env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"error: --gpu-check needs a GPU that CUDA sees, and torch sees none\n"
