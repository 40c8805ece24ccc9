"""Train ``zoo:digits-ddpm``: an unconditional pixel UNet on 16x16 digits (`make zoo`).

    python -m dqtool.zoo.train_ddpm [--iters N] [--out DIR]

The exponential moving average of the weights is what gets stored, in float16.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import Tensor

from dqtool.core.allocator import keep_freed_memory
from dqtool.zoo.data import digits
from dqtool.zoo.fitting import PIXEL_SCHEDULE, fit

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


def train(out: Path, iters: int, batch_size: int, lr: float, seed: int) -> None:
    """Train from scratch and write a diffusers pipeline directory to ``out`` (also every 1000 iterations)."""
    torch.manual_seed(seed)
    images, _ = digits()["train"]
    model: Any = UNet2DModel(**CONFIG)

    def draw(n: int) -> tuple[Tensor, Callable[[Any, Tensor, Tensor], Tensor]]:
        return images[torch.randint(len(images), (n,))], lambda network, x, t: network(x, t).sample

    def save(average: Any) -> None:
        pipeline: Any = DDIMPipeline(copy.deepcopy(average).half(), DDIMScheduler(**PIXEL_SCHEDULE))
        pipeline.save_pretrained(out)

    fit(model, draw, save, iters=iters, batch_size=batch_size, lr=lr)


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
