"""A run from settings to results: random numbers, batches, the loop's book-keeping, the folder.

The paper takes all of this for granted.
"""
import contextlib
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from tqdm import tqdm

from support import fetch, images, parallel, settings, texts
from support.settings import Config, autocast, check, device, fill, uses_bf16

# ----------------------------------------------------------------------------- random numbers


def seed_of(*address: object) -> int:
    """A 63-bit seed for an address such as (seed, stream, round, step): no state is to be saved."""
    digest = hashlib.blake2b("/".join(map(str, address)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*address: object) -> torch.Generator:
    """A CPU generator for one address; the same address draws the same numbers on every machine."""
    return torch.Generator().manual_seed(seed_of(*address))


@functools.lru_cache(maxsize=2)
def _epoch(examples: int, seed: int, stream: str, round: int, epoch: int) -> torch.Tensor:
    return torch.randperm(examples, generator=generator(seed, stream, round, epoch))


def draw_batch(examples: int, batch_size: int, seed: int, stream: str, round: int,
               step: int) -> torch.Tensor:
    """Line 5: the indices Long[B] of a step's mini-batch, shuffled epochs laid end to end."""
    first, last, parts = step * batch_size, (step + 1) * batch_size, []
    while first < last:
        epoch, place = divmod(first, examples)
        parts.append(_epoch(examples, seed, stream, round, epoch)[place:place + last - first])
        first += len(parts[-1])
    return torch.cat(parts)  # [B]


# ----------------------------------------------------------------------------- devices

REMEMBERED = 2**34  # bytes of a teacher's hidden states: five times what CUB needs in float32


def compiled(model: torch.nn.Module, config: Config) -> None:
    """Compile a model's layers in place, where --compile asks for it.

    Layers, not the whole: they are alike, so one compilation serves all, and which tokens are
    visible is decided outside. Their number differs from batch to batch.
    """
    for stack in (part.blocks for part in model.modules() if hasattr(part, "blocks")):
        for block in stack if config.compile else ():
            block.compile(dynamic=True)


def place(inputs: object, where: torch.device) -> object:
    """Inputs moved to a GPU if they take at most a quarter of what is free there."""
    held = inputs.ids if isinstance(inputs, texts.Texts) else inputs
    if where.type == "cuda" and held.nbytes <= torch.cuda.mem_get_info(where)[0] // 4:
        return inputs.to(where)
    return inputs


def batch(inputs: object, index: torch.Tensor, where: torch.device) -> torch.Tensor:
    """Examples as a model takes them, on the device: normalised pictures [B, 3, S, S], ids [B, K].

    inputs: anything that an index Long[B] picks a batch from; uint8 is taken for pixels.
    """
    x = inputs[index].to(where, non_blocking=True)
    if x.dtype == torch.uint8:
        return images.normalise(x)
    return x if x.is_floating_point() else x.long()


def cut(known: dict, part: slice) -> dict:
    """The tensors of a dictionary cut to a part of the batch, the rest as it is."""
    return {name: value[part] if isinstance(value, torch.Tensor) else value
            for name, value in known.items()}


def _reserved(file: Path, size: int) -> bool:
    """Whether the disk has given a file all its bytes: a hole written to later would be fatal."""
    try:
        with open(file, "wb") as room:
            for first in range(0, size, 2**24):
                room.write(bytes(min(2**24, size - first)))
    except OSError:
        file.unlink(missing_ok=True)
        return False
    return True


def remembered(states: Callable[[torch.Tensor], torch.Tensor], inputs: object, config: Config,
               folder: Path | None) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A function of (index Long[B], their batch x) that gives states(x) [B, K, D] from memory.

    For a frozen model, whose states of unchanging inputs are computed once, in batches that a run
    carried on repeats. They lie on the GPU if they take at most a quarter of what is free there,
    else in a file in the folder that is mapped into memory (without a folder, in memory). What
    would take more than REMEMBERED bytes, or more than the disk gives, or would be asked for less
    than once each, is computed as needed.
    """
    where = device(config)

    def fresh(index: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), autocast(config):
            return states(x)

    x = batch(inputs, torch.arange(1), where)
    one = fresh(None, x)  # [1, K, D]
    # states of texts lie end to end as their tokens do: no padding is kept
    flat = isinstance(inputs, texts.Texts) and one.shape[1] == x.shape[1]
    shape = (len(inputs.ids), one.shape[2]) if flat else (len(inputs), *one.shape[1:])
    size, folder = math.prod(shape) * one.element_size(), parallel.agree(folder)
    if size > REMEMBERED or config.steps * config.batch_size < len(inputs):
        return fresh
    batches = torch.arange(len(inputs)).split(64)
    on_gpu = parallel.agree(
        where.type == "cuda" and size <= torch.cuda.mem_get_info(where)[0] // 4)
    if on_gpu or folder is None:
        memory = torch.empty(shape, dtype=one.dtype, device=where if on_gpu else "cpu")
    else:  # one file for all processes, each of which writes its share
        file = folder / "teacher.part"
        if not parallel.agree(parallel.rank() == 0 and _reserved(file, size)):
            return fresh
        memory = torch.from_file(str(file), True, math.prod(shape), dtype=one.dtype).view(shape)
        batches = batches[parallel.rank()::parallel.world()]

    def slots(index: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not flat:
            return index.to(memory.device), None
        return tuple(part.to(memory.device) for part in inputs.places(index, x.shape[1]))

    shown = folder and not parallel.rank() and sys.stderr.isatty()
    for index in tqdm(batches, "teacher's hidden states", disable=not shown, leave=False):
        x = batch(inputs, index, where)
        found, (slot, padding) = fresh(index, x).to(memory.device), slots(index, x)
        if flat:
            slot, found = slot[~padding], found[~padding]  # [N], [N, D]
        memory[slot] = found
    parallel.wait()
    if folder and not on_gpu and not parallel.rank():
        with contextlib.suppress(OSError):  # Windows keeps a file that is open
            file.unlink()  # what is mapped stays until the last process ends, however it ends

    def look_up(index: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        slot, padding = slots(index, x)
        found = memory[slot].to(where, non_blocking=True)  # [B, K, D]
        return found if padding is None else found.masked_fill_(padding[..., None].to(where), 0)

    return look_up


def clip_gradient(model: torch.nn.Module, most: float) -> torch.Tensor:
    """Scale the gradient to at most a norm of `most` (0: leave it); returns the norm it had."""
    moved = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in moved])
    if most:
        torch.nn.utils.clip_grads_with_norm_(moved, most, norm)
    return norm


# ----------------------------------------------------------------------------- models, data by name


def load_model(kind: type, config: Config) -> torch.nn.Module:
    """`mae.MAE` or `mlm.MLM` with the weights that --init names."""
    if config.init != "random":
        return kind.from_pretrained(config.init)
    usual = settings.TOYS.get(config.dataset, settings.HUB[config.modality])
    if usual == settings.HUB["image"]:  # its sizes are the defaults; text needs its tokenizer
        return kind(generator=generator(config.seed, "init"))
    model = kind.from_pretrained(usual)
    fresh = kind(model.config, generator(config.seed, "init"))
    if config.modality == "text":
        fresh.tokenizer = model.tokenizer
    return fresh


def load_data(config: Config, model: torch.nn.Module) -> fetch.Data:
    """The data set that --dataset names, cut to --train-size, as the model takes it."""
    if model.modality == "image":
        data = images.load(config.dataset, config.data_dir, model.config.image_size)
    else:
        data = texts.load(config.dataset, config.data_dir, model.tokenizer,
                          model.config.max_length)
    if config.smoke and config.train_size is None:
        few = max(80, len(data.classes))
        config = replace(config, train_size=min(few, len(data.train)))
    if config.smoke and data.test is not None:
        few = torch.randperm(len(data.test), generator=generator(config.seed, "smoke"))[:64]
        data = replace(
            data, test=data.test[few] if model.modality == "image" else data.test.take(few),
            test_labels=None if data.test_labels is None else data.test_labels[few],
            fingerprint=f"{data.fingerprint}-smoke")
    if config.train_size is None or config.train_size == len(data.train):
        return data
    if config.train_size > len(data.train):
        raise fetch.BadInput(f"--train-size is {config.train_size}, but {config.dataset} has "
                             f"{len(data.train)} training examples: use fewer or leave it out")
    chosen = balanced(data.train_labels, len(data.train), config.train_size,
                      generator(config.seed, "subset"))
    return replace(
        data, train=data.train[chosen] if model.modality == "image" else data.train.take(chosen),
        train_labels=None if data.train_labels is None else data.train_labels[chosen],
        fingerprint=f"{data.fingerprint}-{config.train_size}-{config.seed}")


def balanced(labels: torch.Tensor | None, examples: int, size: int,
             draws: torch.Generator) -> torch.Tensor:
    """Indices Long[size] in rising order, as equal a number from every class as there are examples.

    The examples are shuffled, then taken in turn: each class's first, each class's second, and so
    on.
    """
    shuffled = torch.randperm(examples, generator=draws)
    if labels is None:
        return shuffled[:size].sort().values
    classes = labels.unique()
    if size < len(classes):
        raise fetch.BadInput(f"--train-size {size} is less than the {len(classes)} classes: "
                             "use at least one each")
    turn = torch.empty(examples, dtype=torch.long)
    for label in classes:
        members = shuffled[labels[shuffled] == label]
        turn[members] = torch.arange(len(members))
    # ties (the same turn, different classes) go by the shuffled order
    return shuffled[turn[shuffled].argsort(stable=True)][:size].sort().values


# ----------------------------------------------------------------------------- the run folder


def _short(value: object) -> str:
    name = str(value).rstrip("/\\").replace("\\", "/").split("/")[-1]
    return name.removesuffix(".safetensors").removesuffix(".jsonl")[:60]


# cannot change what is computed, bar rounding and dropout's draws
HARMLESS = ("data_dir", "out", "device", "accumulate", "save_every", "compile")
# the settings that further pre-training depends on; those that a student does beside them
FURTHER = ("seed", "steps", "batch_size", "lr", "weight_decay", "betas", "warmup", "clip",
           "mask_prob", "masking", "pixels", "precision")
STUDENT = ("match", "mae_weight")


def folder(program: str, config: Config, model: torch.nn.Module, examples: int) -> Path:
    """--out, or runs/<program>-<dataset>-<init>[-flag=value where not the default]-seed<seed>."""
    if config.out:
        return Path(config.out)
    usual = fill(check(Config(dataset=config.dataset, smoke=config.smoke)), model, examples)
    flags = [item.name for item in fields(Config) if "help" in item.metadata
             and item.name not in (*HARMLESS, "dataset", "init", "seed", "smoke")]
    unusual = [f"-{name.replace('_', '-')}={getattr(config, name)}" for name in flags
               if getattr(config, name) != getattr(usual, name)] + ["-smoke"] * config.smoke
    parts = f"{program}-{_short(config.dataset)}-{_short(config.init)}{''.join(unusual)}"
    return Path("runs") / f"{parts}-seed{config.seed}"


def recorded(config: Config) -> dict:
    """The settings as config.json holds them."""
    return {name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(config).items()}


def changed(before: dict, now: dict) -> list[str]:
    """The names in `now` whose values differ from before, bar those that change no result."""
    return [name for name, value in now.items()
            if name not in HARMLESS and before.get(name) != value]


def digest(model: torch.nn.Module) -> str:
    """A hash of all of a model's weights, its sizes and its tokenizer."""
    total = hashlib.blake2b(repr(model.config).encode(), digest_size=16)
    if getattr(model, "tokenizer", None):
        total.update(model.tokenizer.to_str().encode())
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.cpu().contiguous().flatten().view(torch.uint8)
        total.update(name.encode() + values.numpy().tobytes())
    return total.hexdigest()


def write_json(value: object, path: Path) -> None:
    """Write JSON whole or not at all."""
    with fetch.whole(path) as part:
        part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict:
    """What `write_json` wrote; BadInput where something else has been at the file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it has no names with values")
        return found
    except ValueError as error:
        raise fetch.BadInput(f"{path} is not what this program wrote ({error}): delete it, or "
                             "choose another --out") from error


def read_lines(path: Path) -> list[dict]:
    """What the lines of a .jsonl of a run hold; `BadInput` where something else has been at it."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise fetch.BadInput(f"{path} is not what this program wrote ({error}): choose another "
                             "--out or delete the folder") from error


