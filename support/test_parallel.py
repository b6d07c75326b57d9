"""What torchrun's processes do when torchrun is gone."""
import os
import signal
import subprocess
import sys

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
