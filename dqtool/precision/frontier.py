"""Bits of every layer that cost least for a given error of the samples: the frontier from coarse to fine.

Errors of operands add up (they are nearly independent), so that for a price `λ` of bytes and bit operations every layer's
choice is made alone. Running `λ` down gives one plan after another, each the best at its cost.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dqtool.core.bits import FLOAT_BITS, AttentionBits, LayerBits
from dqtool.core.quantization import SOFTMAX_BITS, KeptLayers
from dqtool.graph.trace import LayerInfo
from dqtool.nn.assignment import LayerPlan
from dqtool.precision.sensitivity import INPUT, PRODUCTS, WEIGHT, Errors

__all__ = ["Plan", "best_within", "find_frontier", "kept_layers", "plan_cost", "psnr_of", "quantization_error"]

PRICES = 60
"""Prices that are tried between the coarsest plan and the finest."""
HALVINGS = 12
"""Prices that are tried to reach a limit of cost, by halving the range of their logarithm."""

REFERENCE = LayerBits(8, 8)
"""Bytes and bit operations are counted in units of the network's own at these bits, and weigh the same."""


@dataclass(frozen=True)
class Plan:
    """A choice of bits by layer name (`LayerBits(b, b)` for an attention module at b bits), its predicted error and its cost."""

    bits: Mapping[str, LayerBits]
    error: float
    weight_bytes: float
    bops: int


def psnr_of(error: float, data_range: float = 2.0) -> float:
    """Return the PSNR in dB of a mean squared error; infinite for 0."""
    return 10 * math.log10(data_range**2 / error) if error > 0 else math.inf


def find_frontier(
    layers: Sequence[LayerInfo], errors: Errors, widths: Sequence[int], floor: Mapping[str, LayerBits] | None = None
) -> list[Plan]:
    """Return plans from coarse to fine, each cheaper than the next. `floor` gives each layer's least bits."""
    plans: list[Plan] = []
    for k in range(PRICES):
        plan = _plan_at(layers, errors, widths, 1 - 9 * k / (PRICES - 1), floor or {})
        if not plans or plan.bits != plans[-1].bits:
            plans.append(plan)
    return plans


def best_within(
    layers: Sequence[LayerInfo],
    errors: Errors,
    widths: Sequence[int],
    floor: Mapping[str, LayerBits],
    most_bytes: float,
    most_bops: float,
) -> Plan | None:
    """Return the plan of least error whose weights and bit operations are within these limits; None if there is none."""
    dear, cheap = -8.0, 1.0
    best = None
    for _ in range(HALVINGS):
        middle = (dear + cheap) / 2
        plan = _plan_at(layers, errors, widths, middle, floor)
        if plan.weight_bytes > most_bytes or plan.bops > most_bops:
            dear = middle
            continue
        cheap = middle
        if best is None or plan.error < best.error:
            best = plan
    return best


def quantization_error(layers: Sequence[LayerInfo], bits: Mapping[str, LayerBits], errors: Errors) -> float:
    """Return the predicted error of the samples when the layers have these bits: the sum over operands."""
    total = 0.0
    for info in layers:
        own = bits[info.name]
        if info.kind == "attention":
            total += _attention_error(errors, info.name, own.input)
            continue
        total += _error(errors, info.name, WEIGHT, own.weight)
        if info.shares is None:
            total += _error(errors, info.name, INPUT, own.input)
    return total


def plan_cost(layers: Iterable[LayerInfo], bits: Mapping[str, LayerBits]) -> tuple[float, int]:
    """Return the bytes of the weights and the bit operations of one forward pass."""
    pairs = [(info, bits[info.name]) for info in layers]
    return sum(_bytes(info, own.weight) for info, own in pairs), sum(_bops(info, own) for info, own in pairs)


def kept_layers(bits: Mapping[str, LayerBits]) -> tuple[KeptLayers, ...]:
    """Return the `--keep` options that give these layers these bits, one for each width in use."""
    groups: dict[LayerBits, list[str]] = {}
    for name, own in bits.items():
        groups.setdefault(own, []).append(name)
    return tuple(
        KeptLayers("|".join(re.escape(name) for name in names), own)
        for own, names in sorted(groups.items(), key=lambda pair: (pair[0].weight, pair[0].input))
    )


