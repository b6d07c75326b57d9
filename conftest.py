"""What holds while the tests run."""
import functools

import pytest
import torch

from support import run
from support.testing import run_here


@pytest.fixture(scope="session", autouse=True)
def surroundings(tmp_path_factory):
    """One place for data, also of programs that are started; the code is hashed once.

    One thread: more are slower for models as small as these.
    """
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATA_DIR", str(tmp_path_factory.mktemp("data")))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(run, "code", functools.cache(run.code))
        yield


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a run that has finished."""
    folder = tmp_path_factory.mktemp("finished")
    run_here(f"distill.py --smoke --out {folder}")
    return folder
