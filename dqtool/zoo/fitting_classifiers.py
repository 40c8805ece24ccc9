"""Training loop of the embedded models' classifiers, the reference that they keep, and their file."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from dqtool.metrics.classifiers import ImageClassifier
from dqtool.metrics.frechet import statistics

M = TypeVar("M", bound=nn.Module)

__all__ = ["fit", "save", "set_reference"]


def fit(
    network: Callable[[], M],
    loss_of: Callable[[M, Tensor], Tensor],
    count: int,
    *,
    seed: int,
    epochs: int,
    batch_size: int,
    lr: float,
    told_every: int = 1,
) -> M:
    """Return `network()`, trained from scratch on `count` images and frozen. On one thread, so that a seed always gives the same weights.

    `loss_of(model, index)` is the loss of the images with these indices. The first, the last and every `told_every`-th epoch
    is told on standard error.
    """
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    model = network().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-2)
    batches = count // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * batches, pct_start=0.1)
    start = time.time()
    for epoch in range(1, epochs + 1):
        running = 0.0
        for index in torch.randperm(count)[: batches * batch_size].split(batch_size):
            loss = loss_of(model, index)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            running += loss.item()
        if epoch in (1, epochs) or epoch % told_every == 0:
            eta = (time.time() - start) / epoch * (epochs - epoch)
            print(f"epoch {epoch}/{epochs} loss {running / batches:.4f} eta {eta:.0f} s", file=sys.stderr, flush=True)
    return model.eval().requires_grad_(False)


def set_reference(classifier: ImageClassifier, model: nn.Module, images: Tensor) -> None:
    """Set the buffers of `model` to the statistics of its features of `images`."""
    mean, cov = statistics(classifier.features(images, model=model)[0])
    model.get_buffer("reference_mean").copy_(mean)
    model.get_buffer("reference_cov").copy_(cov)


def save(model: nn.Module, out: Path) -> None:
    """Write the weights atomically, since another process may have the old file mapped."""
    from safetensors.torch import save as to_bytes

    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    partial.write_bytes(to_bytes(dict(model.state_dict()), metadata={"format": "pt"}))
    os.replace(partial, out)