def _revision() -> str:
    try:
        command = ["git", "describe", "--always", "--dirty"]
        return subprocess.run(command, cwd=fetch.ROOT, capture_output=True, text=True,
                              check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _versions() -> dict[str, str]:
    """Python's and those of the packages in requirements.txt that are installed."""
    found = {"python": platform.python_version()}
    wanted = (fetch.ROOT / "requirements.txt").read_text(encoding="utf-8")
    for name in re.findall(r"(?m)^\w[\w-]*", wanted):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _command() -> str:
    """The command line that is running, as one may type it again."""
    join = subprocess.list2cmdline if os.name == "nt" else shlex.join
    several = ["torchrun", f"--nproc-per-node={parallel.world()}"]
    return join([*(several if parallel.world() > 1 else ["python"]), *sys.argv])


@functools.cache
def _lock(folder: Path) -> object:
    """Hold the folder for this process until it ends, however it ends; BadInput if another does."""
    file = open(folder / "lock", "a+", encoding="utf-8")
    try:
        if os.name == "nt":
            import msvcrt
            os.lseek(file.fileno(), 1 << 30, os.SEEK_SET)  # what is locked cannot be read there
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if not isinstance(error, (BlockingIOError, PermissionError)):
            return file  # some network file systems have no locks
        file.seek(0)
        raise fetch.BadInput(f"{folder} belongs to a program that is still running "
                             f"({file.read()}): wait for it, stop it, or choose another --out"
                             ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()} since "
               f"{time.strftime('%Y-%m-%d %H:%M:%S %z')}")
    file.flush()
    return file


