"""The choice of settings for the tiny models, on parts of training sets: test data play no part.

    DATA_DIR=/path/to/datasets python -m experiments.tune image  # paper.py's laptop size
    DATA_DIR=/path/to/datasets python -m experiments.tune text
    python -m experiments.tune pydocs                            # fine-tuning's default for texts
    python -m experiments.tune toybirds                          # is there something to learn?

The first three try one setting after the other, each with those before it as chosen, and score on a
seeded tenth of each training set: fine-tuning's learning rate by plain fine-tuning; pre-training's,
which is the student's too, by further pre-training; what a baseline adds by that baseline. Writes
results/tuning-<name>.md and .json. The last fine-tunes from the bundled weights and from random
ones, on validation pictures of their own; pre-training played no part. Writes toybirds-tuning.md.
"""
import argparse
import statistics
from dataclasses import replace

import torch

import baselines
import distill
import finetune
from experiments import repeat
from experiments.paper import MODELS
from support import program, settings, toybirds
from support.data import Data, load
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


def begin(dataset: str, **chosen: object) -> tuple[torch.nn.Module, Data, settings.Config]:
    """The tiny model, a data set and settings that are not final yet."""
    config = program.located(settings.Config(dataset=dataset, init="tiny", seed=SEED, **chosen))
    model = program.load_model(MODELS[config.modality], config)
    return model, load(config, model), config


def hold_out(data: Data, seed: int) -> Data:
    """A seeded tenth of the training set in the test set's place, out of the training set."""
    order = torch.randperm(len(data.train), generator=generator(seed, "held out"))
    held, rest = order[:len(order) // 10].sort().values, order[len(order) // 10:].sort().values
    take = data.train.__getitem__ if torch.is_tensor(data.train) else data.train.take
    return replace(data, train=take(rest), train_labels=data.train_labels[rest],
                   test=take(held), test_labels=data.train_labels[held])


def trial(dataset: str, chosen: dict, method: str) -> float:
    """The score on the held-out tenth, by the data set's own metric, 0 to 1."""
    model, data, config = begin(dataset, **chosen)
    data = hold_out(data, SEED)
    config, start = settings.final(config, model, len(data.train)), model
    if method == "further pre-training":
        start = distill.further_pretrain(model, data.train, config)
    return finetune.fine_tune(start, data, config, Run(), method, model,
                              baselines.METHODS.get(method, finetune.PLAIN))["score"]


def tune(name: str) -> str:
    """All trials of a modality, one setting after the other; returns the page."""
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
            cells = " | ".join(f"{100 * score:.1f}" for score in scores[value].values())
            mark = " **chosen**" if value == chosen[setting] else ""
            lines.append(f"| `{program.flag(setting)}` | {method} | {value:g}{mark} | {cells} |\n")
    write_json({"chosen": chosen, "tried": tried}, repeat.ROOT / "results" / f"tuning-{name}.json")
    budget = ", ".join(f"{setting} {value}" for setting, value in BUDGET[name].items())
    heads = "".join(f" {dataset}, % |" for dataset in DATASETS[name])
    return (f"# Settings: {name}\n\n`python -m experiments.tune {name}`\n\nScores on a seeded "
            f"tenth of the training sets (seed {SEED}, n = 1 each), which was left out of "
            f"training; {budget or 'default steps'}. {repeat.machine()}.\n\n"
            f"| setting | scored by | value |{heads}\n"
            f"|---|---|---|{'---|' * len(DATASETS[name])}\n{''.join(lines)}")


def from_bundled_and_random() -> str:
    """Fine-tuning on toybirds from two starts, five seeds each; returns the page."""
    model, data, config = begin("toybirds")
    pixels, labels = toybirds.toybirds("validation", 50)
    data, results = replace(data, test=pixels, test_labels=labels), {}
    config, seeds = settings.final(config, model, len(data.train)), list(range(SEED, SEED + 5))
    for seed in seeds:
        scratch = MODELS["image"](model.config, generator(seed, "init"))
        for label, start in (("bundled weights", model), ("random weights", scratch)):
            row = finetune.fine_tune(start, data, replace(config, seed=seed), Run(), "fine-tuning")
            results.setdefault(f"fine-tuning from {label}", []).append(row)
            print(label, row, flush=True)
    return (f"# toybirds, validation pictures\n\n`python -m experiments.tune toybirds`\n\n"
            f"{len(data.train)} training pictures, {config.finetune_steps} steps of "
            f"{config.finetune_batch_size}, learning rate {config.finetune_lr:g}; "
            f"seeds {seeds}. {repeat.machine()}.\n\n{repeat.table(results)}\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=(*TRIALS, "toybirds"))
    name = parser.parse_args().name
    text = from_bundled_and_random() if name == "toybirds" else tune(name)
    path = "toybirds-tuning.md" if name == "toybirds" else f"tuning-{name}.md"
    (repeat.ROOT / "results" / path).write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    program.run(main)
