"""Run commands over several seeds; write their mean and deviation to results/<name>.md and .json.

    python experiments/repeat.py toybirds --seeds 0 1 2 -- distill.py -- finetune.py --init random

Each command after a `--` is one program with its flags, without --seed. A run that has finished
before is not done again, so an interrupted sweep carries on.
"""
import argparse
import datetime
import json
import platform
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def split_commands(words: list[str]) -> tuple[list[str], list[list[str]]]:
    """What stands before the first `--`, and the commands that the others separate."""
    parts = [[]]
    for word in words:
        if word == "--":
            parts.append([])
        else:
            parts[-1].append(word)
    return parts[0], parts[1:]


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


def main() -> None:
    words, commands = split_commands(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="results/<name>.md and results/<name>.json are written")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    args = parser.parse_args(words)
    if not commands or len(args.seeds) < 2:
        parser.error("give at least one command after `--` and at least two seeds")
    results = {}
    for seed in args.seeds:
        for number, (program, *flags) in enumerate(commands):
            out = ROOT / "runs" / args.name / f"{number}-seed{seed}"
            command = [program, *flags, "--seed", str(seed), "--out", str(out)]
            print("+ python", shlex.join(command), flush=True)
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
            found = json.loads((out / "results.json").read_text(encoding="utf-8"))
            for row in found["rows"]:
                label = f"{row['method']} (`{shlex.join([program, *flags])}`)"
                results.setdefault(label, []).append(row)
    about = (f"`python experiments/repeat.py {shlex.join(sys.argv[1:])}`\n\n{found['dataset']}: "
             f"{found['n_train']} training and {found['n_test']} test examples, "
             f"{found['num_classes']} classes. Mean ± sample standard deviation over seeds "
             f"{args.seeds}. {machine()}.")
    folder = ROOT / "results"
    folder.mkdir(exist_ok=True)
    page = f"# {args.name}\n\n{about}\n\n{table(results)}\n"
    (folder / f"{args.name}.md").write_text(page, encoding="utf-8")
    record = json.dumps({"about": about, "results": results}, indent=1) + "\n"
    (folder / f"{args.name}.json").write_text(record, encoding="utf-8")
    print(f"\n{table(results)}\n\nwrote results/{args.name}.md")


if __name__ == "__main__":
    main()