def bits_by_name(plans: Iterable[LayerPlan]) -> dict[str, LayerBits]:
    """Return what a network's layers have as `Plan.bits` holds it."""
    return {
        plan.info.name: LayerBits(plan.bits.qkv, plan.bits.qkv) if isinstance(plan.bits, AttentionBits) else plan.bits
        for plan in plans
    }


def _plan_at(
    layers: Sequence[LayerInfo], errors: Errors, widths: Sequence[int], power: float, floor: Mapping[str, LayerBits]
) -> Plan:
    """Return the plan at the price `10^power`, in units of the error of all operands at their fewest bits."""
    total = sum(max(found.values(), default=0.0) for found in errors.values()) or 1.0
    bits = _at_price(layers, errors, widths, total * 10**power, floor)
    return Plan(bits, quantization_error(layers, bits, errors), *plan_cost(layers, bits))


def _at_price(
    layers: Sequence[LayerInfo], errors: Errors, widths: Sequence[int], price: float, floor: Mapping[str, LayerBits]
) -> dict[str, LayerBits]:
    """Return the bits that minimise error plus price times cost, exactly: layers that read one input decide together."""
    reference = {info.name: REFERENCE for info in layers}
    bytes_unit, bops_unit = plan_cost(layers, reference)
    offered = sorted({*widths, FLOAT_BITS})

    def cost(info: LayerInfo, own: LayerBits) -> float:
        return price * (_bytes(info, own.weight) / max(bytes_unit, 1) + _bops(info, own) / max(bops_unit, 1))

    groups: dict[str, list[LayerInfo]] = {}
    chosen: dict[str, LayerBits] = {}
    least = LayerBits(offered[0], offered[0])
    for info in layers:
        if info.kind == "attention":
            allowed = [b for b in offered if b >= floor.get(info.name, least).input]
            best = min(
                allowed,
                key=lambda b, i=info: _attention_error(errors, i.name, b) + cost(i, LayerBits(b, b)),  # type: ignore[misc]
            )
            chosen[info.name] = LayerBits(best, best)
        else:
            groups.setdefault(info.shares or info.name, []).append(info)
    for owner, members in groups.items():
        best_total = math.inf
        lowest = max(floor.get(info.name, least).input for info in members)
        for inputs in (b for b in offered if b >= lowest):
            total, own = _error(errors, owner, INPUT, inputs), {}
            for info in members:
                price_of = {
                    b: _error(errors, info.name, WEIGHT, b) + cost(info, LayerBits(b, inputs))
                    for b in offered
                    if b >= floor.get(info.name, least).weight
                }
                best = min(price_of, key=lambda b, found=price_of: found[b])  # type: ignore[misc]
                total, own[info.name] = total + price_of[best], LayerBits(best, inputs)
            if total < best_total:
                best_total = total
                chosen.update(own)
    return {info.name: chosen[info.name] for info in layers}


def _error(errors: Errors, layer: str, operand: str, bits: int) -> float:
    """Return the error of one operand; a width between two measured ones has the coarser one's."""
    if bits >= FLOAT_BITS:
        return 0.0
    found = errors.get((layer, operand))
    if not found:
        return 0.0
    return found[max((b for b in found if b <= bits), default=min(found))]


def _attention_error(errors: Errors, layer: str, bits: int) -> float:
    return sum(_error(errors, layer, product, bits) for product in dict.fromkeys(PRODUCTS.values()))


def _bytes(info: LayerInfo, bits: int) -> float:
    if info.kind == "attention":
        return 0.0
    count = math.prod(info.shape)
    return count * (4.0 if bits >= FLOAT_BITS else bits / 8)


def _bops(info: LayerInfo, own: LayerBits) -> int:
    if info.kind != "attention":
        return own.operations(info.macs)
    return AttentionBits(own.input, FLOAT_BITS if own.input >= FLOAT_BITS else SOFTMAX_BITS).operations(info.macs)
