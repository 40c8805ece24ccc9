"""Train ``zoo:fashion``: a class-conditional pixel UNet on the 32x32 garments of Fashion-MNIST.

    python -m dqtool.zoo.train_fashion [--iters N] [--out DIR] [--state FILE] [--device cuda]

It needs Debian's package dataset-fashion-mnist. One image in ten is trained without its class, for classifier-free
guidance. With `--state` an interrupted run goes on. The exponential moving average of the weights is what gets stored, in
float16. The stored weights took under two hours of one CPU core with AMX. No GPU has run this yet.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dqtool.core.allocator import keep_freed_memory
from dqtool.models.latent_class import ClassEmbedder, LatentClassPipeline
from dqtool.zoo.data import GARMENTS, fashion
from dqtool.zoo.fitting import PIXEL_SCHEDULE, fit

UNET = {
    "sample_size": 32,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (32, 64, 128),
    "cross_attention_dim": 64,
    "attention_head_dim": 4,  # heads, for this class
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
}
CARD = {"description": "garments, 32x32 pixels, a class through cross-attention", "like": "ADM, class-conditional"}
GUIDANCE = 1.5
"""Weight of classifier-free guidance."""
DROPPED = 0.1
"""Share of images trained without their class."""


class Conditioned(nn.Module):
    """UNet and embedder of classes, trained together."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers import UNet2DConditionModel

        self.unet: Any = UNet2DConditionModel(**UNET)
        self.embedder: Any = ClassEmbedder(classes=len(GARMENTS), dim=UNET["cross_attention_dim"])

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Return the predicted velocity `[N, 1, 32, 32]` of `x` at the timesteps `t`, for labels `[N]`."""
        # The fused kernel's backward pass took a sixth of an iteration for these 64 tokens.
        with sdpa_kernel(SDPBackend.MATH):
            predicted: Tensor = self.unet(x, t, encoder_hidden_states=self.embedder(labels)).sample
        return predicted


def train(args: argparse.Namespace) -> None:
    """Train, and write a diffusers pipeline directory to `args.out` (also every 1000 iterations)."""
    from diffusers import DDIMScheduler

    torch.manual_seed(args.seed)
    images, labels = (each.to(args.device) for each in fashion()["train"])

    def draw(n: int) -> tuple[Tensor, Callable[[Conditioned, Tensor, Tensor], Tensor]]:
        chosen = torch.randint(len(images), (n,)).to(args.device)
        dropped = (torch.rand(n) < DROPPED).to(args.device)
        given = torch.where(dropped, len(GARMENTS), labels[chosen])
        return images[chosen], lambda modules, x, t: modules(x, t, given)

    def save(average: Conditioned) -> None:
        parts = copy.deepcopy(average).cpu().half()
        scheduler = DDIMScheduler(**PIXEL_SCHEDULE)
        pipeline: Any = LatentClassPipeline(parts.unet, None, parts.embedder, scheduler)
        pipeline.save_pretrained(args.out)
        (args.out / "sampling.json").write_text(json.dumps({"guidance": GUIDANCE}, indent=1) + "\n")
        (args.out / "card.json").write_text(json.dumps(CARD, indent=1) + "\n")

    modules = Conditioned().to(args.device)
    sizes = {"iters": args.iters, "batch_size": args.batch_size, "lr": args.lr}
    fit(modules, draw, save, **sizes, state=args.state, half=True)


def main() -> None:
    """Parse the command line and train."""
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "weights" / "fashion")
    parser.add_argument("--state", type=Path, help="file that keeps the run, to go on from")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--iters", type=int, default=10000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
