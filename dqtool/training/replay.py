"""Block-by-block execution of a network that never runs a block twice.

Block-wise training needs the input of each block on every sample (from the prefix trained so far) and the float
network's output. `Replay` caches the outputs of finished blocks that a later block still reads. A forward pass takes
these outputs from the cache and executes only the operations between blocks (concatenations, residuals, norms). Outputs
that no later block reads are dropped; outputs beyond the memory budget are stored in a temporary file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from dqtool.core.device import device_of, to_device
from dqtool.errors import UsageError
from dqtool.graph.trace import Trace
from dqtool.training.tensor_store import TensorStore

__all__ = ["BlockInputs", "Replay"]


class _Reached(Exception):
    """Raised when the input of the requested block is known, to skip the rest of the network."""


class BlockInputs:
    """Arguments of one block on all samples.

    Tensors with one entry for each sample are stored as `[N, ...]`. Other arguments (positions that all samples share,
    for instance) are stored as the network passed them. `owned` is true for the former.
    """

    def __init__(self, structure: Any, leaves: list[Any], owned: list[bool], device: torch.device) -> None:
        self.structure, self.leaves, self.owned, self.device = structure, leaves, owned, device

    def batch(self, rows: Tensor | slice) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return `args, kwargs` of the samples `rows`, on the device of the network."""
        picked = [to_device(x[rows], self.device) if own else x for x, own in zip(self.leaves, self.owned, strict=True)]
        result: tuple[tuple[Any, ...], dict[str, Any]] = tree_unflatten(picked, self.structure)
        return result


