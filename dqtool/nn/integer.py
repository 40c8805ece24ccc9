"""The integer form of a packed network as plain tensors, which every integer engine starts from.

An operand `x` becomes integer codes `c = clip(round(x * m), low, high)` with per-step `m`, `low`, `high`; the product of
codes is exact in int32; `y = scale_t * weight_scale_j * sum(c * w) + bias_j`. Codes are *centred* (the stored code minus
its zero point), so zero padding is exact and there is no correction term. Only an 8-bit asymmetric input does not fit
int8 that way: its codes stay unsigned, `u = c + zero_point_t`, a convolution pads with `zero_point_t`, and
`zero_point_t * sum(w_j)` is subtracted. `m` is bit for bit what the simulation multiplies with (`core/affine.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqtool.core.affine import SYMMETRIC_BITS, levels, lowest_code
from dqtool.core.packing import unpack
from dqtool.core.rotation import rotate
from dqtool.graph.attention import own_processor
from dqtool.nn.attention import OPERANDS, QuantAttnProcessor
from dqtool.nn.branch import LowRankBranch
from dqtool.nn.packed_layer import PackedLayer

__all__ = [
    "IntegerAttention",
    "IntegerLayer",
    "Operand",
    "PackedCodes",
    "accumulate",
    "integer_attention",
    "integer_layer",
    "runs_as",
]


@dataclass(frozen=True)
class Operand:
    """Quantizer of one operand: the tables that turn it into integer codes at each of `T` steps.

    `scale` float32 and `zero_point` int32 are `[T]` (`[T, H]` for attention operands; `T` is 1 for a static quantizer).
    `divisor` is the dilation `[C_in]` or None. `lowest` is the smallest stored code (1 on the symmetric 8-bit grid).
    `signed`: centred codes fit int8; else stored codes `c + zero_point` fit uint8.
    """

    bits: int
    scale: Tensor
    zero_point: Tensor
    lowest: int = 0
    divisor: Tensor | None = None

    @property
    def signed(self) -> bool:
        """Return whether centred codes fit int8: true up to 7 bits, and for symmetric quantizers."""
        return self.bits < SYMMETRIC_BITS or self.lowest > 0

    @property
    def steps(self) -> int:
        """Number of rows of the tables."""
        return self.scale.shape[0]

    def row(self, step: int) -> int:
        """Return the row of the tables for `step`; always 0 for a static quantizer."""
        return step if self.steps > 1 else 0

    def multiplier(self, step: int) -> Tensor:
        """Return `1 / (scale_t * divisor)`, float32: `[]`, `[C_in]` with a divisor, or `[H]`."""
        scale = self.scale[self.row(step)]
        return (scale if self.divisor is None else scale * self.divisor).reciprocal()

    def multipliers(self) -> Tensor:
        """Return the multipliers of all steps: `[T]`, `[T, C_in]` with a divisor, or `[T, H]`."""
        return (self.scale if self.divisor is None else self.scale[:, None] * self.divisor).reciprocal()

    @property
    def low(self) -> Tensor:
        """Smallest centred code of each step, int32, shaped like `scale`."""
        return self.lowest - self.zero_point

    @property
    def high(self) -> Tensor:
        """Largest centred code of each step, int32, shaped like `scale`."""
        return levels(self.bits) - self.zero_point

    @property
    def offset(self) -> Tensor:
        """Return the input zero point of the kernel, int32, shaped like `scale`: stored code minus centred code.

        It is 0 where `signed`, else the zero point.
        """
        return torch.zeros_like(self.zero_point) if self.signed else self.zero_point

    def codes(self, x: Tensor, step: int, channel_dim: int = -1) -> Tensor:
        """Return the centred codes of `x` at `step`, int32, shaped like `x`.

        `channel_dim` is the dimension of the divisor. Attention operands are `[N, H, S, D]`.
        """
        row = self.row(step)
        m, low, high = self.multiplier(step), self.low[row], self.high[row]
        if self.scale.dim() == 2:
            m, low, high = (t.view(-1, 1, 1) for t in (m, low, high))
        elif self.divisor is not None:
            m = m.view(-1, *(1,) * (-1 - channel_dim if channel_dim < 0 else x.dim() - 1 - channel_dim))
        return (x * m).round_().clamp_(low.to(x.dtype), high.to(x.dtype)).to(torch.int32)


@dataclass(frozen=True)
class PackedCodes:
    """Packed codes of a weight as the file stores them.

    `words` int32 `[C_out, ceil(K * bits / 32)]` (`core/packing.py`); `zero_points` uint8 `[C_out]`; `shape` of the weight.
    """

    words: Tensor
    zero_points: Tensor
    bits: int
    shape: torch.Size

    def unpack(self) -> Tensor:
        """Return the centred codes, int8, in the weight's shape."""
        codes = unpack(self.words, self.bits, self.shape[1:].numel())
        return codes.sub_(self.zero_points[:, None]).view(torch.int8).view(self.shape)  # modulo 256 is two's complement


