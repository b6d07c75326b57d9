"""The choice of toybirds' settings: fine-tuning from the bundled weights against random ones.

    python experiments/tune_toybirds.py

Scored on validation pictures drawn apart from the test set, seeds 100-104, with plain fine-tuning
and training from scratch alone: further pre-training and self-distillation played no part in the
choice. Flags change the recipe; the defaults are what was chosen, and they are written to
results/toybirds-tuning.md.
"""
import argparse
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
import repeat

import finetune
import mae
from support import images, run, settings


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101, 102, 103, 104])
    parser.add_argument("--steps", type=int, help="of fine-tuning")
    parser.add_argument("--lr", type=float, help="of fine-tuning")
    args = parser.parse_args()
    model = mae.MAE.from_pretrained("tiny")
    config = settings.check(settings.Config(finetune_steps=args.steps, finetune_lr=args.lr))
    data = run.load_data(config, model)
    pixels, labels = images.toybirds("validation", 50)
    data = replace(data, test=pixels, test_labels=labels)
    config, results = settings.fill(config, model, len(data.train)), {}
    for seed in args.seeds:
        scratch = mae.MAE(model.config, run.generator(seed, "init"))
        for label, start in (("bundled weights", model), ("random weights", scratch)):
            row = finetune.fine_tune(start, data, replace(config, seed=seed), run.Run(),
                                     "fine-tuning")
            results.setdefault(f"fine-tuning from {label}", []).append(row)
            print(label, row, flush=True)
    text = (f"# toybirds, validation pictures\n\n`python experiments/tune_toybirds.py`\n\n"
            f"{len(data.train)} training pictures, {config.finetune_steps} steps of "
            f"{config.finetune_batch_size}, learning rate {config.finetune_lr:g}; "
            f"seeds {args.seeds}. {repeat.machine()}.\n\n{repeat.table(results)}\n")
    print(text)
    if not sys.argv[1:]:
        (ROOT / "results" / "toybirds-tuning.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
