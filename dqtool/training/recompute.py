"""End-to-end training in the memory of one block: a block's inside is computed again when its gradient is wanted.

What stays for the backward pass is what goes from block to block (Chen et al., arXiv 1604.06174); the price is one more
forward pass an iteration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from dqtool.graph.trace import Trace

__all__ = ["recomputed_blocks"]


@contextmanager
def recomputed_blocks(model: nn.Module, trace: Trace) -> Iterator[None]:
    """Within it, the blocks of `model` keep nothing but their inputs for the backward pass, those of them that are given
    something to pass gradients on to. Gradients stay what they are, up to the order in which they are added."""
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
        leaves, structure = tree_flatten((args, kwargs))
        if not torch.is_grad_enabled() or not any(isinstance(x, Tensor) and x.requires_grad for x in leaves):
            return forward(*args, **kwargs)

        returned: list[Any] = []

        def again(*given: Any) -> tuple[Any, ...]:
            args, kwargs = tree_unflatten(given, structure)
            outputs, form = tree_flatten(forward(*args, **kwargs))
            returned[:] = [form]
            return tuple(outputs)

        # The reentrant form: its first pass runs without gradients, which leaves out what each layer would make for them.
        # It wants every tensor as an argument, and as an output, of its own.
        outputs = checkpoint(again, *leaves, use_reentrant=True, preserve_rng_state=False)
        return tree_unflatten(outputs, returned[0])

    return run