@dataclass(frozen=True)
class IntegerLayer:
    """A convolution or linear layer in integers.

    `input` is None when the input stays float; `weight` int8 centred codes `[C_out, C_in/groups, kh, kw]` or
    `[C_out, C_in]` with `weight_scale` `[C_out]`, or float32 with `weight_scale` None. `is_integer` says that both are
    integers; otherwise dequantize the weight, divide the input by `divisor` and multiply in float. `weight_sum` int32
    `[C_out]` is for inputs that are not `signed`, unpadded taps included. Convolutions carry their geometry.

    `low_rank` is a float branch of the layer's own input that is added to its output. `rotation` is the group size of the
    rotation between that input and `input`, 0 for none.

    `source` holds the packed codes of an integer weight. `weight` is then on the `meta` device until `unpacked` creates
    it; engines that read packed codes never need it.
    """

    input: Operand | None
    weight: Tensor
    weight_scale: Tensor | None
    bias: Tensor | None
    divisor: Tensor | None
    is_conv: bool
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    taps_dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    source: PackedCodes | None = None
    low_rank: LowRankBranch | None = None
    rotation: int = 0

    def codes(self, x: Tensor, step: int) -> Tensor:
        """Return the centred codes of the layer's own input `x` `[N, C, H, W]` or `[..., C]` at `step`, int32."""
        assert self.input is not None
        dim = 1 if self.is_conv else -1
        return self.input.codes(rotate(x, self.rotation, dim), step, dim)

    def unpacked(self) -> IntegerLayer:
        """Return the layer with its weight in memory, unpacked from `source`."""
        if self.source is None:
            return self
        return replace(self, weight=self.source.unpack(), source=None)

    @property
    def is_integer(self) -> bool:
        """Return whether the product can run on integers, that is, both operands are codes."""
        return self.input is not None and self.weight_scale is not None

    @property
    def weight_sum(self) -> Tensor:
        """`sum_j` of the weight codes, int32 `[C_out]`."""
        return self.weight.flatten(1).sum(1, dtype=torch.int32)


@dataclass(frozen=True)
class IntegerAttention:
    """The operands of both attention products by name (`q`, `k`, `v`, `probs`); a missing one stays float.

    `scores = scale_q * scale_k * sum(q * k) * attn.scale`, `out = scale_probs * scale_v * sum(probs * v)`, per head.
    """

    operands: dict[str, Operand]
    heads: int

    @property
    def is_integer(self) -> bool:
        """Return whether both products can run on integers."""
        return all(name in self.operands for name in OPERANDS)


def integer_layer(layer: PackedLayer, keep_packed: bool = False) -> IntegerLayer:
    """Return the integer form of a packed layer; `is_integer` is False where its weight or input is float.

    `keep_packed` leaves the weight's codes in `source`.

    Raises:
        TypeError: a convolution whose padding has no integer form.
    """
    operand = None
    if layer.input_scale is not None and layer.input_zero_point is not None:
        operand = Operand(
            layer.bits.input,
            layer.input_scale.to(torch.float32),
            layer.input_zero_point.to(torch.int32),
            0,
            layer.dilation,
        )
    quantized = layer.bits.quantizes_weight
    source = PackedCodes(*layer.packed_codes()) if quantized else None
    if source is None:
        weight = layer.weight
    else:
        weight = torch.empty(source.shape, dtype=torch.int8, device="meta") if keep_packed else source.unpack()
    return IntegerLayer(
        input=operand,
        weight=weight,
        weight_scale=layer.weight_scale if quantized else None,
        bias=layer.bias,
        divisor=layer.dilation,
        is_conv=layer.is_conv,
        source=source if keep_packed else None,
        low_rank=layer.low_rank,
        rotation=layer.rotation,
        **(_geometry(layer) if layer.is_conv else {}),
    )


def integer_attention(attn: nn.Module) -> IntegerAttention:
    """Return the operands of a diffusers attention module that carries `QuantAttnProcessor`'s tables."""
    processor: QuantAttnProcessor = own_processor(attn)
    operands: dict[str, Operand] = {}
    for name in OPERANDS:
        scale: Tensor | None = getattr(attn, f"{name}_scale", None)
        if scale is None:
            continue
        bits = processor.bits.of(name)
        zero_point: Tensor | None = getattr(attn, f"{name}_zero_point", None)
        if zero_point is None:
            zero_point = torch.full_like(scale, 0 if name == "probs" else 2 ** (bits - 1))
        lowest = lowest_code(bits, symmetric=name != "probs")
        operands[name] = Operand(bits, scale.to(torch.float32), zero_point.to(torch.int32), lowest)
    return IntegerAttention(operands, next((operand.scale.shape[1] for operand in operands.values()), 0))


def runs_as(kind: str, weight_bits: int, input_bits: int) -> str:
    """Return the arithmetic that an integer runtime uses for a layer: "int8", or "float" with the reason.

    Limits of one machine are not considered; its runtime reports them at load.
    """
    if kind == "attention":
        wide = max(weight_bits, input_bits) > 8
        return "float: its operands are not quantized" if wide else "int8"
    if weight_bits > 8 or input_bits > 8:
        which = "weights and inputs are" if min(weight_bits, input_bits) > 8 else "weights are"
        return f"float: its {which if weight_bits > 8 else 'inputs are'} not quantized"
    return "int8"


def accumulate(codes: Tensor, layer: IntegerLayer) -> Tensor:
    """Return the reference accumulators `sum(c * w)`, int64, for centred input `codes` `[N, C, H, W]` or `[N, ..., C]`.

    Computed in float64, where every product and sum below 2^53 is exact.
    """
    x, w = codes.to(torch.float64), layer.weight.to(torch.float64)
    if layer.is_conv:
        y = F.conv2d(x, w, None, layer.stride, layer.padding, layer.taps_dilation, layer.groups)
    else:
        y = F.linear(x, w)
    return y.to(torch.int64)


def _geometry(layer: PackedLayer) -> dict[str, Any]:
    pairs = {"stride": layer.stride, "padding": layer.padding, "taps_dilation": layer.dilation_taps}
    out: dict[str, Any] = {}
    for key, value in pairs.items():
        if not isinstance(value, tuple):
            raise TypeError(f"padding mode '{value}' has no integer form")
        out[key] = (int(value[0]), int(value[1]))
    return {**out, "groups": layer.groups}
