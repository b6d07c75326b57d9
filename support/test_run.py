"""A run from its command line to its results: settings, folder, resuming, refusing, processes."""
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import baselines
import distill
import finetune
import mae
import mlm
from support import fetch, loop, program, recipes, run, settings
from support.fetch import BadInput
from support.run import Run
from support.settings import Config
from support.test_helpers import both, content, labelled, log_of, rows_of, run_here, same, tiny

pytest_plugins = ["support.test_helpers"]  # its fixtures

PROGRAM = str(fetch.ROOT / "distill.py")


def start(*words: str | Path) -> subprocess.Popen:
    """A program as a user starts it, in the present folder."""
    return subprocess.Popen([sys.executable, *words], text=True, encoding="utf-8",
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """Its status, what it printed, and the last line of its standard error."""
    printed, errors = process.communicate()
    assert "Traceback" not in errors, errors
    return process.returncode, printed, (errors.strip().splitlines() or [""])[-1]


def go(folder: Path, modality: str, **changes: object) -> Run:
    """Algorithm 1 and a row of each method, in a folder."""
    model, data, config = labelled(modality, **changes)
    this = Run(folder, config, data="hash", init_weights=program.digest(model))
    models = distill.self_distill(model, data.train, config, run=this)
    rows = {row: (models[-1], method) for row, method in baselines.METHODS.items()}
    finetune.measure(rows, model, data, config, this)
    return this


def assert_equal(a: Path, b: Path) -> None:
    """Two folders hold the same models, log and results, bit for bit."""
    for name in ("log.jsonl", "results.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    names = {path.name for path in a.glob("*.safetensors")}
    assert names == {path.name for path in b.glob("*.safetensors")} and len(names) > 3
    assert all(same(load_file(a / name), load_file(b / name)) for name in names)


# ----------------------------------------------------------------------------- settings


def test_every_default_comes_from_the_table():
    """`final` leaves nothing open, and gives what §5 and the released code say."""
    model = mae.MAE(mae.Config(image_size=32, patch_size=16, decoder_depth=1, depth=1))
    assert settings.recipe(model) == "paper"  # 7 M parameters in one layer of ViT-B
    found = vars(settings.final(Config(), model, 5994))
    assert {name for name, value in found.items() if value is None} == {
        "data_dir", "export", "init", "out", "predict", "train_size", "teacher"}
    assert dict(steps=20_000, batch_size=64, lr=1.5e-4, mask_prob=0.75, betas=(0.9, 0.95),
                warmup=0.0, clip=0.0, finetune_steps=10_000, finetune_batch_size=32,
                finetune_lr=1e-4, finetune_clip=1.0, dropout=0.1).items() <= found.items()
    assert found["finetune_warmup"] * found["finetune_steps"] == 500
    model = mlm.MLM(mlm.Config(width=768, depth=1, mlp=32, vocab_size=8000, mask_id=7999))
    config = settings.final(Config(), model, 3219)
    assert (config.steps, config.finetune_steps) == (2600, 1010)  # 100 and 10 epochs of SciERC
    assert settings.final(config, model, 3219) == config
    released = vars(settings.final(Config(as_released=True), tiny("image"), 20))
    assert recipes.AS_RELEASED.items() <= released.items()
    assert settings.recipe(tiny("image")) == "small"


@pytest.mark.parametrize("given, said", [
    ("--match hiden", "--match is 'hiden' (did you mean hidden?)"),
    ("--mask-prob 1", "--mask-prob is 1.0: use more than 0 and less than 1"),
    ("--steps 0", "--steps is 0: use at least 1"), ("--lr nan", "--lr is nan"),
    ("--steps many", "--steps: invalid int value: 'many'"),
    ("--save-every abc", "--save-every is 'abc'"),
    ("--teacher x --rounds 0", "--teacher is given, but there are no rounds"),
    ("--round 1", "--round is no flag of distill.py (did you mean --rounds?)"),
    ("--method mars", "--method is a flag, but not one of distill.py"),
    ("--dataset cup", "no data set 'cup' (did you mean cub?)"),
    ("--as-released --masking 80-10-10", "--as-released means masking fixed, not 80-10-10"),
    ({"seed": None}, "seed is None"), ({"steps": 1.5}, "steps is 1.5: use at least 1"),
    ({"masking": "80-10-10"}, "masking 80-10-10 is not for images"),
    ({"masking": "fixed", "dataset": "pydocs"}, "masking fixed is not for texts"),
    ({"as_released": True, "dataset": "pydocs"}, "as_released is for images"),
    ({"batch_size": 21}, "batch_size is 21, but there are 20 training examples"),
    ({"batch_size": 6, "accumulate": 7}, "batch_size is 6, which cannot be shared out")])
def test_a_mistake_on_the_command_line_or_in_python_is_one_sentence(given, said):
    with pytest.raises(BadInput, match=f"^{re.escape(said)}"):
        if isinstance(given, str):
            program.parse("distill", "", given.split())
        config = Config(**given)
        settings.final(config, tiny(config.modality), 20)


# ----------------------------------------------------------------------------- carrying on


@both
def test_a_killed_run_carries_on_bit_for_bit(modality, tmp_path, monkeypatch):
    """Stopped at a moment of every stage and started again: same weights, log and results."""
    log, left = loop.Stage._log, [10**9]

    def dying_log(stage, values):
        log(stage, values)
        left[0] -= 1
        if not left[0]:
            raise InterruptedError

    changes = dict(save_every="2", dropout=0.1, pretrain_dropout=0.1)
    monkeypatch.setattr(loop.Stage, "_log", dying_log)
    monkeypatch.setattr(run.pictures, "curves", lambda *_: None)
    go(tmp_path / "whole", modality, **changes)
    for moment in (1, 7, 9, 18, 24, 30):  # the last three in RecAdam, MARS and R3F
        left[0] = moment
        with pytest.raises(InterruptedError):
            go(tmp_path / str(moment), modality, **changes)
        left[0] = 10**9
        go(tmp_path / str(moment), modality, **changes)
        assert_equal(tmp_path / "whole", tmp_path / str(moment))


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["toybirds", "pydocs"])
def test_a_program_killed_at_any_moment_ends_as_if_it_had_not_been(dataset, tmp_path):
    """SIGKILL as it begins and in every stage, mid-file too, once so many lines are logged."""
    words = (PROGRAM, "--smoke", "--dataset", dataset, "--rounds", "2", "--steps", "10",
             "--finetune-steps", "10", "--save-every", "1", "--out")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert finish(start(*words, whole))[0] == 0
    for lines in (0, 4, 15, 26, 37):  # of 60, 10 a stage
        log = killed / ("log.jsonl" if lines else "config.json")
        process = start(*words, killed)
        while process.poll() is None and not (
                log.exists() and log.read_bytes().count(b"\n") >= lines):
            time.sleep(0.002)
        assert process.poll() is None
        process.kill()
        finish(process)
    assert finish(start(*words, killed))[0] == 0
    assert_equal(whole, killed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_program_says_how_to_go_on_and_loses_nothing(number, tmp_path):
    words = (PROGRAM, "--smoke", "--steps", "100000", "--out", str(tmp_path))
    process = start(*words)
    while process.poll() is None and not (tmp_path / "log.jsonl").exists():
        time.sleep(0.01)
    process.send_signal(number)
    status, _, said = finish(process)
    assert status == 128 + number
    assert said == f"stopped; to carry on: python {' '.join(words)}"
    with safe_open(tmp_path / "checkpoint.safetensors", "pt") as file:
        assert int(file.metadata()["step"]) >= 1  # the step that it was in


# ----------------------------------------------------------------------------- a run's folder


def test_a_run_folder_holds_what_it_says(tmp_path):
    results = go(tmp_path, "text", seed=3, mae_weight=0.5).results
    config, stored = (json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
                      for name in ("config", "results"))
    assert stored == results and config["facts"]["code"] == run.code()
    assert config["settings"]["finetune_steps"] == 6 and config["facts"]["data"] == "hash"
    assert config["versions"]["torch"] == torch.__version__
    student = [line for line in log_of(tmp_path) if line["stage"] == "self-distillation"]
    assert [line["step"] for line in student] == list(range(5))
    assert set(student[0]) == {"stage", "round", "step", "mae_loss", "distill_loss", "lr",
                               "grad_norm"}
    with safe_open(tmp_path / "distilled-1.safetensors", "pt") as file:
        about = file.metadata()
    assert (about["seed"], about["mae_weight"], about["match"]) == ("3", "0.5", "hidden")
    assert not list(tmp_path.glob("*checkpoint*")) and not list(tmp_path.glob("*.part"))
    spent = content(tmp_path)["timing.jsonl"]
    assert go(tmp_path, "text", seed=3, mae_weight=0.5).results == results
    assert content(tmp_path)["timing.jsonl"] == spent  # nothing is done again


def test_a_folder_is_named_after_what_is_unusual():
    config, model = Config(seed=7, init="some/weights.safetensors", rounds=2), tiny("image")
    name = run.folder("distill", settings.final(config, model, 20), model, 20)
    assert name == Path("runs/distill-toybirds-weights-rounds=2-seed7")


def test_a_folder_with_other_settings_is_refused(tmp_path):
    config = labelled("image")[2]
    Run(tmp_path, config, source="here")
    moved = dict(device="auto", save_every="7", data_dir="b", init="c", accumulate=2)
    Run(tmp_path, labelled("image", **moved)[2], source="there")
    with pytest.raises(BadInput, match="finetune_lr was 0.001, now 0.5"):
        Run(tmp_path, labelled("image", finetune_lr=0.5)[2])
    (tmp_path / "config.json").unlink()
    (tmp_path / "log.jsonl").touch()
    with pytest.raises(BadInput, match="log.jsonl of something else than a run"):
        Run(tmp_path, config)


def test_after_the_code_is_edited_nothing_old_is_shown_or_used(
        finished, tmp_path, monkeypatch, capsys):
    """Finished or half done; comments change nothing, and what computes nothing is not read."""
    copy, out = tmp_path / "project", tmp_path / "out"
    shutil.copytree(finished, out)
    for file in (*(f"{name}.py" for name in run.COMPUTES), "support/fetch.py", "requirements.txt",
                 "weights/tiny-mae.safetensors"):
        (copy / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(fetch.ROOT / file, copy / file)
    monkeypatch.setattr(fetch, "ROOT", copy)
    monkeypatch.setattr(run, "code", run.code.__wrapped__)  # no longer remembered
    text = (copy / "distill.py").read_text(encoding="utf-8")

    def again(old: str, new: str) -> dict:
        assert old in text
        (copy / "distill.py").write_text(text.replace(old, new), encoding="utf-8")
        run_here(f"distill.py --smoke --out {out}")
        return content(out)

    assert again('"""Line 11', '# a comment\n    """Other words') == content(finished)
    for done in ("results.json", "rows.json"):
        capsys.readouterr()
        with pytest.raises(BadInput, match=f"^{out} holds a run of other code"):
            again("return difference.square()", "return 0 * difference.square()")
        assert "self-distillation" not in capsys.readouterr().out
        (out / done).unlink()  # next time the run is half done
    assert again("", "")["results.json"] == content(finished)["results.json"]
    assert "carries on; there: distilled-1," in capsys.readouterr().out


# ----------------------------------------------------------------------------- several processes

WORKER = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from support import parallel

with parallel.processes(), parallel.in_turn():
    if not parallel.rank():
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(90)
"""
TORCHRUN = "-m", "torch.distributed.run"


def test_processes_end_when_torchrun_is_killed(tmp_path):
    """One works, as if it downloaded; the other waits for it in a collective operation."""
    (worker := tmp_path / "worker.py").write_text(WORKER)
    process = start(*TORCHRUN, "--standalone", "--nproc-per-node=2", worker, fetch.ROOT)
    errors = process.communicate(timeout=60)[1]  # until nobody holds the pipes any more
    assert process.returncode == -signal.SIGKILL and "error: torchrun has ended" in errors


@pytest.mark.parametrize("nodes, line", [
    (1, "distill.py --accumulate 2 --match hidden --steps 12 --lr 1e-4"),
    pytest.param(2, "distill.py --dataset pydocs --match cls --steps 12 --lr 1e-4",
                 marks=pytest.mark.slow), pytest.param(1, "baselines.py", marks=pytest.mark.slow)])
def test_two_processes_are_one(nodes, line, tmp_path, monkeypatch):
    """On a CPU, of one or two machines: one's losses, gradients and scores, to 1e-5."""
    monkeypatch.chdir(tmp_path)
    # small steps: Adam's division by √v enlarges rounding, most in the first ones
    line += " --smoke --finetune-lr 1e-4 --device cpu"
    run_here(f"{line} --out one")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    several = [start(*TORCHRUN, f"--nnodes={nodes}", f"--nproc-per-node={2 // nodes}",
                     f"--node-rank={node}", "--master-addr=127.0.0.1", f"--master-port={port}",
                     *f"{fetch.ROOT}/{line} --out two".split()) for node in range(nodes)]
    ended = [finish(process) for process in several]
    assert [status for status, *_ in ended] == [0] * nodes
    assert sum(told.count("fine-tuning ") for _, told, _ in ended) == 1  # only one of them prints
    one, two = (log_of(folder) + rows_of(folder) for folder in (Path("one"), Path("two")))
    for mine, theirs in zip(one, two, strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            if type(value) is not float:
                assert theirs[key] == value
            elif key != "projected":  # a row of weights at its radius may fall either way
                # the gradient, the gap and the distance are differences of larger numbers
                rel = 1e-5 if "loss" in key else 1e-4
                assert theirs[key] == pytest.approx(value, rel=rel, abs=1e-6), (key, mine)
