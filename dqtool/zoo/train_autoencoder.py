"""Train the autoencoder that the latent embedded models share: 16x16 digits to 4x8x8 latents and back (`make zoo`).

python -m dqtool.zoo.train_autoencoder [--iters N] [--out DIR]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from dqtool.core.allocator import keep_freed_memory
from dqtool.zoo.data import digits

CONFIG = {
    "sample_size": 16,
    "in_channels": 1,
    "out_channels": 1,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
    "block_out_channels": (24, 48),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "mid_block_add_attention": False,
}
KL_WEIGHT = 1e-6
"""Weight of the KL term relative to the mean squared error per pixel.

It bounds the latents. A higher weight silences three of the four channels, since the scans have only 64 values.
"""


def train(out: Path, iters: int, batch_size: int, lr: float, seed: int) -> None:
    """Train from scratch and write the component directory to `out`, float16, scaled to unit-variance latents."""
    torch.manual_seed(seed)
    images, _ = digits()["train"]
    held_out, _ = digits()["held_out"]
    model: Any = AutoencoderKL(**CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-4, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=iters, pct_start=0.05)
    start = time.time()
    for step in range(1, iters + 1):
        x = images[torch.randint(len(images), (batch_size,))]
        posterior = model.encode(x).latent_dist
        error = F.mse_loss(model.decode(posterior.sample()).sample, x)
        loss = error + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            rate = step / (time.time() - start)
            print(f"{step}/{iters} mse {error.item():.5f} eta {(iters - step) / rate:.0f} s", file=sys.stderr)
    model.eval().requires_grad_(False)
    latents = model.encode(images).latent_dist.mode()
    model.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    decoded = model.decode(model.encode(held_out).latent_dist.mode()).sample
    held_out_error = F.mse_loss(decoded, held_out).item()
    print(
        f"held-out digits: mse {held_out_error:.5f}; latents by channel: std {latents.std((0, 2, 3)).tolist()}, "
        f"mean {latents.mean((0, 2, 3)).tolist()}",
        file=sys.stderr,
    )
    model.half().save_pretrained(out)


def main() -> None:
    """Parse the command line and train."""
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "weights" / "digits-autoencoder")
    parser.add_argument("--iters", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train(args.out, args.iters, args.batch_size, args.lr, args.seed)


if __name__ == "__main__":
    main()
