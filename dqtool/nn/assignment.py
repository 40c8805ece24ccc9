"""Assignment of bits: apply a quantization specification to the layers of a recorded network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dqtool.core.bits import Bits, LayerBits
from dqtool.core.quantization import NONSTANDARD, QuantizationSpec
from dqtool.graph.roles import Roles
from dqtool.graph.trace import LayerInfo

__all__ = ["LayerPlan", "apply_preset", "assign_bits"]


@dataclass(frozen=True)
class LayerPlan:
    """A layer and its bits, `AttentionBits` for an attention product pair and `LayerBits` for any other layer."""

    info: LayerInfo
    bits: Bits
    dilated: bool = False

    def summary(self) -> dict[str, Any]:
        """Return the plan as the tables of a forecast show it."""
        info = self.info
        return {
            "name": info.name,
            "kind": info.kind,
            "shape": info.shape,
            "bits": self.bits.to_json(),
            "macs": info.macs,
        }


def assign_bits(layers: Sequence[LayerInfo], spec: QuantizationSpec, dilated: Iterable[str] = ()) -> list[LayerPlan]:
    """Return the bits of every layer. Layers that share a quantized input get the finest bits that one of them has.

    Raises:
        UsageError: a pattern of the specification matches no layer.
    """
    spec.check_names(info.name for info in layers)
    chosen = {info.name: spec.layer_bits(info.name, info.kind, info.role is not None) for info in layers}
    sharing: dict[str, list[str]] = {}
    for info in layers:
        if info.kind != "attention":
            sharing.setdefault(info.shares or info.name, []).append(info.name)
    for members in sharing.values():
        own = {name: bits for name in members if isinstance(bits := chosen[name], LayerBits)}
        finest = max(bits.input for bits in own.values())
        chosen.update({name: replace(bits, input=finest) for name, bits in own.items()})
    dilated = set(dilated)
    return [LayerPlan(info, chosen[info.name], info.name in dilated) for info in layers]


def apply_preset(spec: QuantizationSpec, layers: Iterable[LayerInfo], roles: Callable[[], Roles]) -> QuantizationSpec:
    """Return the specification with the layers that its preset leaves in float (see `PRESETS`); `roles` is called if needed."""
    if spec.preset != NONSTANDARD:
        return spec
    found = roles()
    named = {*found.resized, *found.shortcuts}
    return spec.leaving_float(
        [info.name for info in layers if info.role is None and (info.kind == "attention" or info.name in named)]
    )
