"""End-to-end training with the memory of one block: the inside of a block is recomputed in the backward pass.

Only the tensors between blocks are kept for the backward pass (Chen et al., arXiv 1604.06174), at the cost of one more
forward pass per iteration.
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
    """Make the blocks of `model` keep only their inputs for the backward pass, inside the context.

    Blocks without an input that requires gradients are left as they are. Gradients are equal up to the order of sums.
    """
    modules = [model.get_submodule(block.name) for block in trace.blocks]
    for module in modules:
        module.forward = _recomputing(module.forward)
    try:
        yield
    finally:
        for module in modules:
            del module.__dict__["forward"]


def _recomputing(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a forward function so that its backward pass runs it again."""

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

        # The reentrant form runs its first pass without gradients and so saves nothing for them inside the block.
        # It requires every tensor to be an argument, or an output, of its own.
        outputs = checkpoint(again, *leaves, use_reentrant=True, preserve_rng_state=False)
        return tree_unflatten(outputs, returned[0])

    return run
