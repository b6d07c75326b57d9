"""Several processes: they compute what one does, and end when torchrun does."""
import signal
import socket
from dataclasses import replace
from pathlib import Path

import pytest

import mlm
from support.fetch import ROOT
from support.testing import finish, log_of, rows_of, run_here, start

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
    (tmp_path / "worker.py").write_text(WORKER)
    process = start(*TORCHRUN, "--standalone", "--nproc-per-node=2", tmp_path / "worker.py", ROOT)
    errors = process.communicate(timeout=60)[1]  # until nobody holds the pipes any more
    assert process.returncode == -signal.SIGKILL and "error: torchrun has ended" in errors


@pytest.mark.parametrize("nodes, line", [
    (1, "distill.py --accumulate 2 --match hidden --steps 12 --lr 1e-4"),
    pytest.param(2, "distill.py --dataset pydocs --match cls --steps 12 --lr 1e-4 --init still",
                 marks=pytest.mark.slow), pytest.param(1, "baselines.py", marks=pytest.mark.slow)])
def test_two_processes_are_one(nodes, line, tmp_path, monkeypatch):
    """On a CPU, of one or two machines: one's losses, gradients and scores, to 1e-5."""
    monkeypatch.chdir(tmp_path)
    still = mlm.MLM.from_pretrained("tiny")
    still.config = replace(still.config, dropout=0.0)  # its draws differ between processes
    still.save("still/model.safetensors")
    # small steps: Adam's division by √v enlarges rounding, most in the first ones
    line += " --smoke --finetune-lr 1e-4 --device cpu"
    run_here(f"{line} --out one")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    several = [start(*TORCHRUN, f"--nnodes={nodes}", f"--nproc-per-node={2 // nodes}",
                     f"--node-rank={node}", "--master-addr=127.0.0.1", f"--master-port={port}",
                     *f"{ROOT}/{line} --out two".split()) for node in range(nodes)]
    printed = ""
    for process in several:
        status, told, _ = finish(process)
        assert status == 0
        printed += told
    assert printed.count("fine-tuning ") == 1  # only one of them prints
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
