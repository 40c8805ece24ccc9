"""`onnx`: an ONNX graph with the step tables inside, whose products are ConvInteger and MatMulInteger.

The component's directory holds `model.onnx` (with `model.onnx_data` if it is too large for one file) and the diffusers
`config.json`. Inputs are the network's arguments by name; `timestep` is float32 `[1]`, or `[N]` for mixed steps. Batch,
height, width and sequence lengths are dynamic where the network allows. ONNX Runtime has no integer product that reads
4-bit weights, so weights of any width are int8 constants, on disk and in memory. On x86 CPUs without VNNI its 8-bit
products overflow 16 bits unless the session sets `session.x64quantprecision = 1`, which selects slower, exact kernels.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dqtool.artifacts import Artifact
from dqtool.core.cost import FLOAT32
from dqtool.formats import Exported, require
from dqtool.formats.tracing import dynamic_axes, quiet_tracing, traced_arguments
from dqtool.models.families import family_of
from dqtool.models.networks.checked_artifacts import checked_tensors
from dqtool.models.networks.packed import packed_network, plans_of
from dqtool.nn.integer import IntegerLayer
from dqtool.nn.traceable import TraceableNetwork
from dqtool.nn.traceable_codes import ProductForm, is_signed

__all__ = ["CENTRE", "EXTRA", "GRAPH", "prepare", "prepare_with"]

EXTRA = "onnx"
GRAPH = "model.onnx"
OPSET = 17
CENTRE = 128
"""Zero point of signed codes, which ONNX Runtime's kernels take as unsigned ones."""

LARGEST = 2**31 - 2**24
"""Bytes that fit one protobuf file, with room for the graph."""


def prepare(distilled: Artifact) -> Exported:
    """Prepare the network as ONNX. The manifest lists for each layer if its products are integer operations (`runs`).

    Raises:
        EnvironmentFault: onnx is not installed.
    """
    return prepare_with(distilled, IntegerProduct())


def prepare_with(distilled: Artifact, product: ProductForm) -> Exported:
    """Prepare the network as ONNX with products of this form."""
    require("onnx", EXTRA)
    manifest = distilled.manifest
    family = family_of(manifest.network.class_name, distilled.given)
    config = dict(manifest.network.config)
    network = packed_network(manifest.network.class_name, config, plans_of(manifest), checked_tensors(distilled))
    example = family.example(config, batch=2)
    traceable = TraceableNetwork(network.requires_grad_(False), example, product, family.sample)
    layers = [replace(layer, runs="int8" if max(layer.bits or FLOAT32) <= 8 else "float") for layer in manifest.layers]
    tensors = traced_arguments(example, family.timestep)

    def write(directory: Path) -> None:
        import onnx

        with TemporaryDirectory(dir=directory) as scratch, torch.no_grad(), quiet_tracing():
            torch.onnx.export(
                traceable,
                tuple(tensors.values()),
                str(Path(scratch) / GRAPH),
                input_names=list(tensors),
                output_names=["out_sample"],
                dynamic_axes={n: dynamic_axes(tensor, family.traced_size) for n, tensor in tensors.items()}
                | {family.timestep: {0: "steps"}},
                opset_version=OPSET,
                dynamo=False,
            )
            graph = onnx.load(str(Path(scratch) / GRAPH))
        large = sum(len(tensor.raw_data) for tensor in graph.graph.initializer) > LARGEST
        onnx.save_model(graph, str(directory / GRAPH), save_as_external_data=large, location=f"{GRAPH}_data")

    return Exported(config, layers, write)


class IntegerProduct(ProductForm):
    """Products by ONNX's integer operators, with unsigned activations, a constant zero point and signed weights."""

    def mark(self, codes: Tensor, signed: bool) -> Tensor:
        """Return the codes unchanged: they stay in float until the product converts them."""
        return codes

    def layer(self, codes: Tensor, weight: Tensor, weight_scale: Tensor, layer: IntegerLayer) -> Tensor:
        """Multiply codes with a weight by ConvInteger or MatMulInteger; see `ProductForm.layer`."""
        signed = is_signed(layer)
        unsigned, zero_point = unsigned_codes(codes, signed)
        if layer.is_conv:
            padding = layer.padding if signed else (0, 0)
            y = ConvInteger.apply(  # type: ignore[no-untyped-call]
                unsigned, weight, zero_point, layer.stride, padding, layer.taps_dilation, layer.groups
            )
            convolved: Tensor = y.to(torch.float32) * weight_scale.view(-1, 1, 1)
            return convolved
        result: Tensor = (
            MatMulInteger.apply(unsigned, weight.t().contiguous(), zero_point).to(torch.float32) * weight_scale  # type: ignore[no-untyped-call]
        )
        return result

    def matmul(self, a: Tensor, b: Tensor, signed: bool) -> Tensor:
        """Multiply two tensors of codes by MatMulInteger; see `ProductForm.matmul`."""
        unsigned, zero_point = unsigned_codes(a, signed)
        result: Tensor = MatMulInteger.apply(unsigned, b.to(torch.int8), zero_point).to(torch.float32)  # type: ignore[no-untyped-call]
        return result


def unsigned_codes(codes: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Return uint8 codes and their zero point."""
    shifted = codes + CENTRE if signed else codes
    return shifted.to(torch.uint8), torch.tensor(CENTRE if signed else 0, dtype=torch.uint8)


class ConvInteger(torch.autograd.Function):
    """ONNX's ConvInteger: the int32 convolution of `x - zero_point` with `weight`; padding counts as zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, zero_point: Tensor, *geometry: Any) -> Tensor:
        stride, padding, dilation, groups = geometry
        centred = x.to(torch.float64) - zero_point.to(torch.float64)
        return F.conv2d(centred, weight.to(torch.float64), None, stride, padding, dilation, groups).to(torch.int32)

    @staticmethod
    def symbolic(g: Any, x: Any, weight: Any, zero_point: Any, *geometry: Any) -> Any:
        """Return the node that the exporter writes."""
        stride, padding, dilation, groups = geometry
        return g.op(
            "ConvInteger",
            x,
            weight,
            zero_point,
            strides_i=list(stride),
            pads_i=[*padding, *padding],
            dilations_i=list(dilation),
            group_i=groups,
        )


class MatMulInteger(torch.autograd.Function):
    """ONNX's MatMulInteger: the int32 product of `x - zero_point` with `y`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, zero_point: Tensor) -> Tensor:
        return ((x.to(torch.float64) - zero_point.to(torch.float64)) @ y.to(torch.float64)).to(torch.int32)

    @staticmethod
    def symbolic(g: Any, x: Any, y: Any, zero_point: Any) -> Any:
        """Return the node that the exporter writes."""
        return g.op("MatMulInteger", x, y, zero_point)
