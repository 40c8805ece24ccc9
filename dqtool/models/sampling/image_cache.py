"""Cache of full-precision models' samples, which every evaluation against the same reference needs again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dqtool import report
from dqtool.artifacts import dqtool_version
from dqtool.artifacts.tensorfile import load_tensors, save_tensors
from dqtool.errors import DqtoolError

__all__ = ["cached_images"]

LARGEST = 1 << 30
"""Largest size in bytes of samples that are cached."""


def cached_images(key: Mapping[str, Any], make: Callable[[], Tensor]) -> Tensor:
    """Return the images of `make()`, from the cache where it holds images of the same key and versions.

    The cache is in `$DQTOOL_CACHE` (default `~/.cache/dqtool`). One that can't be read or written causes a warning only.
    """
    identity = repr(sorted({**key, "dqtool": dqtool_version(), "torch": torch.__version__}.items(), key=lambda i: i[0]))
    name = hashlib.sha256(identity.encode()).hexdigest()
    folder = Path(os.environ.get("DQTOOL_CACHE") or Path.home() / ".cache" / "dqtool") / "images"
    path = folder / f"{name}.safetensors"
    if path.exists():
        try:
            images = load_tensors(path)["images"].clone()
            report.say("eval: reference images from the cache")
            return images
        except (DqtoolError, KeyError, OSError):
            report.warn(f"the cached images {path} can't be read and are made again")
    images = make()
    if images.numel() * images.element_size() <= LARGEST:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            partial = folder / f".{name}.{os.getpid()}.tmp"
            save_tensors(partial, {"images": images})
            os.replace(partial, path)
        except (DqtoolError, OSError):
            report.warn(f"reference images could not be cached in {folder}")
    return images
