"""Cache of full-precision models' samples, which every evaluation against the same reference needs again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dqtool import distributed, report
from dqtool.artifacts import cache_directory, dqtool_version, keep_in_cache
from dqtool.artifacts.tensorfile import load_tensors, save_tensors
from dqtool.errors import DqtoolError, EnvironmentFault

__all__ = ["cached_images"]

LARGEST = 1 << 30
"""Largest size in bytes of samples that are cached."""


def cached_images(key: Mapping[str, Any], make: Callable[[], Tensor]) -> Tensor:
    """Return the images of `make()`, from the cache where it holds images of the same key and versions.

    The cache is in `$DQTOOL_CACHE` (default `~/.cache/dqtool`). One that can't be read or written causes a warning only.
    Where several processes share a command, the main one returns the images.
    """
    if not distributed.is_main():
        return torch.empty(0) if distributed.broadcast(False) else make()
    identity = repr(sorted({**key, "dqtool": dqtool_version(), "torch": torch.__version__}.items(), key=lambda i: i[0]))
    name = hashlib.sha256(identity.encode()).hexdigest()
    try:
        path = cache_directory("images") / f"{name}.safetensors"
    except EnvironmentFault as error:
        report.warn(f"reference images are not cached: {error.what}")
        distributed.broadcast(False)
        return make()
    found = None
    if path.exists():
        try:
            found = load_tensors(path)["images"].clone()
        except (DqtoolError, KeyError, OSError):
            report.warn(f"the cached images {path} can't be read and are made again")
    distributed.broadcast(found is not None)
    if found is not None:
        report.say("eval: reference images from the cache")
        return found
    images = make()
    if images.numel() * images.element_size() <= LARGEST:
        reason = keep_in_cache(path, lambda new: save_tensors(new, {"images": images}))
        if reason is not None:
            report.warn(f"reference images could not be cached in {path.parent}: {reason}")
    return images
