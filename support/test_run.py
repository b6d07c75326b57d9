"""A run from its command line to its results: settings, folder, resuming, refusing.

Programs are started as users start them, in processes of their own.
"""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import baselines
import distill
import finetune
import mae
import mlm
from support import fetch, loop, program, recipes, run, settings
from support.data import Data
from support.fetch import BadInput
from support.run import Run
from support.settings import Config

SMOKE = ("distill.py", "--smoke", "--finetune-steps", "2")


def start(*words: str, root: Path = fetch.ROOT) -> subprocess.Popen:
    """A program as a user starts it, from the project's folder."""
    return subprocess.Popen([sys.executable, *words], cwd=root, text=True, encoding="utf-8",
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """Its status, what it printed, and the last line of its standard error."""
    printed, errors = process.communicate()
    assert "Traceback" not in errors, errors
    return process.returncode, printed, (errors.strip().splitlines() or [""])[-1]


def labelled(modality: str) -> tuple[nn.Module, Data, Config]:
    """A small model, 20 labelled examples, train and test alike, and short final settings."""
    draws = torch.Generator().manual_seed(1)
    if modality == "image":
        model = mae.MAE(mae.Config(image_size=16, patch_size=8, width=32, depth=2, heads=4, mlp=64,
                                   decoder_width=16, decoder_depth=1, decoder_heads=2,
                                   decoder_mlp=32), draws)
        inputs = torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8, generator=draws)
    else:
        model = mlm.MLM(mlm.Config(vocab_size=60, width=32, depth=2, heads=4, mlp=64,
                                   max_positions=20, mask_id=59, special_ids=(0, 1, 2, 3, 59)),
                        draws)
        inputs = torch.randint(5, 58, (20, 9), generator=draws)
        inputs[:, 0], inputs[:, 8] = 0, 2
        inputs[::3, 6], inputs[::3, 7:] = 2, 1
    labels = torch.arange(20) % 4
    data = Data("made", inputs, labels, inputs, labels, list("abcd"), "accuracy", "0", "")
    config = Config(steps=5, batch_size=6, finetune_steps=6, finetune_batch_size=8, device="cpu",
                    finetune_lr=1e-3, lr=1e-3, match="cls")
    return model, data, settings.final(config, model, 20)


def go(folder: Path, modality: str, **changes: object) -> Run:
    """Algorithm 1 and a row of each method, in a folder."""
    model, data, config = labelled(modality)
    config = replace(config, **changes)
    this = Run(folder, config, data="hash", init_weights=program.digest(model))
    models = distill.self_distill(model, data.train, config, run=this)
    rows = {row: (models[-1], method) for row, method in baselines.METHODS.items()}
    finetune.measure(rows, model, data, config, this)
    return this


def same(a: Path, b: Path) -> None:
    """Two folders hold the same models, log and results, bit for bit."""
    for name in ("log.jsonl", "results.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    names = {path.name for path in a.glob("*.safetensors")}
    assert names == {path.name for path in b.glob("*.safetensors")} and len(names) > 3
    for name in names:
        x, y = load_file(a / name), load_file(b / name)
        assert x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x), name


# ----------------------------------------------------------------------------- settings


def test_every_default_comes_from_the_table():
    """`final` leaves nothing open, and gives what §5 and the released code say."""
    model = mae.MAE(mae.Config(image_size=32, patch_size=16, decoder_depth=1, depth=1))
    assert settings.recipe(model) == "paper"  # 7 M parameters in one layer of ViT-B
    config = settings.final(Config(), model, 5994)
    named = {"data_dir", "export", "init", "out", "predict", "train_size", "teacher"}
    assert {name for name, value in vars(config).items() if value is None} == named
    assert (config.steps, config.batch_size) == (20_000, 64)
    assert (config.lr, config.mask_prob) == (1.5e-4, 0.75)
    assert (config.finetune_steps, config.finetune_batch_size) == (10_000, 32)
    assert (config.finetune_lr, config.finetune_clip, config.dropout) == (1e-4, 1.0, 0.1)
    assert config.finetune_warmup * config.finetune_steps == 500
    assert (config.warmup, config.clip, config.betas) == (0.0, 0.0, (0.9, 0.95))
    model = mlm.MLM(mlm.Config(width=768, depth=1, mlp=32, vocab_size=8000, mask_id=7999))
    config = settings.final(Config(), model, 3219)
    assert (config.steps, config.finetune_steps) == (2600, 1010)  # 100 and 10 epochs of SciERC
    assert settings.final(config, model, 3219) == config
    assert settings.recipe(labelled("image")[0]) == "small"


