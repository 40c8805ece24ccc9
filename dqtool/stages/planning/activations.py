"""Memory that a network's activations take, by a run on shapes: nothing is computed, and every tensor is counted while it lives."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from dqtool.graph.leaves import is_quantizable

__all__ = ["Activations", "LiveBytes", "activations"]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that were made inside of this context and are still alive: `now`, and at most `peak`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count the memory that it made."""
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in given and storage not in self._seen:
                    self._seen.add(storage)
                    size = storage.nbytes()
                    self.now += size
                    weakref.finalize(storage, self._gone, size)
        self.peak = max(self.peak, self.now)
        return out

    def _gone(self, size: int) -> None:
        self.now -= size


@dataclass(frozen=True)
class Activations:
    """Bytes for one sample: the most that a forward pass of the network has at once (`forward`), and that of its largest block
    (`block`); what the largest block keeps for its backward pass while it is quantized (`trained`); and all outputs of blocks
    (`between`)."""

    forward: int
    block: int
    trained: int
    between: int

    def calibrating(self, together: int) -> int:
        """Return the bytes of a pass of `together` samples."""
        return together * self.forward

    def distilling(self, replayed: int, batch: int, together: int) -> int:
        """Return the most bytes of a training: `replayed` samples run through a block, a block or all blocks learn from `batch`,
        and `together` run through the network where it samples."""
        learning = batch * (self.trained + self.block)
        return max(replayed * self.block, learning, learning + batch * self.between, together * self.forward)


def activations(network: nn.Module, blocks: Sequence[str], example: Mapping[str, Any]) -> Activations:
    """Return the memory of the activations of a float network on the `meta` device for one sample, whose arguments are `example`."""
    given = tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, dict(example))
    calls: dict[str, tuple[Any, Any]] = {}
    outputs: dict[str, int] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            calls.setdefault(name, (args, kwargs))
            outputs[name] = sum(t.nbytes for t in tree_leaves(output) if isinstance(t, Tensor))

        return hook

    with torch.no_grad(), LiveBytes() as live:
        network(**given)
    modules = {name: network.get_submodule(name) for name in blocks}
    handles = [m.register_forward_hook(keep(name), with_kwargs=True) for name, m in modules.items()]
    try:
        with torch.no_grad():
            network(**given)
    finally:
        for handle in handles:
            handle.remove()
    block = trained = 0
    for name, (args, kwargs) in calls.items():
        with torch.no_grad(), LiveBytes() as alone:
            modules[name](*args, **kwargs)
        block = max(block, alone.peak)
        trained = max(trained, _kept(modules[name], args, kwargs))
    return Activations(live.peak, block, trained, sum(outputs.values()))


def _kept(block: nn.Module, args: Any, kwargs: Any) -> int:
    """Return the bytes that a block keeps for its backward pass. A quantizer keeps its input scaled, and its result: one tensor more
    for the input of each layer than the float block keeps."""
    inputs = 0

    def count(_module: nn.Module, given: Any) -> None:
        nonlocal inputs
        inputs += sum(t.nbytes for t in tree_leaves(given) if isinstance(t, Tensor))

    layers = [module for module in block.modules() if is_quantizable(module)]
    handles = [layer.register_forward_pre_hook(count) for layer in layers]
    learning = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    try:
        for parameter, _ in learning:
            parameter.requires_grad_(True)
        with torch.enable_grad(), LiveBytes() as live:
            output = block(*args, **kwargs)
            kept: int = live.now
        del output
    finally:
        for parameter, asked in learning:
            parameter.requires_grad_(asked)
        for handle in handles:
            handle.remove()
    return kept + inputs
