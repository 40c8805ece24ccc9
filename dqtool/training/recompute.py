"""End-to-end training in the memory of one block: a block's inside is computed again when its gradient is wanted.

What stays for the backward pass is what goes from block to block (Chen et al., arXiv 1604.06174); the price is one more
forward pass an iteration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dqtool.nn.trace import Trace

__all__ = ["recomputed_blocks"]


@contextmanager
def recomputed_blocks(model: nn.Module, trace: Trace) -> Iterator[None]:
    """Within it, the blocks of `model` keep nothing but their inputs for the backward pass. Gradients stay what they are,
    bit for bit."""
    modules = [model.get_submodule(block.name) for block in trace.blocks]
    for module in modules:
        module.forward = _recomputing(module.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in modules:
            del module.__dict__["forward"]


def _recomputing(forward: Callable) -> Callable:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run
