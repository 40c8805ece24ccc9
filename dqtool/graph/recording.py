"""Record one forward pass of a network, on shapes alone where it can: its aten operations, and the tensors between them.

A quantizable leaf appears as one operation (`Op.layer` names it), everything else as PyTorch decomposes it. Calls of
attention modules and of larger blocks leave marks among the operations.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from dqtool.graph.attention import is_attention
from dqtool.graph.leaves import is_quantizable
from dqtool.graph.products import Calls, ProductWatch

__all__ = ["ENTER", "LEAVE", "PRODUCTS", "Op", "Recording", "record", "tensors_in"]

ENTER, LEAVE, PRODUCTS = "enter", "leave", "products"
"""Names of the marks around the call of a watched module, and at a call of attention products."""


@dataclass(eq=False)
class Op:
    """One operation as it ran.

    `name` is `aten.NAME.OVERLOAD`, "layer" (see `layer`), "output" (the network's result) or a mark, `ENTER` or `LEAVE`,
    of a call of `module`, or `PRODUCTS`, of its attention products. `args` are positional and keyword arguments.
    """

    name: str
    args: tuple[Any, ...]
    outputs: list[Tensor]
    layer: str | None = None
    module: str | None = None
    mutates: bool = False

    def reads(self, tensor: Tensor) -> int:
        """Return the number of arguments that are this tensor."""
        return sum(leaf is tensor for leaf in tree_leaves(self.args))


@dataclass
class Recording:
    """All operations of one forward pass of `network`, a copy on the `meta` device, on `inputs`.

    `parameters` names the network's parameters by identity, `blocks` the modules that are watched as blocks.
    """

    network: nn.Module
    inputs: dict[str, Any]
    blocks: frozenset[str] = frozenset()
    ops: list[Op] = field(default_factory=list)
    parameters: dict[int, str] = field(default_factory=dict)
    calls: dict[str, list[Op]] = field(default_factory=dict)
    """Calls of each quantizable leaf."""
    makers: dict[int, Op] = field(default_factory=dict)
    readers: dict[int, list[Op]] = field(default_factory=dict)
    written: set[int] = field(default_factory=set)
    """Storages that some operation changed in place."""
    tied: set[int] = field(default_factory=set)
    """Parameters that several modules hold."""
    products: Calls = field(default_factory=Calls)
    """Calls of attention products."""

    def add(self, op: Op) -> None:
        """Append an operation. It keeps its tensors alive, so that their identities stay unique."""
        self.ops.append(op)
        if op.module is not None:
            return
        if op.layer is not None:
            self.calls.setdefault(op.layer, []).append(op)
        if op.mutates:
            self.written.update(storage_of(tensor) for tensor in op.outputs)
        for tensor in op.outputs:
            self.makers.setdefault(id(tensor), op)
        for tensor in {id(t): t for t in tensors_in(op.args)}.values():
            self.readers.setdefault(id(tensor), []).append(op)

    def maker(self, tensor: Tensor) -> Op | None:
        """Return the operation that made a tensor; None for parameters, inputs, and tensors changed in place."""
        return None if self.is_written(tensor) else self.makers.get(id(tensor))

    def is_written(self, tensor: Tensor) -> bool:
        """Say whether the tensor's memory was changed after it was made."""
        return storage_of(tensor) in self.written

    def reads(self, tensor: Tensor) -> list[Op]:
        """Return the operations that read a tensor, each as often as it does."""
        return [op for op in self.readers.get(id(tensor), []) for _ in range(op.reads(tensor))]


def tensors_in(values: Any) -> list[Tensor]:
    """Return the tensors among nested values, in order."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def storage_of(tensor: Tensor) -> int:
    """Return the identity of the tensor's memory, which its views share."""
    storage: int = tensor.untyped_storage()._cdata
    return storage


class _Recorder(TorchDispatchMode):
    """Adds every operation to the recording, except those inside of a quantizable leaf."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recording, self.inside = recording, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.inside:
            self.recording.add(Op(str(func), (args, kwargs), tensors_in(result), mutates=func._schema.is_mutable))
        return result

    def watch_layer(self, name: str, layer: nn.Module) -> None:
        """Record calls of a leaf as one operation each."""

        def enter(_layer: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
            self.inside += 1

        def leave(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            self.inside -= 1
            self.recording.add(Op("layer", (*args, *kwargs.values()), [output], layer=name))

        layer.register_forward_pre_hook(enter, with_kwargs=True)
        layer.register_forward_hook(leave, with_kwargs=True)

    def watch_module(self, name: str, module: nn.Module) -> None:
        """Mark where calls of an attention module or a block begin and end."""

        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.recording.add(Op(ENTER, (args, kwargs), [], module=name))

        def leave(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self.recording.add(Op(LEAVE, (args, kwargs), tensors_in(output), module=name))

        module.register_forward_pre_hook(enter, with_kwargs=True)
        module.register_forward_hook(leave, with_kwargs=True)


@torch.no_grad()
def record(
    model: nn.Module, inputs: Mapping[str, Any], find_blocks: Callable[[nn.Module], Collection[str]] | None = None
) -> Recording:
    """Run `model(**inputs)` on the `meta` device and return what ran.

    Only the shapes of `inputs` matter; the model's weights are neither read nor copied. `find_blocks` names the blocks
    of the model. A forward that looks at values (lengths of texts, positions) runs on the CPU instead, with random weights.
    """
    try:
        return _record(ghost_of(model, "meta"), inputs, find_blocks)
    except (NotImplementedError, RuntimeError):
        return _record(ghost_of(model, "cpu"), inputs, find_blocks)


def _record(
    ghost: nn.Module, inputs: Mapping[str, Any], find_blocks: Callable[[nn.Module], Collection[str]] | None
) -> Recording:
    device = next(ghost.parameters()).device
    holders = Counter(id(p) for module in ghost.modules() for p in module.parameters(recurse=False))
    recording = Recording(
        ghost,
        tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, dict(inputs)),
        frozenset() if find_blocks is None else frozenset(find_blocks(ghost)),
        parameters={id(p): name for name, p in ghost.named_parameters()},
        tied={p for p, count in holders.items() if count > 1},
    )
    recorder = _Recorder(recording)
    for name, module in ghost.named_modules():
        if is_quantizable(module):
            recorder.watch_layer(name, module)
        elif is_attention(module) or name in recording.blocks:
            recorder.watch_module(name, module)
    watch = ProductWatch(ghost, lambda name, operands: recording.add(Op(PRODUCTS, operands, [], module=name)))
    recording.products = watch.calls
    with watch, recorder:
        output = ghost(**recording.inputs)
    results = output if isinstance(output, tuple | list | Tensor) else tuple(output.values())
    recording.add(Op("output", (results,), []))
    return recording


def ghost_of(model: nn.Module, device: str) -> nn.Module:
    """Return a copy in eval mode, made without copying the weights: on `meta` without values, elsewhere with random ones."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        values = torch.empty_like(p, device=device)
        if device != "meta" and values.is_floating_point():
            values.normal_(std=0.02, generator=torch.Generator(device).manual_seed(len(memo)))
        memo[id(p)] = nn.Parameter(values, requires_grad=False)
    for b in model.buffers():
        memo[id(b)] = torch.empty_like(b, device=device) if b.is_meta or device == "meta" else b.to(device)
    ghost = copy.deepcopy(model, memo).eval()
    for module in ghost.modules():
        for name, value in vars(module).items():  # some networks keep position tables as plain attributes
            if name not in ("_parameters", "_buffers", "_modules") and tensors_in(value):
                vars(module)[name] = tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, value)
    return ghost