@pytest.mark.parametrize("wrong, said", [
    ({"match": "hiden"}, "match is 'hiden' (did you mean hidden?)"),
    ({"masking": "fixd"}, "masking is 'fixd' (did you mean fixed?)"),
    ({"pixels": "RAW"}, "pixels is 'RAW'"), ({"rounds": -1}, "rounds is -1"),
    ({"mask_prob": 1.5}, "mask_prob is 1.5: use more than 0 and less than 1"),
    ({"steps": 0}, "steps is 0: use at least 1"), ({"steps": 1.5}, "steps is 1.5"),
    ({"lr": float("nan")}, "lr is nan"), ({"seed": None}, "seed is None"),
    ({"save_every": "abc"}, "save_every is 'abc'"), ({"precision": "fp16"}, "precision"),
    ({"as_released": True, "precision": "bf16"}, "as_released means precision fp32, not bf16"),
    ({"teacher": "x", "rounds": 0}, "teacher is given, but there are no rounds"),
])
def test_a_setting_is_checked_where_it_is_made(wrong, said):
    with pytest.raises(BadInput, match=re.escape(said)):
        Config(**wrong)


@pytest.mark.parametrize("argv, said", [
    (["--match", "hiden"], "--match is 'hiden' (did you mean hidden?)"),
    (["--mask-prob", "1"], "--mask-prob is 1.0: use more than 0"),
    (["--round", "1"], "--round is no flag of distill.py (did you mean --rounds?)"),
    (["--method", "mars"], "--method is a flag, but not one of distill.py"),
    (["--steps", "many"], "--steps: invalid int value: 'many'"),
    (["--dataset", "cup"], "no data set 'cup' (did you mean cub?)"),
    (["--as-released", "--masking", "80-10-10"], "--as-released means masking fixed"),
])
def test_a_mistake_on_the_command_line_is_one_sentence(argv, said):
    with pytest.raises(BadInput, match=re.escape(said)):
        program.parse("distill", "", argv)


def test_what_a_modality_does_not_have_is_refused():
    for modality, changes, said in (
            ("image", {"masking": "80-10-10"}, "masking 80-10-10 is not for images"),
            ("text", {"masking": "fixed"}, "masking fixed is not for texts"),
            ("text", {"as_released": True}, "as_released is for images"),
            ("image", {"batch_size": 21}, "there are 20 training examples"),
            ("image", {"batch_size": 6, "accumulate": 7}, "batch_size is 6, which cannot be")):
        with pytest.raises(BadInput, match=said):
            settings.final(Config(**changes), labelled(modality)[0], 20)


def test_as_released_sets_all_that_the_release_does():
    config = settings.final(Config(as_released=True), labelled("image")[0], 20)
    assert {name: getattr(config, name) for name in recipes.AS_RELEASED} == recipes.AS_RELEASED


# ----------------------------------------------------------------------------- carrying on


@pytest.mark.parametrize("modality", ["image", "text"])
def test_a_killed_run_carries_on_bit_for_bit(modality, tmp_path, monkeypatch):
    """Stopped at a moment of every stage and started again: same weights, log and results."""
    class Killed(Exception):
        pass

    log = loop.Stage._log
    left = [10**9]

    def dying_log(stage, values):
        log(stage, values)
        left[0] -= 1
        if not left[0]:
            raise Killed

    monkeypatch.setattr(loop.Stage, "_log", dying_log)
    monkeypatch.setattr(run.pictures, "curves", lambda *_: None)
    go(tmp_path / "whole", modality, save_every="2")
    for moment in (1, 7, 9, 18, 24, 30):  # the last three in RecAdam, MARS and R3F
        left[0] = moment
        with pytest.raises(Killed):
            go(tmp_path / str(moment), modality, save_every="2")
        left[0] = 10**9
        go(tmp_path / str(moment), modality, save_every="2")
        same(tmp_path / "whole", tmp_path / str(moment))


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["toybirds", "pydocs"])
def test_a_program_killed_at_any_moment_ends_as_if_it_had_not_been(dataset, tmp_path):
    """SIGKILL every second or so, mid-file too, until the program gets through."""
    words = ("distill.py", "--smoke", "--dataset", dataset, "--rounds", "2", "--steps", "40",
             "--finetune-steps", "40", "--save-every", "1", "--data-dir", str(tmp_path))
    assert finish(start(*words, "--out", str(tmp_path / "whole")))[0] == 0
    kills, patience = 0, 3.0
    while True:
        process = start(*words, "--out", str(tmp_path / "killed"))
        try:
            process.wait(patience)
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills, patience = kills + 1, patience + 0.37
    assert finish(process)[0] == 0 and kills >= 5
    same(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_program_says_how_to_go_on_and_loses_nothing(number, tmp_path):
    words = (*SMOKE, "--steps", "100000", "--rounds", "0", "--out", str(tmp_path / "out"))
    process = start(*words)
    log = tmp_path / "out" / "log.jsonl"
    while process.poll() is None and not log.exists():
        time.sleep(0.01)
    process.send_signal(number)
    status, _, said = finish(process)
    assert status == 128 + number
    assert said == f"stopped; to carry on: python {' '.join(words)}"
    with safe_open(tmp_path / "out" / "checkpoint.safetensors", "pt") as file:
        assert int(file.metadata()["step"]) >= 1  # the step that it was in


# ----------------------------------------------------------------------------- nothing is mixed


def test_a_folder_with_other_settings_is_refused(tmp_path):
    _, _, config = labelled("image")
    Run(tmp_path, config, source="here")
    moved = dict(device="auto", save_every="7", data_dir="b", init="c", accumulate=2)
    Run(tmp_path, replace(config, **moved), source="there")
    with pytest.raises(BadInput, match="finetune_lr was 0.001, now 0.5"):
        Run(tmp_path, replace(config, finetune_lr=0.5))
    (tmp_path / "config.json").unlink()
    (tmp_path / "log.jsonl").touch()
    with pytest.raises(BadInput, match="log.jsonl of something else than a run"):
        Run(tmp_path, config)


def test_a_teacher_of_another_run_is_refused_where_it_is_not_asked_for(tmp_path):
    go(tmp_path / "a", "image")
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "a" / "further.safetensors", tmp_path / "b")
    with pytest.raises(BadInput, match="was not made by this run.*--teacher"):
        go(tmp_path / "b", "image", seed=5)
    go(tmp_path / "c", "image", teacher=str(tmp_path / "a" / "further.safetensors"))
    assert not (tmp_path / "c" / "further.safetensors").exists()  # line 1 was not done again
    same_student = [load_file(tmp_path / folder / "distilled-1.safetensors") for folder in "ac"]
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in same_student)))


