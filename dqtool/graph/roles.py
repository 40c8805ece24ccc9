"""Roles of layers in the network, derived from data flow and not from names or positions."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dqtool.graph.origins import follow_origins
from dqtool.graph.recording import Op, Recording, tensors_in

__all__ = ["Roles", "roles_of"]


@dataclass(frozen=True)
class Roles:
    """Names of layers by role, each in execution order.

    Attributes:
        temporal: layers whose input depends on the timestep and not on the sample (TFMQ's temporal information block,
            arXiv 2311.16503).
        temporal_ends: temporal layers that feed no other temporal layer.
        resized: layers that read an upsampled tensor.
        shortcuts: layers on a skip connection, whose output is added to what other layers made of the same input.
    """

    temporal: tuple[str, ...] = ()
    temporal_ends: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()
    shortcuts: tuple[str, ...] = ()


def roles_of(recording: Recording, sample: str = "sample", timestep: str = "timestep") -> Roles:
    """Read the roles of all layers off a recording; `sample` and `timestep` name the inputs that are followed."""
    starts = {"/sample": recording.inputs[sample], "/timestep": recording.inputs[timestep]}
    read = follow_origins(recording, starts, lambda op: op.layer, nearest=False)
    temporal: dict[str, frozenset[str]] = {}
    for op, origins in read.items():
        if op.layer is not None and "/timestep" in origins and "/sample" not in origins:
            temporal.setdefault(op.layer, origins)
    feeding = frozenset().union(*temporal.values())
    calls = [(name, op) for op in recording.ops if (name := op.layer) is not None]
    return Roles(
        tuple(temporal),
        tuple(name for name in temporal if name not in feeding),
        tuple(dict.fromkeys(name for name, op in calls if _reads_upsampled(recording, op))),
        tuple(dict.fromkeys(name for name, op in calls if _is_shortcut(recording, op))),
    )


def _reads_upsampled(recording: Recording, op: Op) -> bool:
    """Say whether nothing but casts and copies lies between an upsampling and this layer."""
    tensors = tensors_in(op.args)
    while len(tensors) == 1:
        maker = recording.maker(tensors[0])
        if maker is None or maker.layer is not None:
            return False
        if "upsample" in maker.name:
            return True
        if not any(kind in maker.name for kind in ("_to_copy", "clone", "contiguous", "alias", "view")):
            return False
        tensors = tensors_in(maker.args)
    return False


def _is_shortcut(recording: Recording, op: Op) -> bool:
    """Say whether the layer's output is added to something that other layers made of the tensor that it reads."""
    source = tensors_in(op.args)[0]
    for reader in recording.reads(op.outputs[0]):
        if not reader.name.startswith("aten.add."):
            continue
        others = [t for t in tensors_in(reader.args) if t is not op.outputs[0]]
        if any(_descends(recording, other, source, op) for other in others):
            return True
    return False


def _descends(recording: Recording, tensor: Tensor, source: Tensor, without: Op) -> bool:
    """Say whether `tensor` was computed from `source` by a layer, not counting what went through the layer `without`."""
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
        maker = recording.makers.get(id(at))
        if maker is not None and maker is not without:
            pending.extend((t, layered or maker.layer is not None) for t in tensors_in(maker.args))
    return False
