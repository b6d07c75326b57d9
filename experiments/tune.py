"""The choice of settings for the tiny models, on parts of training sets: test data play no part.

    DATA_DIR=/path/to/datasets python -m experiments.tune image  # paper.py's laptop size
    DATA_DIR=/path/to/datasets python -m experiments.tune text
    python -m experiments.tune pydocs                            # fine-tuning's default for texts

One setting after the other is tried, each with those before it as chosen, and scored on a seeded
tenth of each training set: fine-tuning's learning rate by plain fine-tuning; pre-training's, which
is the student's too, by further pre-training; what a baseline adds by that baseline. Writes
results/tuning-<name>.md and .json.
"""
import argparse
import statistics
from dataclasses import replace

import torch

import baselines
import distill
import finetune
from experiments import pages, runs
from support import fetch, program, settings
from support.data import Data
from support.draws import generator
from support.run import Run, write_json

SEED = 100  # of the tenth and of the trials; the tables use 0, 1, …
DATASETS = {"image": ("cub", "flower"), "text": ("scierc", "twitter_emotion"),
            "pydocs": ("pydocs",)}
# what a laptop's time allows was set first, and is not tuned
BUDGET = {"image": dict(steps=150, batch_size=64, finetune_steps=150, finetune_batch_size=32),
          "text": dict(steps=30, batch_size=32, finetune_steps=250, finetune_batch_size=16),
          "pydocs": {}}
TRIALS = {"image": dict(finetune_lr=(5e-4, 1e-3, 2e-3), lr=(5e-4, 1e-3, 2e-3),
                        recadam_t0=(4, 40), mars_radius=(0.5, 2.0), r3f_eps=(0.1, 0.3)),
          "text": dict(finetune_lr=(5e-4, 1e-3, 2e-3), lr=(2e-4, 5e-4),
                       recadam_t0=(4, 40), mars_radius=(0.5, 2.0), r3f_eps=(0.01, 0.1)),
          "pydocs": dict(finetune_lr=(5e-4, 1e-3, 2e-3))}
SCORED_BY = {"finetune_lr": "fine-tuning", "lr": "further pre-training", "recadam_t0": "RecAdam",
             "mars_radius": "MARS", "r3f_eps": "R3F"}


def hold_out(data: Data, seed: int) -> Data:
    """A seeded tenth of the training set in the test set's place, out of the training set."""
    order = torch.randperm(len(data.train), generator=generator(seed, "held out"))
    held, rest = order[:len(order) // 10].sort().values, order[len(order) // 10:].sort().values
    take = data.train.__getitem__ if torch.is_tensor(data.train) else data.train.take
    return replace(data, train=take(rest), train_labels=data.train_labels[rest],
                   test=take(held), test_labels=data.train_labels[held])


def trial(dataset: str, chosen: dict, method: str) -> float:
    """The score on the held-out tenth, by the data set's own metric, 0 to 1."""
    model, data, config = runs.begin(dataset, seed=SEED, **chosen)
    data, start = hold_out(data, SEED), model
    config = settings.final(config, model, len(data.train))
    if method == "further pre-training":
        start = distill.further_pretrain(model, data.train, config)
    return finetune.fine_tune(start, data, config, Run(), method, model,
                              baselines.METHODS.get(method, finetune.PLAIN))["score"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=TRIALS)
    name = parser.parse_args().name
    chosen, tried, lines = dict(BUDGET[name]), [], []
    for setting, values in TRIALS[name].items():
        method, scores = SCORED_BY[setting], {}
        for value in values:
            scores[value] = {dataset: trial(dataset, chosen | {setting: value}, method)
                             for dataset in DATASETS[name]}
            tried.append({"setting": setting, "method": method, "value": value,
                          "scores": scores[value]})
            print(tried[-1], flush=True)
        chosen[setting] = max(values, key=lambda value: statistics.mean(scores[value].values()))
        for value in values:
            mark = " **chosen**" * (value == chosen[setting])
            lines.append([f"`{program.flag(setting)}`", method, f"{value:g}{mark}",
                          *(f"{100 * score:.1f}" for score in scores[value].values())])
    budget = ", ".join(f"{setting} {value}" for setting, value in BUDGET[name].items())
    heads = ["setting", "scored by", "value", *(f"{dataset}, %" for dataset in DATASETS[name])]
    text = [f"# Settings: {name}", "", f"`python -m experiments.tune {name}`", "",
            f"Scores on a seeded tenth of the training sets (seed {SEED}, n = 1 each), which was "
            f"left out of training; {budget or 'default steps'}. {runs.machine()}.", "",
            *pages.grid(heads, lines), ""]
    path = fetch.ROOT / "results" / f"tuning-{name}.md"
    write_json({"chosen": chosen, "tried": tried}, path.with_suffix(".json"))
    path.write_text("\n".join(text), encoding="utf-8")


if __name__ == "__main__":
    program.run(main)
