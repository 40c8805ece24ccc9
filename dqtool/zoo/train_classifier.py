"""Train the digit classifier behind `fd.digits` and `is.digits` (about two minutes on one core).

    python -m dqtool.zoo.train_classifier [--out FILE] [--seed N] [--epochs N]

It sees the 1347 training digits under small affine changes and, as a tenth of every batch, things that are no digits
(noise, blobs, mixtures, shuffled digits) whose target is the uniform distribution: without them a network reads almost
anything as some digit with confidence, and "read with confidence above 0.9" would say nothing about a sample.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dqtool.metrics.classifiers import CONFIDENT
from dqtool.metrics.digits import DIGITS, DigitClassifier
from dqtool.metrics.frechet import frechet_distance, statistics
from dqtool.metrics.inception_score import inception_score
from dqtool.zoo.data import digits
from dqtool.zoo.fitting_classifiers import fit, save, set_reference

__all__ = ["train"]


def augment(images: Tensor) -> Tensor:
    """Return images `[N, 1, 16, 16]` shifted by up to 1.5 px, rotated by up to 10 degrees, scaled by up to 10 %, with
    slight noise."""
    count, size = len(images), images.shape[-1]
    angle = (torch.rand(count) * 2 - 1) * math.radians(10)
    scale = 1 + (torch.rand(count) * 2 - 1) * 0.1
    shift = (torch.rand(count, 2) * 2 - 1) * 1.5 * 2 / size  # affine_grid measures in half widths
    cos, sin = angle.cos() / scale, angle.sin() / scale
    theta = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    # grid_sample pads with 0, which is mid-grey in [-1, 1]: shift so that the padding is the black background.
    moved = F.grid_sample(images + 1, grid, mode="bilinear", align_corners=False) - 1
    return (moved + torch.randn_like(moved) * torch.rand(count, 1, 1, 1) * 0.1).clamp(-1, 1)


def non_digits(images: Tensor, labels: Tensor, count: int) -> Tensor:
    """Return `count` images `[count, 1, 16, 16]` in [-1, 1] that show no digit, of five kinds drawn evenly."""
    size = images.shape[-1]
    one = torch.randint(len(images), (count,))
    # A partner of another class, so that a mixture is ambiguous.
    two = torch.multinomial((labels[one][:, None] != labels[None]).float(), 1)[:, 0]
    a, b = images[one], images[two]
    noise = torch.randn(count, 1, size, size) * (0.2 + 1.3 * torch.rand(count, 1, 1, 1)) - torch.rand(count, 1, 1, 1)
    coarse = F.interpolate(torch.rand(count, 1, 5, 5) * 3 - 2, size=size, mode="bicubic")  # blobs of digit-like scale
    mixture = F.avg_pool2d((a + b) / 2, 3, stride=1, padding=1, count_include_pad=False)
    shuffled = torch.stack([x.flatten()[torch.randperm(size * size)].view_as(x) for x in a])
    # Strokes of the right kind that form no digit. (Two halves of digits spliced together won't do: they often form a
    # third one, and as counter-examples they cost a tenth of the confidence on real digits.)
    patches = F.unfold(a, 4, stride=4)  # [count, 16, 16]
    order = torch.rand(count, patches.shape[2]).argsort(1)[:, None].expand_as(patches)
    patched = F.fold(patches.gather(2, order), size, 4, stride=4)
    kinds = torch.stack([noise, coarse, mixture, shuffled, patched])
    return kinds[torch.randint(len(kinds), (count,)), torch.arange(count)].clamp(-1, 1)


def train(seed: int, epochs: int, batch_size: int = 64, lr: float = 2e-3) -> DigitClassifier:
    """Train from scratch and set the reference buffers."""
    images, labels = digits()["train"]

    def loss_of(model: DigitClassifier, index: Tensor) -> Tensor:
        targets = F.one_hot(labels[index], 10).float()
        garbage = non_digits(images, labels, batch_size // 9)
        inputs = torch.cat([augment(images[index]), garbage])
        targets = torch.cat([targets, torch.full((len(garbage), 10), 0.1)])
        return F.cross_entropy(model(inputs)[1], targets)

    model = fit(
        DigitClassifier, loss_of, len(images), seed=seed, epochs=epochs, batch_size=batch_size, lr=lr, told_every=10
    )
    set_reference(DIGITS, model, images)
    return model


def judge(model: DigitClassifier) -> None:
    """Print accuracy, confidence and both scores on real digits, and the confidence on images without a digit."""
    data = digits()
    generator = torch.Generator().manual_seed(0)
    some = torch.randperm(len(data["train"][0]), generator=generator)[:450]
    splits = {
        "train": data["train"],
        "450 of train": tuple(x[some] for x in data["train"]),
        "held out": data["held_out"],
    }
    for name, (images, labels) in splits.items():
        hidden, logits = DIGITS.features(images, model=model)
        distance = frechet_distance(*statistics(hidden), model.reference_mean, model.reference_cov)
        score, deviation = inception_score(logits)
        accuracy = (logits.argmax(1) == labels).double().mean().item()
        confident = (logits.softmax(1).amax(1) > CONFIDENT).double().mean().item()
        print(
            f"{name}: {len(images)} images, accuracy {accuracy:.4f}, confident {confident:.4f}, "
            f"fd.digits {distance:.4f}, is.digits {score:.3f} +- {deviation:.3f}"
        )
    torch.manual_seed(12345)
    logits = DIGITS.features(non_digits(*data["held_out"], 1000), model=model)[1]
    confident = (logits.softmax(1).amax(1) > CONFIDENT).double().mean().item()
    print(f"no digits: 1000 images, confident {confident:.4f}")


def main() -> None:
    """Parse the command line, train, save, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DIGITS.weights)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=80)
    args = parser.parse_args()
    model = train(args.seed, args.epochs)
    save(model, args.out)
    judge(model)
    print(args.out)


if __name__ == "__main__":
    main()
