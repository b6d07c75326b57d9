"""Which runs a table takes, what its page says, and that no page gives way to an emptier one."""
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mae
import mlm
from experiments import make_mae, make_mlm, pages, paper, runs, tune
from support import draws, images, program
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
    ("table1", "cub", ["distill.py", "baselines.py --recadam-t0 40 --method recadam",
                       "baselines.py --mars-radius 0.5 --method mars",
                       "baselines.py --r3f-eps 0.3 --method r3f"]),
    ("table3", "cub", ["distill.py", f"distill.py --mae-weight 0 {TAUGHT}",
                       "distill.py --steps 300 --rounds 0", *(
                           f"distill.py --match {match} {TAUGHT}"
                           for match in ("prediction", "l2", "mars"))]),
    ("table6", "cub", ["distill.py", *(
        f"distill.py --mae-weight {weight} {TAUGHT}" for weight in (0.1, 10, 100, 1000, 10000))]),
    ("figure1", "dtd", ["distill.py --rounds 0", *(
        f"distill.py --steps {steps} --rounds 0" for steps in (37, 75, 300))]),
    ("figure3", "cifar100", [f"distill.py --train-size {size}" for size in (
        1000, 2500, 5000, 10000, 25000, 50000)]),
    ("figure4", "flower", CHAIN), ("time", "cub", ["distill.py"]),
    ("toybirds", "toybirds", ["distill.py", "finetune.py --init random"])])
def test_the_runs_of(name, dataset, runs):
    """Commands as told, each with its own folder, after the one that makes what teaches it."""
    usual = set(paper.command("distill.py", paper.At(dataset, "laptop", 0)))
    made, found = [None], []
    for seed in range(2):
        cells = paper.RESULTS[name].cells(paper.At(dataset, "laptop", seed))
        for words in dict.fromkeys(cell.command for cell in cells):
            config = program.parse(words[0].removesuffix(".py"), "", list(words[1:]))
            assert config.seed == seed and config.teacher in made
            assert f"{config.out}/further.safetensors" not in made
            made += [f"{config.out}/{model}.safetensors" for model in ("further", "distilled-1")]
            more = [f"{flag} {value}" for flag, value in zip(words[1:-2:2], words[2:-2:2])
                    if not {flag, value} <= usual]
            found.append(" ".join([words[0], *more]))
    assert found[:len(runs)] == runs and len(found) == 2 * len(runs)


def test_the_papers_scale_is_the_programs_defaults_and_has_both_readings():
    cub, scierc = (paper.At(dataset, "paper", 1) for dataset in ("cub", "scierc"))
    words = paper.command("distill.py", cub)
    assert words[:-2] == ("distill.py", "--dataset", "cub", "--seed", "1")
    twice = paper.ablations(scierc)[3].command  # 100 epochs of 26 batches, twice
    assert twice[twice.index("--steps") + 1] == "5200"
    students = [cell for cell in paper.methods(cub) if cell.method == "self-distillation"]
    configs = [program.parse("distill", "", list(cell.command[1:])) for cell in students]
    assert [(cell.row.partition(", ")[2], config.match, config.masking, config.precision)
            for cell, config in zip(students, configs)] == [
        ("", "cls", "bernoulli", "auto"), ("all positions", "hidden", "bernoulli", "auto"),
        ("as released", "cls", "fixed", "fp32")]


def test_the_ratio_of_gradients_against_one_by_hand(tmp_path):
    words = ("distill.py", "--smoke", "--dataset", "toybirds", "--out", str(tmp_path))
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True)
    student, teacher = (mae.MAE.from_pretrained(tmp_path / f"{name}.safetensors")
                        for name in ("distilled-1", "further"))
    x, lengths = images.normalise(runs.begin("toybirds", smoke=True)[1].train[:8]), []
    mask = student.draw_mask(x, 0.5, draws.generator("ratio"))
    apart = (student.encoder(x)[:, 0] - teacher.encoder(x)[:, 0].detach()).square().sum(1)
    for loss in (apart, student.loss(x, mask)):
        student.zero_grad()
        loss.mean().backward()
        squares = [p.grad.square().sum() for p in student.encoder.parameters() if p.requires_grad]
        lengths.append(sum(squares).sqrt().item())
    assert runs.gradient_ratio(words) == pytest.approx(lengths[0] / lengths[1], rel=1e-5)


def test_weights_can_be_made(monkeypatch, tmp_path):
    """In a few steps, and the words of this project's pages."""
    monkeypatch.setattr(make_mae, "PHASES", {"draw": 200, "class token": 200})
    monkeypatch.setattr(make_mlm, "STEPS", (200, 200))
    text = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("*.md"))
    monkeypatch.setattr(make_mlm, "pydocs_other", lambda: iter(text.splitlines()))
    for module, kind, out in ((make_mae, mae.MAE, tmp_path / "tiny-mae.safetensors"),
                              (make_mlm, mlm.MLM, tmp_path)):
        monkeypatch.setattr(sys, "argv", ["", "--trial", "--out", str(out)])
        module.main()
        made = kind.from_pretrained(tmp_path / f"tiny-{kind.__name__.lower()}.safetensors")
        assert made.config == kind.from_pretrained("tiny").config


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
        monkeypatch.setattr(runs, "ROOT", root)
        monkeypatch.setattr(paper, "on_disk", lambda dataset, data_dir: (1500, 1389, 50))
        monkeypatch.setattr(runs, "our_code", lambda: self.code)
        monkeypatch.setattr(runs, "gradient_ratio", lambda words: 0.5)
        monkeypatch.setattr(runs, "wait_for", self.run)

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
    for line in ("| fine-tuning | 4.0 (n = 1) | 1938 |", "| further pre-training | – | 5373 |"):
        assert line in page  # beside the paper's seconds


def test_a_page_gives_way_only_to_one_that_has_all_its_numbers(sweep, capsys):
    sweep("table6 --datasets toybirds --seeds 2")
    first = files(sweep.results)
    assert "(n = 2) | 0.500 ± 0.000 (n = 2) |" in first["table6.md"].decode()  # ratios of gradients
    sweep("table6 --datasets cub --seeds 3")  # more numbers, but of other cells
    assert "wrote runs/table6.md, as results/table6.md has 12 numbers" in capsys.readouterr().out
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


@pytest.mark.parametrize("name", paper.RESULTS)
def test_committed_pages_are_computed_from_their_records(name):
    path = RESULTS / f"{name}.json"
    if path.exists():
        record = json.loads(path.read_text(encoding="utf-8"))
        assert path.with_suffix(".md").read_text(encoding="utf-8") == pages.page(record)
