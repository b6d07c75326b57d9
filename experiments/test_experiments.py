"""Which runs a table takes, what its page says, and that no page gives way to an emptier one."""
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments import bench, pages, paper, repeat, tune
from support import program
from support.data import Data
from support.fetch import ROOT
from support.run import write_json

RESULTS = ROOT / "results"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ----------------------------------------------------------------------------- the runs

TAUGHT = "--teacher runs/laptop-distill-cub-seed0/further.safetensors"
CHAIN = ["distill.py", *(
    f"distill.py --teacher runs/laptop-distill-flower-{name}seed0/distilled-1.safetensors"
    for name in ("", "round2-"))]


@pytest.mark.parametrize("name, dataset, runs", [
    ("table1", "cub", ["distill.py", "baselines.py --method recadam --recadam-t0 40",
                       "baselines.py --method mars --mars-radius 0.5",
                       "baselines.py --method r3f --r3f-eps 0.3"]),
    ("table3", "cub", ["distill.py", f"distill.py --mae-weight 0 {TAUGHT}",
                       "distill.py --steps 300 --rounds 0", *(
                           f"distill.py --match {match} {TAUGHT}"
                           for match in ("prediction", "l2", "mars"))]),
    ("table6", "cub", ["distill.py", *(
        f"distill.py --mae-weight {weight} {TAUGHT}" for weight in (0.5, 0.1, 0))]),
    ("figure1", "dtd", ["distill.py --rounds 0", *(
        f"distill.py --steps {steps} --rounds 0" for steps in (37, 75, 300))]),
    ("figure3", "cifar100", [f"distill.py --train-size {size}" for size in (
        1000, 2500, 5000, 10000, 25000, 50000)]),
    ("figure4", "flower", CHAIN), ("figure5c", "flower", CHAIN),
    ("figure5a", "dtd", ["distill.py"]), ("figure5b", "dtd", ["distill.py"]),
    ("time", "cub", ["distill.py"])])
def test_the_runs_of(name, dataset, runs):
    """Commands as told, each with its own folder, after the one that makes what teaches it."""
    usual = set(paper.command("distill.py", dataset, "laptop", 0))
    made, found = [None], []
    for seed in range(2):
        cells = paper.RESULTS[name].cells(dataset, "laptop", seed)
        for words in dict.fromkeys(cell.command for cell in cells):
            config = program.parse(words[0].removesuffix(".py"), "", list(words[1:]))
            assert config.seed == seed and config.teacher in made
            assert f"{config.out}/further.safetensors" not in made
            made += [f"{config.out}/{model}.safetensors" for model in ("further", "distilled-1")]
            more = [f"{flag} {value}" for flag, value in zip(words[1:-2:2], words[2:-2:2])
                    if not {flag, value} <= usual]
            found.append(" ".join([words[0], *more]))
    assert found[:len(runs)] == runs and len(found) == 2 * len(runs)


def test_the_papers_scale_is_the_programs_defaults():
    words = paper.command("distill.py", "cub", "paper", 1)
    assert words[:-2] == ("distill.py", "--dataset", "cub", "--seed", "1")
    twice = paper.ablations("scierc", "paper", 0)[3].command  # 100 epochs of 26 batches, twice
    assert twice[twice.index("--steps") + 1] == "5200"


@pytest.mark.parametrize("modality", ["image", "text"])
def test_the_laptops_settings_are_those_chosen_on_held_out_data(modality):
    used = dict(paper.SETTINGS["laptop", modality])
    for own in paper.OWN["laptop", modality].values():
        used |= own
    chosen = json.loads((RESULTS / f"tuning-{modality}.json").read_text())["chosen"]
    assert used == chosen | {"init": "tiny"}


def test_tuning_holds_out_a_seeded_tenth():
    pixels = torch.arange(40)[:, None, None, None].expand(40, 3, 2, 2).to(torch.uint8)
    data = Data("x", pixels, torch.arange(40), None, None, list("x" * 40), "accuracy", "", "")
    held, again, other = (tune.hold_out(data, seed) for seed in (1, 1, 2))
    assert len(held.test) == 4 and torch.equal(held.test[:, 0, 0, 0].long(), held.test_labels)
    assert sorted([*held.test_labels.tolist(), *held.train_labels.tolist()]) == list(range(40))
    assert torch.equal(held.test, again.test) and not torch.equal(held.test, other.test)


# ----------------------------------------------------------------------------- the pages