def test_only_what_computes_is_in_the_hash_of_the_code(tmp_path, monkeypatch):
    for name in (*run.COMPUTES, "support/pictures"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(fetch.ROOT / f"{name}.py", tmp_path / f"{name}.py")
    monkeypatch.setattr(fetch, "ROOT", tmp_path)
    before, path = run.code(), tmp_path / "distill.py"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"""Line 11, [B]:', '"""Other words:') + "\n# a comment\n",
                    encoding="utf-8")
    (tmp_path / "support" / "pictures.py").write_text("drawn = 'otherwise'\n")
    assert run.code() == before
    path.write_text(text.replace(".square()", ".abs()"), encoding="utf-8")
    assert run.code() != before


def test_after_the_code_is_edited_nothing_old_is_shown_or_used(tmp_path):
    """Finished or half done: one sentence and status 2; with the old code back, it carries on."""
    copy = tmp_path / "project"
    shutil.copytree(fetch.ROOT, copy, ignore=shutil.ignore_patterns(
        ".git", "runs", "results", "golden", "test_*", "tiny-mlm*", ".*_cache", "__pycache__"))
    words = (*SMOKE, "--out", str(tmp_path / "out"))
    status, table, _ = finish(start(*words, root=copy))
    assert status == 0 and "self-distillation" in table
    path = copy / "distill.py"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("return difference.square()", "return 0 * difference.square()"),
                    encoding="utf-8")
    for done in ("results.json", "rows.json"):
        status, printed, said = finish(start(*words, root=copy))
        assert status == 2 and "self-distillation" not in printed
        assert said.startswith(f"error: {tmp_path / 'out'} holds a run of other code")
        (tmp_path / "out" / done).unlink()  # next time the run is half done
    path.write_text(text, encoding="utf-8")
    again = finish(start(*words, root=copy))[1]
    assert "carries on; there: distilled-1," in again
    assert again.partition("\n\n")[2] == table.partition("\n\n")[2]


# ----------------------------------------------------------------------------- what a run leaves


def test_a_run_folder_holds_what_it_says(tmp_path):
    results = go(tmp_path, "text", seed=3, mae_weight=0.5).results
    config, stored = (json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
                      for name in ("config", "results"))
    assert stored == results and config["facts"]["code"] == run.code()
    assert config["settings"]["finetune_steps"] == 6 and config["facts"]["data"] == "hash"
    assert config["versions"]["torch"] == torch.__version__
    assert [row["method"] for row in results["rows"]] == list(baselines.METHODS)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    stages = [(line["stage"], line["round"]) for line in lines]
    assert list(dict.fromkeys(stages))[:3] == [
        ("further pre-training", 0), ("self-distillation", 1), ("fine-tuning", 0)]
    student = [line for line in lines if line["stage"] == "self-distillation"]
    assert [line["step"] for line in student] == list(range(5))
    assert set(student[0]) == {"stage", "round", "step", "mae_loss", "distill_loss", "lr",
                               "grad_norm"}
    with safe_open(tmp_path / "distilled-1.safetensors", "pt") as file:
        about = file.metadata()
    assert (about["seed"], about["mae_weight"], about["match"]) == ("3", "0.5", "cls")
    assert (tmp_path / "curves.png").stat().st_size > 0
    assert not list(tmp_path.glob("*checkpoint*")) and not list(tmp_path.glob("*.part"))
    os.utime(tmp_path / "results.json", (0, 0))
    assert go(tmp_path, "text", seed=3, mae_weight=0.5).results == results  # nothing is done again


def test_a_folder_is_named_after_what_is_unusual():
    model = labelled("image")[0]
    config = settings.final(Config(seed=7, init="some/weights.safetensors", rounds=2), model, 20)
    assert run.folder("distill", config, model, 20) == Path(
        "runs/distill-toybirds-weights-rounds=2-seed7")
