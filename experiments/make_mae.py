"""Make weights/tiny-mae.safetensors: a small ViT, masked-auto-encoded on unlabelled drawn pictures.

    python experiments/make_mae.py

The pictures are birds of species drawn afresh, none of them one of `toybirds`' 20, and shapes
without birds. No label is read. The run's seed, steps and last losses go into the file's metadata.
"""
import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mae  # noqa: E402
from support import fetch, images, run  # noqa: E402

TINY = mae.Config(image_size=40, patch_size=8, width=128, depth=4, heads=4, mlp=512, eps=1e-6,
                  decoder_width=64, decoder_depth=2, decoder_heads=4, decoder_mlp=256)

MASK_PROB = 0.5  # 25 patches hold less in common than the paper's 196


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--images", type=int, default=40000,
                        help="pictures drawn, each seen many times")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=fetch.ROOT / "weights" / "tiny-mae.safetensors")
    args = parser.parse_args()
    pixels = images.unlabelled_birds(args.images, np.random.default_rng(args.seed))
    held_out = images.normalise(images.unlabelled_birds(1000, np.random.default_rng(args.seed + 1)))
    model = mae.MAE(TINY, run.generator(args.seed, "init"))
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.05},
              # or LayerNorms shrink
              {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    warmup, start, lately = args.steps // 20, time.time(), []
    for step in range(args.steps):
        draws = run.generator(args.seed, "draw", step)
        index = torch.randint(len(pixels), (args.batch_size,), generator=draws)
        x = images.normalise(pixels[index])
        if step % 2:
            x = x.flip(3)
        progress = (step - warmup) / (args.steps - warmup)
        for group in optimiser.param_groups:
            group["lr"] = args.lr * min(step / warmup, 0.5 + 0.5 * np.cos(np.pi * max(progress, 0)))
        loss = model.loss(x, model.draw_mask(x, MASK_PROB, draws)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        lately.append(loss.detach())
        if step % 200 == 199:
            model.eval()
            with torch.no_grad():
                mask = model.draw_mask(held_out, MASK_PROB, run.generator(args.seed, "held out"))
                unseen = model.loss(held_out, mask).mean()
            model.train()
            seen = torch.stack(lately[-200:]).mean()
            print(f"step {step + 1}/{args.steps}: MAE loss {seen:.4f}, held out {unseen:.4f}, "
                  f"{time.time() - start:.0f} s", flush=True)
            model.save(args.out, trained_on="unlabelled drawn birds and shapes",
                       seed=str(args.seed), steps=str(step + 1), held_out_loss=f"{unseen:.4f}")


if __name__ == "__main__":
    main()
