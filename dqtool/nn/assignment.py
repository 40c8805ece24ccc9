"""Assignment of bits: apply a quantization specification to the layers of a recorded network."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from dqtool.core.affine import SYMMETRIC_BITS
from dqtool.core.bits import Bits, LayerBits
from dqtool.core.quantization import NONSTANDARD, QuantizationSpec
from dqtool.errors import UsageError
from dqtool.graph.roles import Roles
from dqtool.graph.trace import LayerInfo

__all__ = ["LayerPlan", "apply_preset", "assign_bits", "digest_of", "largest_rank", "require_branches", "with_branches"]


@dataclass(frozen=True)
class LayerPlan:
    """A layer and its bits, `AttentionBits` for an attention product pair and `LayerBits` for any other layer.

    `low_rank` is the rank of the float branch beside its product, 0 for none.
    """

    info: LayerInfo
    bits: Bits
    dilated: bool = False
    low_rank: int = 0


def digest_of(plans: Iterable[LayerPlan]) -> str:
    """Return a digest of the layers with their bits and ranks."""
    chosen = [(plan.info.name, str(plan.bits), plan.dilated, plan.low_rank) for plan in plans]
    return hashlib.sha256(repr(chosen).encode()).hexdigest()[:16]


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


def with_branches(plans: Iterable[LayerPlan], rank: int) -> list[LayerPlan]:
    """Return the plans with a branch of this rank beside every product whose weights have fewer than 8 bits.

    A grouped convolution gets none, nor does a layer whose weight has no more than `rank` rows or columns. Rank 0 gives
    none.
    """
    return [replace(plan, low_rank=rank if 0 < rank < largest_rank(plan) else 0) for plan in plans]


def require_branches(plans: Iterable[LayerPlan], rank: int) -> None:
    """Check that a rank that was asked for gave some layer a branch.

    Raises:
        UsageError: it gave none.
    """
    plans = list(plans)
    if rank and not any(plan.low_rank for plan in plans):
        most = max(map(largest_rank, plans), default=0) - 1
        raise UsageError(
            f"No layer can have a branch of rank {rank}",
            where="--low-rank",
            fix=f"Give at most {most}"
            if most > 0
            else "Give --bits whose weights have fewer than 8 bits, or leave it out",
        )


def largest_rank(plan: LayerPlan) -> int:
    """Return the rank that a branch beside the layer's product must stay below; 0 for a product without a branch."""
    bits, shape = plan.bits, plan.info.shape
    if not isinstance(bits, LayerBits) or bits.weight >= SYMMETRIC_BITS or plan.info.groups != 1:
        return 0
    return min(shape[0], math.prod(shape[1:]))


def apply_preset(spec: QuantizationSpec, layers: Iterable[LayerInfo], roles: Callable[[], Roles]) -> QuantizationSpec:
    """Return the specification with the layers that its preset leaves in float (see `PRESETS`); `roles` is called if needed."""
    if spec.preset != NONSTANDARD:
        return spec
    found = roles()
    named = {*found.resized, *found.shortcuts}
    return spec.leaving_float(
        [info.name for info in layers if info.role is None and (info.kind == "attention" or info.name in named)]
    )
