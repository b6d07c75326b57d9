"""Make weights/tiny-mae.safetensors: a small ViT, masked-auto-encoded on unlabelled drawn pictures.

    python -m experiments.make_mae

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


def reconstruction_loss(model: mae.MAE, x: torch.Tensor, mask: torch.Tensor,
                        alone: bool) -> torch.Tensor:
    """Line 10's loss; with `alone` plus that of every patch predicted from the class token only."""
    if not alone:
        return model.loss(x, mask).mean()
    hidden = model.encoder(x, mask)  # [B, 1+K, D]
    error = (model.decoder(hidden, mask, 5, 5) - model.target(x, True)).square().mean(2)  # [B, K]
    masked = (error * mask).sum(1) / mask.sum(1).clamp(min=1)  # [B]
    cls = torch.cat([hidden[:, :1], torch.zeros_like(hidden[:, 1:])], 1)  # [B, 1+K, D]
    predicted = model.decoder(cls, torch.ones_like(mask), 5, 5)  # [B, K, P]
    return masked.mean() + (predicted - model.target(x, True)).square().mean()


def train(model: mae.MAE, pixels: torch.Tensor, held_out: torch.Tensor, steps: int, alone: bool,
          args: argparse.Namespace) -> None:
    """One phase: AdamW, warm-up, cosine; saves what it has every 500 steps."""
    config = settings.Config(lr=args.lr, betas=(0.9, 0.95), weight_decay=0.05)
    optimiser = distill.adamw(model, config)
    phase, warmup, start = "class token" if alone else "draw", steps // 20, time.time()
    for step in range(steps):
        draws = generator(args.seed, phase, step)
        index = torch.randint(len(pixels), (args.batch_size,), generator=draws)
        x = images.normalise(pixels[index])
        x = x.flip(3) if step % 2 else x
        progress = max(0, step - warmup) / (steps - warmup)
        for group in optimiser.param_groups:
            group["lr"] = args.lr * min(step / warmup, 0.5 + 0.5 * math.cos(math.pi * progress))
        loss = reconstruction_loss(model, x, model.draw_mask(x, MASK_PROB, draws), alone)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if step % 500 == 499 or step == steps - 1:
            mask = model.draw_mask(held_out, MASK_PROB, generator(args.seed, "held out"))
            with torch.no_grad():
                unseen = model.loss(held_out, mask).mean()
            print(f"step {step + 1}/{steps}: loss {loss:.4f}, held-out MAE loss {unseen:.4f}, "
                  f"{time.time() - start:.0f} s", flush=True)
            model.save(args.out, trained_on="unlabelled drawn birds and shapes", phase=phase,
                       steps=str(step + 1), seed=str(args.seed), held_out_loss=f"{unseen:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain-steps", type=int, default=9000)
    parser.add_argument("--class-token-steps", type=int, default=3500)
    parser.add_argument("--images", type=int, default=40000, help="pictures drawn, seen many times")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=fetch.ROOT / "weights" / "tiny-mae.safetensors")
    args = parser.parse_args()
    pixels = unlabelled_birds(args.images, np.random.default_rng(args.seed))
    held_out = images.normalise(unlabelled_birds(1000, np.random.default_rng(args.seed + 1)))
    model = mae.MAE(TINY, generator(args.seed, "init"))
    train(model, pixels, held_out, args.plain_steps, False, args)
    train(model, pixels, held_out, args.class_token_steps, True, args)


if __name__ == "__main__":
    main()
