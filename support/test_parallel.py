"""Several processes: what they do when torchrun is gone, and on several machines."""
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from support.fetch import ROOT

WORKER = """
import os, signal, time
from support import parallel

with parallel.processes(), parallel.in_turn():
    if not parallel.rank():
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(90)
"""


def test_processes_end_when_torchrun_is_killed(tmp_path):
    """One works, as if it downloaded; the other waits for it in a collective operation."""
    (tmp_path / "worker.py").write_text(WORKER)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         tmp_path / "worker.py"], env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=60)  # until nobody holds the pipes any more
    assert done.returncode == -signal.SIGKILL and "error: torchrun has ended" in done.stderr


def start(*words: str) -> subprocess.Popen:
    """A program as a user starts it, from the project's folder."""
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_two_machines_are_one(tmp_path):
    """Two nodes of a process each, on the loopback address, with a folder that both see."""
    words = ["distill.py", "--smoke", "--device", "cpu", "--lr", "1e-4", "--finetune-lr", "1e-4"]
    alone = start(*words, "--out", str(tmp_path / "one"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    nodes = [start("-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node),
                   "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", port,
                   *words, "--out", str(tmp_path / "two")) for node in (0, 1)]
    assert [process.wait(120) for process in (alone, *nodes)] == [0, 0, 0]
    one, two = (json.loads((tmp_path / folder / "results.json").read_text(encoding="utf-8"))["rows"]
                for folder in ("one", "two"))
    for a, b in zip(one, two):
        assert a["score"] == b["score"]
        for name in ("train_loss", "test_loss", "mae_test", "distance"):
            assert b[name] == pytest.approx(a[name], rel=1e-5)  # sums in another order
