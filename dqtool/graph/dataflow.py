"""Which tensors a network makes and who reads them: its aten operations, recorded on shapes alone.

Quantizable leaves appear as one operation each (`Op.layer` names it), everything else as PyTorch decomposes it.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from dqtool.graph.trace import is_quantizable

__all__ = ["Dataflow", "Op", "dataflow", "ghost_of"]


@dataclass(eq=False)
class Op:
    """One operation as it ran. `name` is `aten.NAME.OVERLOAD`, "layer" (see `layer`) or "output" (the network's result)."""

    name: str
    args: tuple
    outputs: list[Tensor]
    layer: str | None = None

    def reads(self, tensor: Tensor) -> int:
        """How many of the arguments are this tensor."""
        return sum(leaf is tensor for leaf in tree_leaves(self.args))


@dataclass
class Dataflow:
    """All operations of one forward pass of `network`, which is on `meta`; `parameters` names them by identity."""

    network: nn.Module
    ops: list[Op] = field(default_factory=list)
    parameters: dict[int, str] = field(default_factory=dict)
    calls: dict[str, list[Op]] = field(default_factory=dict)  # of each layer
    makers: dict[int, Op] = field(default_factory=dict)
    readers: dict[int, list[Op]] = field(default_factory=dict)
    written: set[int] = field(default_factory=set)  # storages that some operation changed in place
    tied: set[int] = field(default_factory=set)  # parameters that several modules hold

    def add(self, op: Op) -> None:
        """Append an operation. It keeps its tensors alive, so that their identities stay unique."""
        self.ops.append(op)
        if op.layer is not None:
            self.calls.setdefault(op.layer, []).append(op)
        for tensor in op.outputs:
            self.makers.setdefault(id(tensor), op)
        for tensor in {id(t): t for t in tree_leaves(op.args) if isinstance(t, Tensor)}.values():
            self.readers.setdefault(id(tensor), []).append(op)

    def maker(self, tensor: Tensor) -> Op | None:
        """The operation that made it; None for parameters, the network's inputs and what was changed in place."""
        return None if self.is_written(tensor) else self.makers.get(id(tensor))

    def is_written(self, tensor: Tensor) -> bool:
        """Whether its memory was changed after it was made."""
        return tensor.untyped_storage()._cdata in self.written

    def reads(self, tensor: Tensor) -> list[Op]:
        """The operations that read it, each as often as it does."""
        return [op for op in self.readers.get(id(tensor), []) for _ in range(op.reads(tensor))]


class _Recorder(TorchDispatchMode):
    def __init__(self, flow: Dataflow) -> None:
        super().__init__()
        self.flow, self.inside = flow, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.inside:
            outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
            self.flow.add(Op(str(func), (args, kwargs), outputs))
            if func._schema.is_mutable:
                self.flow.written.update(t.untyped_storage()._cdata for t in outputs)
        return result


def ghost_of(model: nn.Module) -> nn.Module:
    """A copy on the `meta` device; the weights themselves are never copied."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
    for b in model.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    return copy.deepcopy(model, memo).eval()


@torch.no_grad()
def dataflow(model: nn.Module, inputs: Mapping[str, Any]) -> Dataflow:
    """Record `model(**inputs)`; only the shapes of `inputs` matter."""
    ghost = ghost_of(model)
    holders = Counter(id(p) for module in ghost.modules() for p in module.parameters(recurse=False))
    flow = Dataflow(
        ghost,
        parameters={id(p): name for name, p in ghost.named_parameters()},
        tied={p for p, count in holders.items() if count > 1},
    )
    recorder = _Recorder(flow)

    def enter(_module: nn.Module, _args: tuple, _kwargs: dict) -> None:
        recorder.inside += 1

    def leave(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            recorder.inside -= 1
            flow.add(Op("layer", (*args, *kwargs.values()), [output], name))

        return hook

    for name, module in ghost.named_modules():
        if is_quantizable(module):
            module.register_forward_pre_hook(enter, with_kwargs=True)
            module.register_forward_hook(leave(name), with_kwargs=True)
    arguments = tree_map(lambda v: v.to("meta") if isinstance(v, Tensor) else v, dict(inputs))
    with recorder:
        output = ghost(**arguments)
    results = output if isinstance(output, tuple | Tensor) else tuple(output.values())
    flow.add(Op("output", (results,), []))
    return flow