class Sweeps:
    """Runs paper.py in a folder of its own, where programs only leave made-up numbers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
        self.patch, self.root, self.results = monkeypatch, root, root / "results"
        self.code, self.failing, self.started = "today's", "", []
        for module in (paper, repeat):
            monkeypatch.setattr(module, "ROOT", root)
        monkeypatch.setattr(paper, "on_disk", lambda dataset, data_dir: (1500, 1389, 50))
        monkeypatch.setattr(paper, "our_code", lambda: self.code)
        monkeypatch.setattr(repeat, "wait_for", self.run)

    def __call__(self, line: str) -> None:
        self.started = []
        self.patch.setattr(sys, "argv", ["", *line.split()])
        paper.main()

    def run(self, command: list[str]) -> int:
        """In a program's place. Seeds 0, 1, 2 score 0.1, 0.2, 0.4; a student 0.2, 0.28, 0.46."""
        given = dict(zip(command[2::2], command[3::2]))
        out, seed = self.root / given["--out"], int(given["--seed"])
        self.started.append(given["--out"])
        if given["--seed"] == self.failing:
            return 1
        if out.exists() and self.code not in (out / "config.json").read_text():
            return 2
        score = (0.1, 0.2, 0.4)[seed]
        scores = {"fine-tuning": score, "further pre-training": 0.5,
                  "self-distillation": score + 0.1 - 0.02 * seed}
        if method := given.get("--method"):
            scores = {{"recadam": "RecAdam", "mars": "MARS", "r3f": "R3F"}[method]: score / 2}
        rows = [{"method": row, "seed": seed, "metric": "accuracy", "score": score, "gap": score,
                 "distance": score} for row, score in scores.items()]
        write_json({"dataset": given["--dataset"], "num_classes": 50, "n_train": 1500,
                    "n_test": 1389, "rows": rows}, out / "results.json")
        write_json({"command": shlex.join(["python", *command[1:]]), "facts": {"code": self.code},
                    "settings": {"steps": 150, "finetune_steps": 150}}, out / "config.json")
        stages = ("fine-tuning", 150, 4), ("self-distillation", 150, 8), (
            "further pre-training", 7, 1)  # carried on after a stop: no whole time
        (out / "timing.jsonl").write_text("".join(
            f'{{"stage": "{stage}", "steps": {steps}, "seconds": {seconds}}}\n'
            for stage, steps, seconds in stages))
        return 0


@pytest.fixture
def sweep(monkeypatch, tmp_path):
    return Sweeps(monkeypatch, tmp_path)


def test_means_differences_and_times_against_hand_computed_ones(sweep):
    """Scores 0.1, 0.2, 0.4: mean 70/3 %, sample deviation √(700/3) = 15.28 %."""
    sweep("table1 --datasets cub --seeds 3")
    assert len(sweep.started) == 3 * 4
    page = (sweep.results / "table1.md").read_text(encoding="utf-8")
    for line in ("| fine-tuning | 23.33 ± 15.28 (n = 3) | 55.55 ± 0.54 |",
                 "| R3F | 11.67 ± 7.64 (n = 3) | 55.91 ± 0.79 |",
                 "| self-distillation | 31.33 ± 13.32 (n = 3) | – |",
                 "| CUB | fine-tuning | 8.00 ± 2.00 (n = 3) | 3 of 3 |",  # 10, 8, 6
                 "| CUB | further pre-training | -18.67 ± 13.32 (n = 3) | 0 of 3 |",
                 "1500 training and 1389 test examples, 50 classes"):
        assert line in page
    sweep("time --seeds 1")
    assert sweep.started == []  # what has finished is not run again
    page = (sweep.results / "time.md").read_text(encoding="utf-8")
    for line in ("| fine-tuning | 4.0 (n = 1) | 1 | 1938 | 1 | 484 |",  # the paper's 1938 s
                 "| self-distillation | 8.0 (n = 1) | 2 | 18802 | 9.7 | 2.35e+03 |",
                 "| further pre-training | – | – | 5373 | 2.77 | – |"):
        assert line in page


def test_a_page_gives_way_only_to_one_that_has_all_its_numbers(sweep, capsys):
    sweep("table6 --datasets toybirds --seeds 2")
    first = files(sweep.results)
    sweep("table6 --datasets cub --seeds 3")  # more numbers, but of other cells
    assert "wrote runs/table6.md, as results/table6.md has 8 numbers" in capsys.readouterr().out
    sweep("table6 --datasets toybirds --seeds 1")
    assert "| toybirds |" in (sweep.root / "runs" / "table6.md").read_text(encoding="utf-8")
    assert files(sweep.results) == first
    sweep("table6 --datasets toybirds --seeds 3")
    assert "(n = 3)" in (sweep.results / "table6.md").read_text(encoding="utf-8")


def test_failed_runs_leave_the_page_and_what_they_were_to_teach_is_not_run(sweep, capsys):
    sweep("figure4 --datasets toybirds --seeds 2")
    first = files(sweep.results)
    assert set(first) == {"figure4.json", "figure4.md", "figure4.png"}
    sweep.code = "tomorrow's"  # so the programs refuse the folders
    with pytest.raises(OSError, match="these runs failed.*-round3-seed1"):
        sweep("figure4 --datasets toybirds --seeds 2")
    assert "failed, status 2: python distill.py" in capsys.readouterr().err
    assert files(sweep.results) == first
    sweep.code, sweep.failing = "today's", "2"
    with pytest.raises(OSError, match="these runs failed"):
        sweep("figure4 --datasets toybirds --seeds 3")
    assert sweep.started == ["runs/laptop-distill-toybirds-seed2"]
    page = (sweep.results / "figure4.md").read_text(encoding="utf-8")
    assert page.count("(n = 2)") == 4 and page.count("Failed, and so missing") == 3


