"""The choice of paper.py's laptop-size settings, on a held-out tenth of the training sets.

    DATA_DIR=/path/to/datasets python experiments/tune.py image
    DATA_DIR=/path/to/datasets python experiments/tune.py text
    python experiments/tune.py pydocs                     # fine-tuning's default for tiny texts

One setting after the other, each with those before it as chosen: fine-tuning's learning rate by
plain fine-tuning; then pre-training's by further pre-training, and the student's is the same; then
what each baseline adds, by that baseline. A value's score is its mean over the data sets. Test data
play no part. Writes results/tuning-<modality>.md and .json.
"""
import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
import repeat

import distill
import finetune
import mae
import mlm
from support import fetch, run, settings

SEED = 100  # of the tenth and of the trials; the tables use 0, 1, …
DATASETS = {"image": ("cub", "flower"), "text": ("scierc", "twitter_emotion"),
            "pydocs": ("pydocs",)}
# what a laptop's time allows was set first, and is not tuned
BUDGET = {"image": dict(steps=150, batch_size=64, finetune_steps=150, finetune_batch_size=32),
          "text": dict(steps=30, batch_size=32, finetune_steps=250, finetune_batch_size=16),
          "pydocs": {}}
# (setting, the method that is scored, its values)
TRIALS = {
    "image": (("finetune_lr", "finetune", (5e-4, 1e-3, 2e-3)),
              ("lr", "further", (5e-4, 1e-3, 2e-3)),
              ("recadam_t0", "recadam", (4, 40)),
              ("mars_radius", "mars", (0.5, 2.0)),
              ("r3f_eps", "r3f", (0.1, 0.3))),
    "text": (("finetune_lr", "finetune", (5e-4, 1e-3, 2e-3)),
             ("lr", "further", (2e-4, 5e-4)),
             ("recadam_t0", "recadam", (4, 40)),
             ("mars_radius", "mars", (0.5, 2.0)),
             ("r3f_eps", "r3f", (0.01, 0.1))),
    "pydocs": (("finetune_lr", "finetune", (5e-4, 1e-3, 2e-3)),)}


def hold_out(data: fetch.Data, seed: int) -> fetch.Data:
    """A seeded tenth of the training set in the test set's place, out of the training set."""
    order = torch.randperm(len(data.train), generator=run.generator(seed, "held out"))
    held, rest = order[:len(order) // 10].sort().values, order[len(order) // 10:].sort().values
    take = data.train.__getitem__ if torch.is_tensor(data.train) else data.train.take
    return replace(data, train=take(rest), train_labels=data.train_labels[rest],
                   test=take(held), test_labels=data.train_labels[held])


def trial(dataset: str, chosen: dict, method: str) -> float:
    """The score on the held-out tenth, by the data set's own metric, 0 to 1."""
    config = settings.check(settings.Config(
        dataset=dataset, init="tiny", seed=SEED,
        method="finetune" if method == "further" else method, **chosen))
    model = run.load_model(mlm.MLM if config.modality == "text" else mae.MAE, config)
    data = hold_out(run.load_data(config, model), SEED)
    config = settings.fill(config, model, len(data.train))
    if method == "further":
        model = distill.further_pretrain(model, data.train, config)
    return finetune.fine_tune(model, data, config, run.Run(), method)["score"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modality", choices=TRIALS)
    modality = parser.parse_args().modality
    chosen, tried, lines = dict(BUDGET[modality]), [], []
    for name, method, values in TRIALS[modality]:
        scores = {}
        for value in values:
            scores[value] = [trial(dataset, chosen | {name: value}, method)
                             for dataset in DATASETS[modality]]
            tried.append({"setting": name, "method": method, "value": value,
                          "scores": dict(zip(DATASETS[modality], scores[value]))})
            print(tried[-1], flush=True)
        chosen[name] = max(values, key=lambda value: statistics.mean(scores[value]))
        for value in values:
            cells = " | ".join(f"{100 * score:.1f}" for score in scores[value])
            mark = " **chosen**" if value == chosen[name] else ""
            lines.append(f"| `--{name.replace('_', '-')}` | {method} | {value:g}{mark} | {cells} |")
    heads = " | ".join(f"{dataset}, %" for dataset in DATASETS[modality])
    budget = ", ".join(f"{name} {value}" for name, value in BUDGET[modality].items())
    text = (f"# Settings: {modality}\n\n"
            f"`python experiments/tune.py {modality}`\n\nScores on a seeded tenth of the training "
            f"sets (seed {SEED}, n = 1 each), which was left out of training; "
            f"{budget or 'default steps'}. {repeat.machine()}.\n\n"
            f"| setting | scored by | value | {heads} |\n"
            f"|---|---|---|{'---|' * len(DATASETS[modality])}\n" + "\n".join(lines) + "\n")
    folder = ROOT / "results"
    (folder / f"tuning-{modality}.md").write_text(text, encoding="utf-8")
    run.write_json({"chosen": chosen, "tried": tried}, folder / f"tuning-{modality}.json")
    print(text)


if __name__ == "__main__":
    main()
