"""Run commands over several seeds; write their mean and deviation to results/<name>.md and .json.

    python -m experiments.repeat toybirds --seeds 0 1 2 -- distill.py -- finetune.py --init random

Each command after a `--` is one program with its flags, without --seed. A run that has finished
before is not done again, so an interrupted sweep carries on.
"""
import argparse
import datetime
import platform
import shlex
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import torch

from support import program
from support.fetch import ROOT
from support.run import read_json, write_json


def cell(values: list[float], digits: int) -> str:
    """Mean ± sample standard deviation."""
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def table(results: dict[str, list[dict]]) -> str:
    """The Markdown table of results: label -> the rows of all seeds."""
    lines = ["| run | metric | score, % | train loss | test loss | gap | distance | n | "
             "every seed's score |",
             "|---|---|---|---|---|---|---|---|---|"]
    for label, rows in results.items():
        scores = [100 * row["score"] for row in rows]
        columns = [cell([row[name] for row in rows], 3)
                   for name in ("train_loss", "test_loss", "gap")]
        lines.append(f"| {label} | {rows[0]['metric'].replace('_', ' ')} | {cell(scores, 2)} | "
                     f"{' | '.join(columns)} | {cell([row['distance'] for row in rows], 2)} | "
                     f"{len(rows)} | {', '.join(f'{score:.1f}' for score in scores)} |")
    return "\n".join(lines)


def page(name: str, record: dict) -> str:
    """The Markdown page of a record, from nothing but the record."""
    return f"# {name}\n\n{record['about']}\n\n{table(record['results'])}\n"


def machine() -> str:
    """Processor, versions and date, as they belong beside every figure."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), name)
    cores = torch.get_num_threads()
    if torch.cuda.is_available():
        name += f", {torch.cuda.get_device_name()}"
    return (f"{cores} core{'s' * (cores > 1)} of {name}, torch {torch.__version__}, Python "
            f"{platform.python_version()}, {datetime.date.today()}")


def carry_out(commands: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Run commands, the words after `python`, one after the other; returns those that failed.

    The last word of each is its folder. What reads from a failed command's folder fails unrun, as
    anything may lie there.
    """
    failed = []
    for number, words in enumerate(commands, 1):
        print(f"[{number}/{len(commands)}] python {shlex.join(words)}", flush=True)
        if any(word.startswith(f"{bad[-1]}/") for bad in failed for word in words):
            why = "another that failed was to make its teacher"
        elif status := wait_for([sys.executable, *words]):
            why = f"status {status}"
        else:
            continue
        print(f"failed, {why}: python {shlex.join(words)}", file=sys.stderr)
        failed.append(words)
    return failed


def wait_for(command: list[str]) -> int:
    """The status that a program ends with; it is stopped with us, and saves what it has."""
    child = subprocess.Popen(command, cwd=ROOT)
    try:
        return child.wait()
    except BaseException:
        child.terminate()
        child.wait()
        raise


def publish(name: str, record: dict, text: str, cells: Callable[[dict], Counter]) -> Path:
    """Write <name>.json and .md into results/, or beside the runs where that would lose numbers.

    cells counts the numbers of each cell of a record's page: what the page in results/ has more of
    than this record would be lost there. Returns the page's path.
    """
    there = ROOT / "results" / f"{name}.json"
    lost = cells(read_json(there)) - cells(record) if there.exists() else Counter()
    path = ROOT / ("runs" if lost else "results") / f"{name}.md"
    write_json(record, path.with_suffix(".json"))
    path.write_text(text, encoding="utf-8")
    note = f", as results/{name}.md has {lost.total()} numbers that this one lacks" if lost else ""
    print(f"{text}\nwrote {path.relative_to(ROOT)}{note}")
    return path


def main() -> None:
    parts = groupby(sys.argv[1:], "--".__eq__)  # what is one, and what stands between two
    own, *commands = [list(part) for separates, part in parts if not separates] or [[]]
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="results/<name>.md and results/<name>.json are written")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    args = parser.parse_args(own)
    if not commands or len(args.seeds) < 2:
        parser.error("give at least one command after `--` and at least two seeds")
    runs = [(words, (*words, "--seed", str(seed), "--out", f"runs/{args.name}/{number}-seed{seed}"))
            for seed in args.seeds for number, words in enumerate(commands)]
    if carry_out([run for _, run in runs]):
        sys.exit(1)
    results = {}
    for words, run in runs:
        found = read_json(ROOT / run[-1] / "results.json")
        for row in found["rows"]:
            results.setdefault(f"{row['method']} (`{shlex.join(words)}`)", []).append(row)
    about = (f"`python -m experiments.repeat {shlex.join(sys.argv[1:])}`\n\n{found['dataset']}: "
             f"{found['n_train']} training and {found['n_test']} test examples, "
             f"{found['num_classes']} classes. Mean ± sample standard deviation over seeds "
             f"{args.seeds}. {machine()}.")
    record = {"about": about, "results": results}
    publish(args.name, record, page(args.name, record), lambda record: Counter(
        {label: len(rows) for label, rows in record["results"].items()}))


if __name__ == "__main__":
    program.run(main)