STOPS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A signal, whose number is the argument, asked the program to end."""


def _stop(number: int, _: object) -> None:
    raise Stopped(number)


@contextlib.contextmanager
def _noting() -> Iterator[list[int]]:
    """Signals that ask to stop are noted in a list here, so that a step can end first."""
    noted: list[int] = []
    before = {number: signal.signal(number, lambda number, _: noted.append(number))
              for number in STOPS}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# what a run writes after its config.json, and could lose if it were somebody else's
WRITTEN = ("log.jsonl", "timing.jsonl", "rows.json", "checkpoint.safetensors", "results.json")
# what `fetch.whole`, `remembered` and safetensors leave when they are killed
LITTER = re.compile(r".+\.(json|jsonl|safetensors|png)\.\d{1,7}\.part|teacher\.part|\.tmp\w+")


def _tidy(folder: Path) -> None:
    """Remove what a killed process left half written in its run folder, and nothing else."""
    for path in folder.iterdir():
        if LITTER.fullmatch(path.name) and path.is_file():
            path.unlink()
    for path in (folder / "log.jsonl", folder / "timing.jsonl"):  # a line may have been cut short
        if path.exists() and not (content := path.read_bytes()).endswith(b"\n"):
            with fetch.whole(path) as part:
                part.write_bytes(content[:content.rfind(b"\n") + 1])


class Run:
    """One run's folder, log, checkpoint and progress; `Run()` keeps nothing and shows nothing."""

    def __init__(self, folder: Path | None = None, config: Config | None = None,
                 **facts: object) -> None:
        self.folder = folder = None if parallel.rank() else folder  # only rank 0 writes
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        finished = (folder / "results.json").exists()
        if not finished:  # a finished run is only read
            _lock(folder.resolve())
        asked = recorded(config)
        self.lineage = {name: str(getattr(config, name)) for name in ("dataset", "init", "seed")}
        self.lineage |= {name: str(value) for name, value in facts.items()}
        self.config, self.facts = config, facts
        known = folder / "config.json"
        if not known.exists():
            if alien := [name for name in WRITTEN if (folder / name).exists()]:
                raise fetch.BadInput(f"{folder} holds {', '.join(alien)} of something else than a "
                                     "run: choose another --out")
            write_json({"settings": asked, "facts": facts, "command": _command(),
                        "versions": _versions(), "machine": platform.platform(),
                        "device": str(device(config)), "threads": torch.get_num_threads(),
                        "git": _revision()}, known)
            return
        record = read_json(known)
        if not {"settings", "facts"} <= record.keys():
            raise fetch.BadInput(f"{known} is of something else than a run: choose another --out")
        before, now = record["settings"] | record["facts"], asked | facts
        if names := changed(before, now):
            told = "; ".join(f"{name} was {before.get(name)}, now {now[name]}" for name in names)
            raise fetch.BadInput(f"{folder} holds a run with other settings ({told}): "
                                 "choose another --out or delete the folder")
        if not finished:
            _tidy(folder)

    def results(self) -> dict | None:
        """The finished run's results.json, or None."""
        path = self.folder and self.folder / "results.json"
        return parallel.agree(read_json(path) if path and path.exists() else None)

    def stage(self, name: str, round: int, model: torch.nn.Module,
              optimiser: torch.optim.Optimizer, steps: int, lr: float, warmup: float,
              config: Config) -> Iterator[int]:
        """Line 4, `while not converge`: yields the steps that are left to do.

        Before each it sets the learning rate (linear warm-up, then linear to 0) and dropout's seed;
        after each it saves a checkpoint when one is due. A run that died carries on from its last.
        """
        self.name, self.round, self.steps, self.optimiser = name, round, steps, optimiser
        self.unread, self.finite, self.examples = [], "", 0
        self.hint = f"a lower {'--finetune-lr' if name.startswith('fine-tuning') else '--lr'}" + (
            " or --precision fp32" if uses_bf16(config) else "")
        start = self._resume(model)
        every, minutes = config.save_every.rstrip("m"), config.save_every.endswith("m")
        saved = told = began = time.monotonic()
        # a bar of its own for every stage; a line now and then where the output is a file
        bars, lines = (self.folder and sys.stderr.isatty() == tty for tty in (True, False))
        title = f"{name}, round {round}" if round else name
        end_well = _noting() if self.folder or parallel.rank() else contextlib.nullcontext([])
        with tqdm(total=steps, initial=start, desc=title, disable=not bars, dynamic_ncols=True,
                  mininterval=0.5) as self.bar, end_well as stops:
            self.bar.postfix = None  # a bar that is not shown has none until a line is logged
            for step in range(start, steps):
                self.step = step
                ramp = warmup * steps
                share = step / ramp if step < ramp else (steps - step) / (steps - ramp)
                for group in optimiser.param_groups:
                    group["lr"] = lr * share
                alone = () if parallel.rank() == 0 else (parallel.rank(),)
                torch.manual_seed(seed_of(config.seed, "dropout", round, step, *alone))
                yield step
                self.bar.update()
                if lines and (time.monotonic() - told >= 20 or step + 1 == steps):
                    told = time.monotonic()
                    print(tqdm.format_meter(
                        step + 1, steps, told - began, prefix=title, initial=start,
                        postfix=self.bar.postfix, bar_format="{desc}: step {n}/{total}, "
                        "{rate_fmt}, {remaining} left{postfix}"), file=sys.stderr, flush=True)
                if minutes:
                    due = time.monotonic() - saved >= 60 * float(every)
                else:
                    due = (step + 1) % int(every) == 0
                # all processes stop after the same step, or some would wait for the others
                stop = int(parallel.total(torch.tensor(max(stops, default=0)), "max"))
                if self.folder and (stop or due and step + 1 < steps):
                    self._save(model, step + 1)
                    saved = time.monotonic()
                if stop:
                    if self.folder:
                        self._time(began, step + 1 - start)
                    raise Stopped(stop)
        self._sound(model, steps)
        if self.folder:
            self._time(began, steps - start)

    def log(self, index: torch.Tensor, **values: torch.Tensor) -> None:
        """Note a step's losses, gradient norm and so on, of the examples index Long[B].

        They are written at the first and the last step and about 50 between. Every step's are
        looked at, then or before a checkpoint: `FloatingPointError` where one is not finite.
        """
        self.examples += len(index)
        self.unread.append((self.step, self.optimiser.param_groups[0]["lr"], index, values))
        if self.step % max(1, self.steps // 50) and self.step != self.steps - 1:
            return  # reading a value would make the device wait
        mine = self._read()  # of a share of the batch, where others have theirs
        together = parallel.total(torch.tensor([*mine.values()], dtype=torch.float64))
        values = dict(zip(mine, (together / parallel.world()).tolist()))
        if self.folder:
            losses = {name: f"{value:.4g}" for name, value in values.items() if "loss" in name}
            self.bar.set_postfix(losses, refresh=False)
            self._append("log.jsonl", {"stage": self.name, "round": self.round, "step": self.step,
                                       **values})

    def _read(self) -> dict[str, float]:
        """The last step's values, after a look at those of all the steps since the last look."""
        # all at once: the device waits once
        table = torch.stack([value.float() for *_, values in self.unread
                             for value in values.values()]).tolist()
        for step, lr, index, names in self.unread:
            values, table = dict(zip(names, table)) | {"lr": lr}, table[len(names):]
            told = ", ".join(f"{name} {value:g}" for name, value in values.items())
            if not all(map(math.isfinite, values.values())):
                raise FloatingPointError(
                    f"{self.name}, round {self.round}, step {step} is not finite: {told}"
                    f"{self.finite}; in the batch were the training examples "
                    f"{', '.join(map(str, index.tolist()))} (the first is 0); what was saved "
                    f"before is kept: try {self.hint} in another --out")
            self.finite = f"; the last that was: step {step}, {told}"
        self.unread = []
        return values

    def _sound(self, model: torch.nn.Module, step: int) -> None:
        """FloatingPointError where the first so many steps made something that is not finite."""
        if self.unread:
            self._read()
        if not all(p.isfinite().all() for p in model.parameters()):
            raise FloatingPointError(
                f"{self.name}, round {self.round}, step {step - 1} made a weight that is not "
                f"finite{self.finite}; what was saved before is kept: try {self.hint} in another "
                "--out")

    def _time(self, began: float, steps: int) -> None:
        """A line of timing.jsonl, which has all that differs between two equal runs."""
        seconds = max(time.monotonic() - began, 1e-9)
        line = {"stage": self.name, "round": self.round, "steps": steps, "seconds": seconds,
                "examples_per_second": self.examples / seconds}
        if torch.cuda.is_available():
            line["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
        if os.name == "posix":
            import resource  # Windows has none
            unit = 1 if sys.platform == "darwin" else 1024
            line["peak_bytes"] = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self._append("timing.jsonl", line)

    def _append(self, name: str, line: dict) -> None:
        """Add a line to a .jsonl of the folder, and have it on the disk."""
        try:
            with open(self.folder / name, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(f"{self.folder / name} cannot be written ({error})") from error

    def _save(self, model: torch.nn.Module, step: int) -> None:
        self._sound(model, step)
        tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        for i, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{i}.{name}": torch.as_tensor(value)
                        for name, value in state.items()}
        fetch.save_weights(tensors, {}, self.folder / "checkpoint.safetensors", stage=self.name,
                           round=str(self.round), step=str(step))

    def _resume(self, model: torch.nn.Module) -> int:
        """The step to start from; weights and optimiser are put back as they were then."""
        path, start = parallel.agree(self.folder and self.folder / "checkpoint.safetensors"), 0
        if path and path.exists():
            try:
                with safe_open(path, framework="pt") as file:
                    about = file.metadata()
            except SafetensorError as error:
                raise fetch.BadInput(f"{path} is damaged ({error}): delete it, and this stage "
                                     "starts again") from error
            if (about["stage"], about["round"]) == (self.name, str(self.round)):
                start, tensors, state = int(about["step"]), load_file(path), {}
                model.load_state_dict({name.removeprefix("model."): tensor
                                       for name, tensor in tensors.items()
                                       if name.startswith("model.")})
                for name, tensor in tensors.items():
                    if name.startswith("optimiser."):
                        _, i, key = name.split(".")
                        state.setdefault(int(i), {})[key] = tensor
                self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": state})
        log = self.folder and self.folder / "log.jsonl"
        if log and log.exists():  # what was logged after the checkpoint will be logged again
            this = (self.name, self.round)
            keep = [line for line in read_lines(log) if not (
                (line["stage"], line["round"]) == this and line["step"] >= start)]
            with fetch.whole(log) as part:
                part.write_text("".join(json.dumps(line) + "\n" for line in keep),
                                encoding="utf-8")
        return start

    def _key(self, config: Config, names: tuple[str, ...], code: tuple[str, ...],
             **facts: object) -> str:
        """A hash of what a result depends on: settings, facts, the machine's kind, the code."""
        depends = facts | {name: getattr(config, name) for name in names} | {
            "torch": torch.__version__, "device": device(config).type, "bf16": uses_bf16(config),
            "code": [fetch.digest(fetch.ROOT / name)
                     for name in (*code, "mae.py", "mlm.py", "baselines.py", *(
                         f"support/{name}.py" for name in (
                             "images", "parallel", "texts", "settings", "run")))]}
        depends = json.dumps(depends, sort_keys=True).encode()
        return hashlib.blake2b(depends, digest_size=16).hexdigest()

    def kept(self, name: str, like: torch.nn.Module,
             make: Callable[[], torch.nn.Module], teacher: str = "none") -> torch.nn.Module:
        """The model that <name>.safetensors holds, made and saved if it is not there yet.

        It is also taken from a neighbouring run folder, if everything that it depends on has the
        same hash. teacher: the name of the model that it learns from.
        """
        key = self.folder and self._key(
            self.config, FURTHER if name == "further" else FURTHER + STUDENT, ("distill.py",),
            **self.facts)
        path = self.folder and self.folder / f"{name}.safetensors"
        found = parallel.agree(path and (path if path.exists() else self._made_alike(name, key)))
        model = type(like).from_pretrained(found) if found else make()
        if path and found != path:
            model.save(path, **self.lineage, teacher=teacher, step=str(self.config.steps), key=key)
        return model

    def _made_alike(self, name: str, key: str) -> Path | None:
        """A neighbouring run folder's file of the same hash."""
        for other in sorted(self.folder.parent.glob(f"*/{name}.safetensors")):
            found = {}
            with contextlib.suppress(SafetensorError, OSError), safe_open(other, "pt") as file:
                found = file.metadata() or {}
            if found.get("key") == key:
                print(f"{name}: taken from {other}, which was made alike")
                return other
        return None

    def measured(self, row: str, make: Callable[[], dict], config: Config,
                 *encoders: torch.nn.Module) -> dict:
        """A finished row of the table, made and noted if it is not there yet.

        config and encoders are what it depends on beside the data; where a neighbouring run folder
        has a row with the same hash, that and its classifier are taken.
        """
        path = self.folder and self.folder / "rows.json"
        rows = read_json(path) if path and path.exists() else {}
        key, found = rows.get(row, {}).get("key"), rows.get(row, {}).get("result")
        if path and not found:
            names = tuple(item.name for item in fields(Config)
                          if item.name.startswith(("finetune_", f"{config.method}_")))
            key = self._key(config, ("seed", "method", "dropout", "precision", *names),
                            ("finetune.py",), **self.facts, row=row,
                            encoders=[digest(encoder) for encoder in encoders])
            found = self._neighbours(row, key)
        result = parallel.agree(found) or make()
        if path:
            write_json(rows | {row: {"key": key, "result": result}}, path)
        return result

    def _neighbours(self, row: str, key: str) -> dict | None:
        """The row that another run folder measured alike; its classifier is copied."""
        for other in sorted(self.folder.parent.glob("*/rows.json")):
            found = {}
            with contextlib.suppress(fetch.BadInput, OSError):
                found = read_json(other).get(row, {})
            name = f"finetuned-{row.replace(' ', '-')}.safetensors"
            if found.get("key") == key and other.with_name(name).exists():
                print(f"{row}: taken from {other.parent}, which was made alike")
                with fetch.whole(self.folder / name) as part:
                    shutil.copyfile(other.with_name(name), part)
                return found["result"]
        return None

    def finish(self, data: fetch.Data, rows: list[dict]) -> dict:
        """Write curves.png, drop the checkpoint, and write results.json, which says: finished."""
        results = {"dataset": data.name, "num_classes": len(data.classes),
                   "n_train": len(data.train),
                   "n_test": 0 if data.test is None else len(data.test), "rows": rows}
        if self.folder:
            curves(self.folder)
            (self.folder / "checkpoint.safetensors").unlink(missing_ok=True)
            write_json(results, self.folder / "results.json")
        return results

    def report(self, results: dict) -> None:
        """Print the table of a finished run and where its files are."""
        if self.folder is None:
            return
        if results["rows"]:
            print(f"\n{results['dataset']}: {results['n_train']} training and {results['n_test']} "
                  f"test examples, {results['num_classes']} classes, "
                  f"seed {results['rows'][0]['seed']}\n")
            metric = {"accuracy": "accuracy %", "macro_f1": "macro F1 %", "micro_f1": "micro F1 %"}
            print(f"{'':24}{metric[results['rows'][0]['metric']]:>12}{'gap':>9}{'distance':>11}")
            for row in results["rows"]:
                print(f"{row['method']:24}{100 * row['score']:12.2f}{row['gap']:9.3f}"
                      f"{row['distance']:11.2f}")
            print("\ngap: test loss - training loss; "
                  "distance: from the initial weights θ_init, ‖θ_init - θ‖")
        files = [*sorted(path.name for path in self.folder.glob("*.png")), "results.json",
                 *(path.name for path in self.folder.glob("log.jsonl"))]
        print(f"{self.folder}: {', '.join(files)}")


def curves(folder: Path) -> None:
    """Draw curves.png from log.jsonl: each loss of each stage against its steps."""
    if not (folder / "log.jsonl").exists():
        return  # all of it was taken from neighbours
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    lines = read_lines(folder / "log.jsonl")
    kinds = [kind for kind in ("mae_loss", "distill_loss", "loss")
             if any(kind in line for line in lines)]
    figure, axes = plt.subplots(1, len(kinds), figsize=(4.5 * len(kinds), 3.2), squeeze=False,
                                layout="constrained")
    titles = {"mae_loss": "masked auto-encoding, L1", "distill_loss": "distillation, L2",
              "loss": "fine-tuning, cross-entropy"}
    for axis, kind in zip(axes[0], kinds):
        shown = [line for line in lines if kind in line]
        for stage, round in dict.fromkeys((line["stage"], line["round"]) for line in shown):
            points = [(line["step"], line[kind]) for line in shown
                      if (line["stage"], line["round"]) == (stage, round)]
            axis.plot(*zip(*points), label=f"{stage}, round {round}" if round > 1 else stage)
        axis.set(title=titles[kind], xlabel="step", ylabel="loss")
        axis.legend(fontsize=7)
    with fetch.whole(folder / "curves.png") as part:
        figure.savefig(part, dpi=120, format="png")
    plt.close(figure)


def _tell(message: str) -> None:
    """One line on standard error, whatever file names are in it."""
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
    print(f"error: {plain}", file=sys.stderr)


def program(main: Callable[[], None]) -> None:
    """Run a program's main; what the user can mend is one line on standard error and status 2.

    SIGINT and SIGTERM end it with the line that resumes and status 130 or 143.
    """
    for stream in (sys.stdout, sys.stderr):  # Windows' own encoding lacks θ
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    for number in STOPS:
        signal.signal(number, _stop)
    try:
        with parallel.processes():
            main()
    except fetch.BadInput as error:
        _tell(str(error))
        sys.exit(2)
    except FloatingPointError as error:
        _tell(str(error))
        sys.exit(1)
    except OSError as error:
        _tell(f"{error}; once there is room and leave to write, the same command carries on from "
              "what was saved")
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        if parallel.world() > 1 and re.search("gloo|NCCL|Connection (closed|reset)", str(error)):
            _tell("the processes lost each other; where one ended, its own message tells why "
                  f"({str(error).splitlines()[0]})")
            sys.exit(1)
        short = re.search("out of memory|can't allocate|not enough memory|ALLOC_FAILED", str(error))
        if not short and not isinstance(error, MemoryError):
            raise
        _tell("out of memory; what was saved is kept: the same command with --accumulate 2 needs "
              "less of it, and so do --batch-size and --finetune-batch-size in another --out")
        sys.exit(1)
    except Stopped as error:
        for number in STOPS:
            signal.signal(number, signal.SIG_IGN)
        if not parallel.rank():
            print(f"stopped; to carry on: {_command()}", file=sys.stderr)
        sys.exit(128 + error.args[0])
