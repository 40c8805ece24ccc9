"""Train the classifier behind `fd.garments` and `is.garments` (ten minutes on one core).

    python -m dqtool.zoo.train_garment_classifier [--out FILE] [--seed N] [--epochs N]

It sees the 60,000 training images of Fashion-MNIST, mirrored and shifted by up to two pixels.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dqtool.core.allocator import keep_freed_memory
from dqtool.metrics.frechet import statistics
from dqtool.metrics.garments import GARMENTS, GarmentClassifier
from dqtool.zoo.data import fashion
from dqtool.zoo.train_classifier import save


def augment(images: Tensor) -> Tensor:
    """Return images `[N, 1, 32, 32]`, half of them mirrored, all shifted by the same zero to two pixels."""
    mirrored = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(-1), images)
    down, right = torch.randint(-2, 3, (2,)).tolist()
    return mirrored.roll((down, right), (-2, -1))  # the border of two pixels is black


def train(seed: int, epochs: int, batch_size: int = 128, lr: float = 2e-3) -> GarmentClassifier:
    """Train from scratch and set the reference buffers; on one thread, so that a seed always gives the same weights."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    images, labels = fashion()["train"]
    model = GarmentClassifier().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-2)
    batches = len(images) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * batches, pct_start=0.1)
    start = time.time()
    for epoch in range(1, epochs + 1):
        running = 0.0
        for index in torch.randperm(len(images))[: batches * batch_size].split(batch_size):
            loss = F.cross_entropy(model(augment(images[index]))[1], labels[index], label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            running += loss.item()
        eta = (time.time() - start) / epoch * (epochs - epoch)
        print(f"epoch {epoch}/{epochs} loss {running / batches:.4f} eta {eta:.0f} s", file=sys.stderr, flush=True)
    model.eval().requires_grad_(False)
    # The weights are stored in half precision, and the reference belongs to the stored ones.
    for parameter in model.parameters():
        parameter.copy_(parameter.half().float())
    mean, cov = statistics(GARMENTS.features(images, model=model)[0])
    model.reference_mean.copy_(mean)
    model.reference_cov.copy_(cov)
    return model


def main() -> None:
    """Parse the command line, train, save, and print the accuracy on images that were not trained on."""
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=GARMENTS.weights)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=6)
    args = parser.parse_args()
    model = train(args.seed, args.epochs)
    images, labels = fashion()["held_out"]
    right = GARMENTS.features(images, model=model)[1].argmax(1) == labels
    print(f"accuracy {right.double().mean():.4f}", file=sys.stderr)
    for each in model.parameters():
        each.data = each.data.half()
    save(model, args.out)
    print(args.out)


if __name__ == "__main__":
    main()
