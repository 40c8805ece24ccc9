"""Form of narrow weights in memory: one code a byte, or two."""

from __future__ import annotations

import math
import os

from torch import nn

from dqtool.errors import UsageError
from dqtool.runtimes.cpu.native_product import NativeProduct

__all__ = ["IN_MEMORY", "LARGE", "choose_memory"]

IN_MEMORY = "DQTOOL_WEIGHTS_IN_MEMORY"
"""Environment variable that chooses how weights of up to 4 bits lie in memory on AVX2: packed, unpacked, or auto."""

LARGE = 1 << 28
"""Weights of a network above which `auto` packs them: a step then takes a few percent longer, and much less memory."""


def choose_memory(network: nn.Module) -> None:
    """Let two codes share a byte of memory where a network has more than `LARGE` weights, or as `IN_MEMORY` says.

    Raises:
        UsageError: the variable is none of packed, unpacked and auto.
    """
    wanted = os.environ.get(IN_MEMORY, "auto")
    if wanted not in ("packed", "unpacked", "auto"):
        fix = "Choose from packed, unpacked and auto, or leave it out"
        raise UsageError(f"{IN_MEMORY}={wanted} names no form of weights in memory", where=IN_MEMORY, fix=fix)
    products = [module for module in network.modules() if isinstance(module, NativeProduct)]
    total = sum(module.out_channels * module.in_channels * math.prod(module.kernel) for module in products)
    for module in products:
        module.compact = module.narrow and (wanted == "packed" or (wanted == "auto" and total > LARGE))
