"""`onnx-qdq`: the ONNX graph with QuantizeLinear and DequantizeLinear nodes of constant scale, as TensorRT reads it.

The graph is that of the `onnx` format (`formats/onnx.py`) in all but its products. An operand is multiplied by its step's number,
rounded and clipped, and the codes pass a pair of nodes with scale 1 and zero point 0: constants, whatever the step. Weights are int8
constants behind a DequantizeLinear with a scale per out-channel. Codes that don't fit int8 are moved by 128, and 128 times the sums of
the weight are added back. ONNX Runtime runs the graph exactly; nobody has built it with TensorRT yet.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dqtool.artifacts import Artifact
from dqtool.formats import Exported
from dqtool.formats.onnx import CENTRE, EXTRA, GRAPH, prepare_with
from dqtool.nn.integer import IntegerLayer
from dqtool.nn.traceable_codes import ProductForm, is_signed

__all__ = ["EXTRA", "GRAPH", "prepare"]


def prepare(distilled: Artifact) -> Exported:
    """Prepare the network as ONNX with QDQ nodes; see `formats.onnx.prepare`."""
    return prepare_with(distilled, QdqProduct())


class QdqProduct(ProductForm):
    """Products in float between nodes that say int8. Sums below 2^24 are exact."""

    def mark(self, codes: Tensor, signed: bool) -> Tensor:
        """Return the codes unchanged: the product marks them."""
        return codes

    def layer(self, codes: Tensor, weight: Tensor, weight_scale: Tensor, layer: IntegerLayer) -> Tensor:
        """Multiply marked codes with a dequantized weight; see `ProductForm.layer`."""
        signed = is_signed(layer)
        marked = _marked(codes, signed)
        w = DequantizeWeight.apply(weight, weight_scale)  # type: ignore[no-untyped-call]
        if layer.is_conv:
            padding = layer.padding if signed else (0, 0)
            y = F.conv2d(marked, w, None, layer.stride, padding, layer.taps_dilation, layer.groups)
        else:
            y = F.linear(marked, w)
        if signed:
            return y
        moved = CENTRE * weight.to(torch.float32).flatten(1).sum(1) * weight_scale
        return y + (moved.view(-1, 1, 1) if layer.is_conv else moved)

    def matmul(self, a: Tensor, b: Tensor, signed: bool) -> Tensor:
        """Multiply two tensors of codes; see `ProductForm.matmul`."""
        y = _marked(a, signed) @ _marked(b, True)
        return y if signed else y + CENTRE * b.sum(-2, keepdim=True)


def _marked(codes: Tensor, signed: bool) -> Tensor:
    """Return int8 codes, or unsigned ones minus 128, behind a pair of nodes with scale 1 and zero point 0."""
    return torch.fake_quantize_per_tensor_affine(codes if signed else codes - CENTRE, 1.0, 0, -128, 127)


class DequantizeWeight(torch.autograd.Function):
    """ONNX's DequantizeLinear of an int8 constant `[C_out, ...]` with a scale per out-channel."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor) -> Tensor:
        return weight.to(torch.float32) * scale.view(-1, *(1,) * (weight.dim() - 1))

    @staticmethod
    def symbolic(g: Any, weight: Any, scale: Any) -> Any:
        """Return the node that the exporter writes."""
        return g.op("DequantizeLinear", weight, scale, axis_i=0)
