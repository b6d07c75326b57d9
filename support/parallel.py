"""Several processes, each with a GPU: `torchrun --nproc-per-node=N distill.py …`.

On several machines --out and --data-dir are folders that all of them see. Every process draws the
whole mini-batch, as one alone would, and works on its share of it; torch's
DistributedDataParallel averages the gradients. Rank 0 decides and writes, the others follow.
Without torchrun there is one process, and what stands here does nothing.
"""
import contextlib
import datetime
import os
import sys
import threading
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def here() -> int:
    """How many of them are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _end_with(parent: int) -> None:
    """End this process when torchrun, its parent, has ended.

    It may have ended before this could see it: then the processes never find each other.
    """
    patience = 300  # seconds for that
    while os.getppid() == parent and patience:
        time.sleep(1)
        patience -= not dist.is_initialized()
    with contextlib.suppress(OSError):
        os.write(2, b"error: torchrun has ended, so this process does; what was saved is kept\n")
    os._exit(1)


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Within it, torchrun's processes work together, each on a GPU of its own; rank 0 prints."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    # NCCL for tensors on GPUs, gloo on CPUs; rank 0 may download for hours while the others wait
    dist.init_process_group(timeout=datetime.timedelta(days=1))
    with open(os.devnull, "w") as nowhere:
        with contextlib.redirect_stdout(nowhere if rank() else sys.stdout):
            yield
    dist.destroy_process_group()


def agree(value: object) -> object:
    """Rank 0's value: what it has found on the disk, say, so that all take the same way."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, device=torch.device("cpu"))
    return box[0]


def total(values: Tensor, kind: str = "sum") -> Tensor:
    """The sum or the "max" over all processes of a tensor that each of them has, in place."""
    if world() > 1:
        dist.all_reduce(values, dist.ReduceOp.SUM if kind == "sum" else dist.ReduceOp.MAX)
    return values


@contextlib.contextmanager
def in_turn() -> Iterator[None]:
    """Rank 0 goes first, so that the others find what it downloads or decodes."""
    if rank():
        agree(None)  # which waits for rank 0
    yield
    if not rank():
        agree(None)


def wrap(module: nn.Module) -> nn.Module:
    """The module itself or, among several processes, with its gradients averaged over them."""
    return DistributedDataParallel(module, gradient_as_bucket_view=True) if world() > 1 else module


def parts(model: nn.Module, examples: int, accumulate: int) -> Iterator[slice]:
    """This process's share of a mini-batch, as slices to be worked on one after another.

    Between two slices gradients add up; they are averaged over the processes in the last one's
    backward pass.
    """
    count, first = world() * accumulate, rank() * accumulate
    for i in range(first, first + accumulate):
        early = isinstance(model, DistributedDataParallel) and i + 1 < first + accumulate
        with model.no_sync() if early else contextlib.nullcontext():
            yield slice(examples * i // count, examples * (i + 1) // count)
