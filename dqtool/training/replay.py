"""Running a network block by block without ever running a block twice.

Block-wise training needs, for each block, its input on every sample (from the prefix trained so far) and the float
network's output. `Replay` keeps the outputs of the blocks that a later block still reads; a forward pass answers from
them, so only the cheap glue between blocks (concatenations, residuals, norms) is executed again. What no one reads any
more is dropped; what outgrows the memory budget lives in a temporary file.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from dqtool.nn.trace import Trace

__all__ = ["BlockInputs", "Replay"]


class _Reached(Exception):
    """The block that was asked for has its input; the rest of the network need not run."""


class Store:
    """Tensors of all samples, `[N, ...]`, in memory or, past the budget, in mapped temporary files.

    A file has no name once it is mapped, so that its space is free again when its tensor is.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget = budget_bytes
        self.used = 0
        self._spilled: set[int] = set()

    def empty(self, samples: int, like: Tensor) -> Tensor:
        """Room for `samples` rows shaped like `like[0]`."""
        shape = torch.Size((samples, *like.shape[1:]))
        size = shape.numel() * like.element_size()
        if self.used + size <= self.budget:
            self.used += size
            return torch.empty(shape, dtype=like.dtype)
        with tempfile.TemporaryDirectory(prefix="dqtool-") as folder:
            path = os.path.join(folder, "tensor")
            spilled = torch.from_file(path, shared=True, size=shape.numel(), dtype=like.dtype).view(shape)
        self._spilled.add(spilled.data_ptr())
        return spilled

    def forget(self, tensor: Tensor) -> None:
        """A stored tensor is no longer used: drop the last reference to it after this."""
        if tensor.data_ptr() in self._spilled:
            self._spilled.remove(tensor.data_ptr())
        else:
            self.used -= tensor.numel() * tensor.element_size()


class BlockInputs:
    """The arguments of one block on all samples: tensors as `[N, ...]`, all else as the network passed it."""

    def __init__(self, structure: Any, leaves: list[Any]) -> None:
        self.structure, self.leaves = structure, leaves

    def batch(self, rows: Tensor | slice) -> tuple[tuple, dict[str, Any]]:
        """`args, kwargs` for these samples."""
        return tree_unflatten([x[rows] if isinstance(x, Tensor) else x for x in self.leaves], self.structure)


class Replay:
    """One network (float or quantized) over a fixed set of samples, advanced block by block in execution order.

    `forward(model, rows)` runs the network on the samples `rows` (a slice); `samples` is N. Call `inputs` for the next
    block, then `advance` once the block is final.
    """

    def __init__(
        self,
        model: nn.Module,
        trace: Trace,
        samples: int,
        forward: Callable[[nn.Module, slice], None],
        batch_size: int = 256,
        budget_bytes: int = 6 << 30,
    ) -> None:
        self.model, self.trace, self.samples = model, trace, samples
        self._forward, self._batch = forward, batch_size
        self._last = trace.last_reader()
        self._cache: dict[str, Tensor | None] = {}
        self._shapes: dict[str, Tensor] = {}
        self._store = Store(budget_bytes)

    def inputs(self, index: int) -> BlockInputs:
        """Arguments of block `index` on all samples, given the outputs of all earlier blocks."""
        name = self.trace.blocks[index].name
        module = self.model.get_submodule(name)
        gathered: list[Any] | None = None
        structure: Any = None

        def capture(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            nonlocal gathered, structure
            leaves, structure = tree_flatten((args, kwargs))
            size = rows.stop - rows.start
            if gathered is None:
                gathered = [
                    self._store.empty(self.samples, x) if isinstance(x, Tensor) and x.dim() and len(x) == size else x
                    for x in leaves
                ]
            for held, x in zip(gathered, leaves, strict=True):
                if isinstance(x, Tensor) and held is not x:
                    held[rows] = x
            raise _Reached

        with self._answering(index), torch.no_grad():
            handle = module.register_forward_pre_hook(capture, with_kwargs=True)
            try:
                for start in range(0, self.samples, self._batch):
                    rows = slice(start, min(start + self._batch, self.samples))
                    self._rows = rows
                    try:
                        self._forward(self.model, rows)
                    except _Reached:
                        continue
            finally:
                handle.remove()
        if gathered is None:
            raise RuntimeError(f"block {name} was not reached")
        return BlockInputs(structure, gathered)

    def outputs(self, index: int, inputs: BlockInputs, select: Callable[[slice], None] = lambda rows: None) -> Tensor:
        """The block's outputs on all samples, `[N, ...]`; `select` is told the samples of each batch."""
        module = self.model.get_submodule(self.trace.blocks[index].name)
        result: Tensor | None = None
        with torch.no_grad():
            for start in range(0, self.samples, self._batch):
                rows = slice(start, min(start + self._batch, self.samples))
                select(rows)
                args, kwargs = inputs.batch(rows)
                y = module(*args, **kwargs)
                if result is None:
                    result = self._store.empty(self.samples, y)
                result[rows] = y
        assert result is not None
        return result

    def advance(self, index: int, outputs: Tensor, inputs: BlockInputs) -> None:
        """Block `index` is final with these outputs; what no later block reads is dropped."""
        for leaf in inputs.leaves:
            if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == self.samples:
                self._store.forget(leaf)
        inputs.leaves.clear()
        self._cache[self.trace.blocks[index].name] = outputs
        for name, held in self._cache.items():
            if held is not None and self._last[name] <= index:
                self._shapes[name] = torch.empty((1, *held.shape[1:]), dtype=held.dtype, device="meta")
                self._store.forget(held)
                self._cache[name] = None

    def _answering(self, index: int) -> _Answers:
        finished = [block.name for block in self.trace.blocks[:index]]
        return _Answers(self, {name: self.model.get_submodule(name) for name in finished})

    def answer(self, name: str) -> Tensor:
        """The cached output of a finished block for the rows in flight, or zeros of its shape if nobody reads it."""
        held = self._cache[name]
        if held is not None:
            return held[self._rows]
        first = self._shapes[name]
        return torch.zeros((), dtype=first.dtype).expand(self._rows.stop - self._rows.start, *first.shape[1:])


class _Answers:
    """While active, finished blocks return what they returned before."""

    def __init__(self, replay: Replay, modules: Mapping[str, nn.Module]) -> None:
        self.replay, self.modules = replay, modules

    def __enter__(self) -> None:
        for name, module in self.modules.items():
            module.forward = lambda *_a, _name=name, **_k: self.replay.answer(_name)  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        for module in self.modules.values():
            del module.__dict__["forward"]
