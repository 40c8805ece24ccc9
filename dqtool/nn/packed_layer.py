"""The shipped form of a quantized Conv2d or Linear: packed codes that are dequantized once, on first use."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dqtool.core.affine import SYMMETRIC_BITS
from dqtool.core.bits import LayerBits
from dqtool.core.packing import packed_words, unpack
from dqtool.nn.adaptable import Adaptable
from dqtool.nn.branch import BRANCH, LowRankBranch, branch_shapes
from dqtool.nn.layers import QuantLayer
from dqtool.nn.steps import StepIndex

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["PackedLayer", "packed_shapes"]


class PackedLayer(Adaptable, QuantLayer):
    """The shipped form: `weight_packed` int32, `weight_scale` `[C_out]` float32, `weight_zero_point` uint8 (absent on the
    symmetric 8-bit grid), `weight_shape`. Not trainable."""

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    weight: Tensor

    def __init__(
        self, like: nn.Module, bits: LayerBits, steps: StepIndex, shapes: Mapping[str, tuple[tuple[int, ...], str]]
    ) -> None:
        """Allocate empty buffers for a checkpoint; `shapes` maps each tensor's name to (shape, torch dtype name)."""
        super().__init__(like, bits, steps)
        for name in ("bias", "dilation", "input_scale", "input_zero_point"):
            self.register_buffer(name, None)
        device: torch.device = like.weight.device  # type: ignore[assignment]
        empty = {k: torch.empty(shape, dtype=getattr(torch, t), device=device) for k, (shape, t) in shapes.items()}
        down, up = empty.pop(f"{BRANCH}.down", None), empty.pop(f"{BRANCH}.up", None)
        if down is not None and up is not None:
            self.low_rank = LowRankBranch(down, up, self.geometry)
        for name, buffer in empty.items():
            self.register_buffer(name, buffer)
        self._expanded: Tensor | None = None

    def __getattr__(self, name: str) -> Tensor:
        """Return `qweight` as the `weight` of a quantized layer: some networks read its dtype or device."""
        if name == "weight" and "weight_scale" in self.__dict__.get("_buffers", ()):
            return self.weight_scale
        found: Tensor = super().__getattr__(name)  # type: ignore[assignment]
        return found

    @property
    def qweight(self) -> Tensor:
        """See `Adaptable.qweight`."""
        return self.weight if "weight" in self._buffers else self.weight_scale

    def geometry_of_float(self) -> dict[str, object]:
        """See `Adaptable.geometry_of_float`."""
        if not self.is_conv:
            return {"in_features": self.in_features, "out_features": self.out_features}
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation_taps,
            "groups": self.groups,
        }

    def codes(self) -> Tensor:
        """Return the centred weight codes that an integer kernel multiplies, int32, in the weight's shape."""
        words, zero_points, bits, shape = self.packed_codes()
        codes = unpack(words, bits, shape[1:].numel()).to(torch.int32)
        return (codes - zero_points.to(torch.int32)[:, None]).view(shape)

    def packed_codes(self) -> tuple[Tensor, Tensor, int, torch.Size]:
        """Return (packed words, zero points uint8 `[C_out]`, bits, shape of the weight)."""
        return self.weight_packed, self._zero_points(), self.bits.weight, self._weight_shape()

    def quantized_weight(self) -> Tensor:
        """Return the dequantized weight, made once and kept."""
        if "weight" in self._buffers:
            return self.weight
        if self._expanded is None or self._expanded.device != self.weight_scale.device:
            if torch.compiler.is_compiling():  # the graph's own
                codes = self.codes().to(self.weight_scale.dtype)
                return codes * self.weight_scale.view(-1, *(1,) * (codes.dim() - 1))
            with torch.inference_mode(False), torch.no_grad():  # kept for calls that need gradients, too
                codes = self.codes().to(self.weight_scale.dtype)
                self._expanded = codes * self.weight_scale.view(-1, *(1,) * (codes.dim() - 1))
        return self._expanded

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Apply `fn` to all tensors, and forget the dequantized weight: it would stay where the layer was."""
        self._expanded = None
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _weight_shape(self) -> torch.Size:
        if self.is_conv:
            return torch.Size((self.out_channels, self.in_channels // self.groups, *self.kernel_size))
        return torch.Size((self.out_features, self.in_features))

    def _zero_points(self) -> Tensor:
        if "weight_zero_point" in self._buffers:
            return self.weight_zero_point
        return torch.full_like(self.weight_scale, 2 ** (self.bits.weight - 1), dtype=torch.uint8)

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        self._expanded = None
        super()._load_from_state_dict(*args, **kwargs)


def packed_shapes(
    weight_shape: tuple[int, ...], bits: LayerBits, timesteps: int, dilated: int, bias: bool, low_rank: int = 0
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shape and dtype of every tensor of a packed layer, for `PackedLayer` and the cost model.

    `dilated` is the number of in-channels with a dilation factor, 0 for none; `low_rank` is the rank of the layer's
    branch, 0 for none.
    """
    out_channels, taps = weight_shape[0], torch.Size(weight_shape[1:]).numel()
    shapes: dict[str, tuple[tuple[int, ...], str]] = {}
    if bits.quantizes_weight:
        shapes["weight_packed"] = ((out_channels, packed_words(taps, bits.weight)), "int32")
        shapes["weight_scale"] = ((out_channels,), "float32")
        if bits.weight != SYMMETRIC_BITS:
            shapes["weight_zero_point"] = ((out_channels,), "uint8")
        shapes["weight_shape"] = ((len(weight_shape),), "int32")
    else:
        shapes["weight"] = (tuple(weight_shape), "float32")
    if bits.quantizes_input:
        shapes["input_scale"] = ((timesteps,), "float32")
        shapes["input_zero_point"] = ((timesteps,), "uint8")
    if dilated:
        shapes["dilation"] = ((dilated,), "float32")
    if bias:
        shapes["bias"] = ((out_channels,), "float32")
    return shapes | branch_shapes(weight_shape, low_rank)
