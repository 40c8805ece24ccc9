"""What part a layer plays in the network, read from its dataflow: nobody's names and no index in a list."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from dqtool.graph.dataflow import Dataflow, Op, dataflow

__all__ = ["Roles", "find_roles"]


@dataclass(frozen=True)
class Roles:
    """Names of layers, each list in execution order.

    temporal: their input depends on the timestep and not on the sample (TFMQ's temporal information block, arXiv
    2311.16503); temporal_ends: those of them that feed none of the others; resized: convolutions that read what was just
    upsampled; shortcuts: layers on a skip connection, added to what other layers made of the same input.
    """

    temporal: tuple[str, ...] = ()
    temporal_ends: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()
    shortcuts: tuple[str, ...] = ()


@dataclass
class _Past:
    """What a tensor was made from: whether of the sample and of the timestep, and by which layers."""

    sample: bool = False
    timestep: bool = False
    layers: set[str] = field(default_factory=set)


def find_roles(
    model: nn.Module, inputs: Mapping[str, Any], sample: str = "sample", timestep: str = "timestep"
) -> Roles:
    """The roles of all layers of a float network, from one forward pass of `model(**inputs)` on shapes alone.

    `sample` and `timestep` name the arguments that are followed.
    """
    given = tree_map(lambda v: v.to("meta") if isinstance(v, Tensor) else v, dict(inputs))
    flow = dataflow(model, given)
    past: dict[int, _Past] = {
        id(given[sample]): _Past(sample=True),
        id(given[timestep]): _Past(timestep=True),
    }
    temporal: list[str] = []
    feeding: set[str] = set()
    for op in flow.ops:
        before = _Past()
        for tensor in _tensors(op.args):
            seen = past.get(id(tensor))
            if seen is not None:
                before.sample |= seen.sample
                before.timestep |= seen.timestep
                before.layers |= seen.layers
        if op.layer is not None:
            if before.timestep and not before.sample and op.layer not in temporal:
                temporal.append(op.layer)
                feeding |= before.layers
            before.layers = before.layers | {op.layer}
        for tensor in op.outputs:
            past[id(tensor)] = before
    order = [op for op in flow.ops if op.layer is not None]
    return Roles(
        tuple(temporal),
        tuple(name for name in temporal if name not in feeding),
        tuple(dict.fromkeys(str(op.layer) for op in order if _reads_upsampled(flow, op))),
        tuple(dict.fromkeys(str(op.layer) for op in order if _is_shortcut(flow, op))),
    )


def _tensors(args: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]


def _reads_upsampled(flow: Dataflow, op: Op) -> bool:
    """Whether nothing but casts and copies lie between an upsampling and this layer."""
    tensors = _tensors(op.args)
    while len(tensors) == 1:
        maker = flow.maker(tensors[0])
        if maker is None or maker.layer is not None:
            return False
        if "upsample" in maker.name:
            return True
        if not any(kind in maker.name for kind in ("_to_copy", "clone", "contiguous", "alias", "view")):
            return False
        tensors = _tensors(maker.args)
    return False


def _is_shortcut(flow: Dataflow, op: Op) -> bool:
    """Whether the layer's output is added to something that other layers made of the tensor that it reads."""
    source = _tensors(op.args)[0]
    for reader in flow.reads(op.outputs[0]):
        if not reader.name.startswith("aten.add."):
            continue
        others = [t for t in _tensors(reader.args) if t is not op.outputs[0]]
        if any(_descends(flow, other, source, op) for other in others):
            return True
    return False


def _descends(flow: Dataflow, tensor: Tensor, source: Tensor, without: Op) -> bool:
    """Whether `tensor` was computed from `source` by a layer, not counting what went through the layer `without`."""
    pending: list[tuple[Tensor, bool]] = [(tensor, False)]
    seen: set[tuple[int, bool]] = set()
    while pending:
        at, layered = pending.pop()
        if at is source:
            if layered:
                return True
            continue
        if (id(at), layered) in seen:
            continue
        seen.add((id(at), layered))
        maker = flow.makers.get(id(at))
        if maker is not None and maker is not without:
            pending.extend((t, layered or maker.layer is not None) for t in _tensors(maker.args))
    return False
