"""Train the classifier behind `fd.garments` and `is.garments` (ten minutes on one core).

    python -m dqtool.zoo.train_garment_classifier [--out FILE] [--seed N] [--epochs N]

It sees the 60,000 training images of Fashion-MNIST, mirrored and shifted by up to two pixels.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dqtool.core.allocator import keep_freed_memory
from dqtool.metrics.garments import GARMENTS, GarmentClassifier
from dqtool.zoo.data import fashion
from dqtool.zoo.fitting_classifiers import fit, save, set_reference


def augment(images: Tensor) -> Tensor:
    """Return images `[N, 1, 32, 32]`, half of them mirrored, all shifted by the same zero to two pixels."""
    mirrored = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(-1), images)
    down, right = torch.randint(-2, 3, (2,)).tolist()
    return mirrored.roll((down, right), (-2, -1))  # the border of two pixels is black


def train(seed: int, epochs: int, batch_size: int = 128, lr: float = 2e-3) -> GarmentClassifier:
    """Train from scratch and set the reference buffers."""
    images, labels = fashion()["train"]

    def loss_of(model: GarmentClassifier, index: Tensor) -> Tensor:
        return F.cross_entropy(model(augment(images[index]))[1], labels[index], label_smoothing=0.05)

    model = fit(GarmentClassifier, loss_of, len(images), seed=seed, epochs=epochs, batch_size=batch_size, lr=lr)
    # The weights are stored in half precision, and the reference belongs to the stored ones.
    for parameter in model.parameters():
        parameter.copy_(parameter.half().float())
    set_reference(GARMENTS, model, images)
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