class Replay:
    """Execution of one network (float or quantized) over a fixed set of samples, block by block in execution order.

    Call `inputs` for the next block, then `outputs`, then `advance` once the block has its final weights.
    `forward(model, rows)` runs the network on the samples `rows` (a slice); `samples` is N.
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
        self._cache: dict[str, Any] = {}
        self._shapes: dict[str, Any] = {}
        self._store = TensorStore(budget_bytes)
        self._device = device_of(model)
        self._asked: dict[str, list[Any]] = {}

    def inputs(self, index: int) -> BlockInputs:
        """Return the arguments of block `index` on all samples, computed from the outputs of all earlier blocks.

        Raises:
            UsageError: an earlier block runs several times in a pass, on different inputs.
        """
        name = self.trace.blocks[index].name
        module = self.model.get_submodule(name)
        gathered: list[Any] | None = None
        structure: Any = None
        alone: list[Any] = []
        owned: list[bool] = []

        def capture(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal gathered, structure, owned
            leaves, structure = tree_flatten((args, kwargs))
            size = rows.stop - rows.start
            if not alone:
                alone.extend(leaves)
            elif gathered is None:
                # The first pass has one sample, since a table of positions may be as long as a batch.
                owned = [
                    isinstance(x, Tensor) and x.dim() > 0 and len(x) == size and len(one) == 1
                    for x, one in zip(leaves, alone, strict=True)
                ]
                gathered = [
                    self._store.empty(self.samples, x) if own else x for x, own in zip(leaves, owned, strict=True)
                ]
            if gathered is not None:
                for held, x, own in zip(gathered, leaves, owned, strict=True):
                    if own:
                        held[rows] = x
            raise _Reached

        with self._answering(index), torch.no_grad():
            handle = module.register_forward_pre_hook(capture, with_kwargs=True)
            try:
                batches = [
                    slice(start, min(start + self._batch, self.samples))
                    for start in range(0, self.samples, self._batch)
                ]
                for rows in [slice(0, 1), *batches]:
                    self._rows = rows
                    self._asked.clear()
                    try:
                        self._forward(self.model, rows)
                    except _Reached:
                        continue
            finally:
                handle.remove()
        if gathered is None:
            raise RuntimeError(f"block {name} was not reached")
        return BlockInputs(structure, gathered, owned, self._device)

    def outputs(self, index: int, inputs: BlockInputs, select: Callable[[slice], None] = lambda rows: None) -> Any:
        """Return the output of block `index` on all samples, `[N, ...]`, in the structure that the block returns.

        `select` is called with the samples of each batch before the block runs on them.

        Raises:
            UsageError: the block folds frames or places into its batch, so it has no output for each sample.
        """
        module = self.model.get_submodule(self.trace.blocks[index].name)
        result: list[Any] | None = None
        structure: Any = None
        with torch.no_grad():
            for start in range(0, self.samples, self._batch):
                rows = slice(start, min(start + self._batch, self.samples))
                select(rows)
                args, kwargs = inputs.batch(rows)
                leaves, structure = tree_flatten(module(*args, **kwargs))
                if result is None:
                    result = [self._store.empty(self.samples, y) if isinstance(y, Tensor) else y for y in leaves]
                for held, y in zip(result, leaves, strict=True):
                    if isinstance(y, Tensor):
                        if len(y) != rows.stop - rows.start:
                            name = self.trace.blocks[index].name
                            raise _untrainable(name, "the network folds frames or places into its batch")
                        held[rows] = y
        assert result is not None
        return tree_unflatten(result, structure)

    def advance(self, index: int, outputs: Any, inputs: BlockInputs) -> None:
        """Store the outputs of the finished block `index` and drop every cached output that no later block reads."""
        for leaf, own in zip(inputs.leaves, inputs.owned, strict=True):
            if own:
                self._store.forget(leaf)
        inputs.leaves.clear()
        inputs.owned.clear()
        self._cache[self.trace.blocks[index].name] = outputs
        for name, held in self._cache.items():
            if held is not None and self._last[name] <= index:
                self._shapes[name] = tree_map(_shape_of, held)
                for leaf in tree_leaves(held):
                    if isinstance(leaf, Tensor):
                        self._store.forget(leaf)
                self._cache[name] = None

    def _answering(self, index: int) -> _Answers:
        """Return a context in which the blocks before `index` return their cached outputs."""
        finished = [block.name for block in self.trace.blocks[:index]]
        return _Answers(self, {name: self.model.get_submodule(name) for name in finished})

    def answer(self, name: str, given: Any) -> Any:
        """Return the cached output of a finished block for the current rows, or zeros of its shape if no later block
        reads it.

        A block that runs again, such as an embedder that all blocks share, must be `given` the same arguments.
        """
        leaves = tree_leaves(given)
        if not all(map(_same, self._asked.setdefault(name, leaves), leaves)):
            raise _untrainable(name, "it runs several times in a pass, on different inputs")
        held = self._cache[name]
        if held is not None:
            return tree_map(lambda x: to_device(x[self._rows], self._device) if isinstance(x, Tensor) else x, held)
        size = self._rows.stop - self._rows.start
        return tree_map(
            lambda x: (
                torch.zeros((), dtype=x.dtype, device=self._device).expand(size, *x.shape[1:])
                if isinstance(x, Tensor)
                else x
            ),
            self._shapes[name],
        )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or torch.equal(one, other)
    return type(one) is type(other)


def _untrainable(name: str, why: str) -> UsageError:
    """Build the error for a block whose outputs on all samples can't be kept."""
    return UsageError(
        f"Block {name} can't be trained separately: {why}",
        where="--method",
        fix="Choose on-policy, which trains the whole network, or ptq, which trains nothing",
    )


def _shape_of(x: Any) -> Any:
    """Return a meta tensor with the shape of one sample of `x`."""
    return torch.empty((1, *x.shape[1:]), dtype=x.dtype, device="meta") if isinstance(x, Tensor) else x


class _Answers:
    """Context in which finished blocks return their cached outputs."""

    def __init__(self, replay: Replay, modules: Mapping[str, nn.Module]) -> None:
        self.replay, self.modules = replay, modules

    def __enter__(self) -> None:
        for name, module in self.modules.items():
            module.forward = lambda *a, _name=name, **k: self.replay.answer(_name, (a, k))

    def __exit__(self, *_: object) -> None:
        for module in self.modules.values():
            del module.__dict__["forward"]
