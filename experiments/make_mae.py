"""Make weights/tiny-mae.safetensors: a small ViT, masked-auto-encoded on unlabelled drawn pictures.

    python -m experiments.make_mae  # --trial --out FILE: a hundredth of pictures and steps

The pictures are birds of species drawn afresh, none of them one of `toybirds`' 20, and shapes
without birds; no label is read. First comes plain masked auto-encoding. Then each step also
reconstructs the picture from the class token alone: plain MAE leaves that token idle, which 10,000
steps of fine-tuning make up for in the paper and a few hundred steps here would not.
"""
import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch

import distill
import mae
from support import fetch, images, settings
from support.draws import generator
from support.toybirds import unlabelled_birds

TINY = mae.Config(image_size=40, patch_size=8, width=128, depth=4, heads=4, mlp=512,
                  decoder_width=64, decoder_depth=2, decoder_heads=4, decoder_mlp=256, eps=1e-6)
MASK_PROB = 0.5  # 25 patches hold less in common than the paper's 196
BATCH, LR = 64, 1e-3
PHASES = {"draw": 9000, "class token": 3500}  # steps


def reconstruction_loss(model: mae.MAE, x: torch.Tensor, mask: torch.Tensor,
                        alone: bool) -> torch.Tensor:
    """Line 10's loss; with `alone` plus that of every patch predicted from the class token only."""
    loss = model.loss(x, mask).mean()
    if not alone:
        return loss
    plan, blind = (mae.lay_out(z, x.device) for z in (mask, torch.ones_like(mask)))
    hidden = model.encoder.packed(x, plan)[plan.kept % plan.K == 0]  # [B, D] the class tokens'
    predicted = model.decoder(hidden, blind, 5, 5, masked_only=True)  # [B·K, P]
    target = mae.patchify(x, TINY.patch_size).flatten(0, 1)  # [B·K, P]
    mean, variance = target.mean(1, keepdim=True), target.var(1, keepdim=True)  # [B·K, 1]
    return loss + (predicted - (target - mean) / (variance + 1e-6).sqrt()).square().mean()


def train(model: mae.MAE, pixels: torch.Tensor, held_out: torch.Tensor, phase: str,
          steps: int) -> None:
    """One phase: AdamW, warm-up, cosine; tells every 500 steps how it goes on held-out pictures."""
    config = settings.Config(lr=LR, betas=(0.9, 0.95), weight_decay=0.05)
    optimiser = distill.adamw(model, config)
    warmup, start = max(1, steps // 20), time.time()
    for step in range(steps):
        draws = generator(0, phase, step)
        index = torch.randint(len(pixels), (BATCH,), generator=draws)  # [B]
        x = images.normalise(pixels[index])  # [B, 3, S, S]
        x = x.flip(3) if step % 2 else x
        progress = max(0, step - warmup) / (steps - warmup)
        for group in optimiser.param_groups:
            group["lr"] = LR * min(step / warmup, 0.5 + 0.5 * math.cos(math.pi * progress))
        mask = model.draw_mask(x, MASK_PROB, draws)  # [B, K]
        loss = reconstruction_loss(model, x, mask, phase == "class token")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if step % 500 == 499 or step == steps - 1:
            mask = model.draw_mask(held_out, MASK_PROB, generator(0, "held out"))
            with torch.no_grad():
                unseen = model.loss(held_out, mask).mean()
            print(f"{phase}, step {step + 1}/{steps}: loss {loss:.4f}, held-out MAE loss "
                  f"{unseen:.4f}, {time.time() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trial", action="store_true", help="a hundredth of pictures and steps")
    parser.add_argument("--out", type=Path, default=fetch.ROOT / "weights" / "tiny-mae.safetensors")
    args = parser.parse_args()
    share = 100 if args.trial else 1
    pixels = unlabelled_birds(40_000 // share, np.random.default_rng(0))  # seen many times
    held_out = images.normalise(unlabelled_birds(1000, np.random.default_rng(1)))
    model = mae.MAE(TINY, generator(0, "init"))
    for phase, steps in PHASES.items():
        train(model, pixels, held_out, phase, steps // share)
        model.save(args.out, trained_on="unlabelled drawn birds and shapes", phase=phase)


if __name__ == "__main__":
    main()