def test_without_data_a_sweep_is_one_sentence_or_a_plan(tmp_path):
    """Nothing is written; both tell how to get what is absent."""
    before, done = files(RESULTS), []
    for more in ([], ["--dry-run"]):
        done.append(subprocess.run(
            [sys.executable, "-m", "experiments.paper", "figure4", "--seeds", "1", *more],
            cwd=ROOT, env=os.environ | {"DATA_DIR": str(tmp_path)}, capture_output=True, text=True))
        told = f"{tmp_path}/flowers102 is absent: `python finetune.py --smoke --init tiny "
        assert told in (done[-1].stdout or done[-1].stderr)
    assert [run.returncode for run in done] == [2, 0] and done[0].stderr.count("\n") == 1
    assert done[0].stdout == "" and "figure4: 3 runs, 3 to do" in done[1].stdout
    assert files(RESULTS) == before and not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", [path for path in sorted(RESULTS.glob("*.json")) if not re.match(
    "bench|theory|tuning", path.stem)], ids=lambda path: path.stem)
def test_committed_pages_are_computed_from_their_records(path):
    record = json.loads(path.read_text(encoding="utf-8"))
    text = pages.page(record) if "name" in record else repeat.page(path.stem, record)
    assert path.with_suffix(".md").read_text(encoding="utf-8") == text


def test_repeat_runs_programs_and_tells_every_seed(monkeypatch, tmp_path):
    monkeypatch.setattr(repeat, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["", "own", "--seeds", "0", "1", "--", f"{ROOT}/finetune.py",
                                      "--smoke", "--finetune-steps", "1"])
    repeat.main()
    scores = [100 * json.loads((tmp_path / f"runs/own/0-seed{seed}/results.json").read_text())[
        "rows"][0]["score"] for seed in (0, 1)]
    page = (tmp_path / "results" / "own.md").read_text(encoding="utf-8")
    assert f"| accuracy | {repeat.cell(scores, 2)} |" in page
    assert f"| 2 | {scores[0]:.1f}, {scores[1]:.1f} |" in page


# ----------------------------------------------------------------------------- the benchmark


def test_turns_read_the_clock_around_each_side():
    """A clock moved by hand: our steps take 3, theirs 5, their first 100."""
    time, steps = [0.0], []

    def other(step: int) -> None:
        steps.append(step)
        time[0] += 5 if step else 100
        turns()  # their optimiser steps, too

    turns = bench.Turns(lambda: time[0], 2, {"theirs": other})
    for _ in range(6):
        time[0] += 3
        turns()
    assert turns.taken == {"ours": [3, 3, 3], "theirs": [52.5, 5, 5]} and steps == list(range(6))


def test_flops_are_those_that_a_count_by_hand_gives():
    """Of fine-tuning, and of the unmasked pass that a teacher adds where it is not remembered."""
    live, remembered, tuning = (bench.measure(bench.Case("image", "tiny", stage, 3), 1)["ours"]
                                for stage in bench.STAGES[1:])
    B, K, D, inner, depth, P = 8, 25, 128, 512, 4, 192
    passed = depth * (1 + K) * (2 * (4 * D**2 + 2 * D * inner) + 4 * (1 + K) * D)
    patches, head = 2 * (1 + K) * P * D, 2 * D * bench.CLASSES
    # a backward pass costs two forward ones, but the pictures need no gradient
    assert tuning["flops"] == [B * (2 * patches + 3 * (passed + head))] * len(tuning["seconds"])
    assert live["flops"] == [count + B * (patches + passed) for count in remembered["flops"]]


def test_the_benchs_page_has_medians_quartiles_and_ratios():
    row = {"model": "image", "stage": "fine-tuning", "batch": 8, "bytes": 2**31,
           "peak": [6e12, 12e12, 3e12], "ours": {"seconds": [2.0, 1.0, 4.0], "flops": [6e12] * 3},
           "transformers": {"seconds": [4.0, 3.0, 4.0], "flops": [9e12] * 3}}
    record = {"cpu": {"command": "c", "machine": "m", "peer": ", transformers 5", "rows": [row]}}
    text = bench.page(record)  # the quartiles of 1, 2, 4 lie halfway between neighbours
    assert "large product: 6 (4.5–9) TFLOP/s." in text and text.endswith(
        "| image | fine-tuning | 8 | 2 | 2 (1.5–3) | 6 | 50 (50–50) | 4 (3.5–4) | 9 | "
        "37.5 (31.2–56.2) | 2 (1.5–2.5) × |\n")
