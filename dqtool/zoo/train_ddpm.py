"""Train ``zoo:digits-ddpm``: an unconditional pixel UNet on 16x16 digits (`make zoo`).

    python -m dqtool.zoo.train_ddpm [--iters N] [--out DIR]

The network predicts the velocity (v-prediction) under a cosine schedule: with 16x16 images and 20 steps both matter
more than any architecture choice. The exponential moving average of the weights is what gets stored, in float16.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, UNet2DModel

from dqtool.core.allocator import keep_freed_memory
from dqtool.zoo.data import digits

CONFIG = {
    "sample_size": 16,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (24, 48, 96),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 16,
    "norm_num_groups": 8,
}
SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}


def train(out: Path, iters: int, batch_size: int, lr: float, seed: int) -> None:
    """Train from scratch and write a diffusers pipeline directory to ``out`` (also every 1000 iterations)."""
    torch.manual_seed(seed)
    images, _ = digits()["train"]
    model: Any = UNet2DModel(**CONFIG)
    average = copy.deepcopy(model).requires_grad_(False)
    scheduler: Any = DDPMScheduler(**SCHEDULE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-4, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=iters, pct_start=0.05)
    start, running = time.time(), 0.0
    for step in range(1, iters + 1):
        x = images[torch.randint(len(images), (batch_size,))]
        noise = torch.randn_like(x)
        # One timestep per stratum of [0, 1000): lower gradient variance than independent draws.
        t = ((torch.arange(batch_size) + torch.rand(batch_size)) / batch_size * 1000).long()
        loss = F.mse_loss(model(scheduler.add_noise(x, noise, t), t).sample, scheduler.get_velocity(x, noise, t))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(0.999, step / (step + 20))
        with torch.no_grad():
            for a, p in zip(average.parameters(), model.parameters(), strict=True):
                a.lerp_(p, 1 - decay)
        running += loss.item()
        if step % 100 == 0:
            rate = step / (time.time() - start)
            print(f"{step}/{iters} loss {running / 100:.4f} eta {(iters - step) / rate:.0f} s", file=sys.stderr)
            running = 0.0
        if step % 1000 == 0 or step == iters:
            sampler = DDIMScheduler(**SCHEDULE, timestep_spacing="trailing")
            pipeline: Any = DDIMPipeline(copy.deepcopy(average).half(), sampler)
            pipeline.save_pretrained(out)


def main() -> None:
    """Parse the command line and train."""
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "weights" / "digits-ddpm")
    parser.add_argument("--iters", type=int, default=7000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train(args.out, args.iters, args.batch_size, args.lr, args.seed)


if __name__ == "__main__":
    main()
