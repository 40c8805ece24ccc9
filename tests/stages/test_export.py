"""Exported directories: their size is the one predicted, and both formats are what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dqtool
from dqtool.artifacts import open_artifact
from dqtool.core.cost import bops_ratio
from dqtool.core.quantization import QuantizationSpec
from dqtool.formats.shapes import network_shapes, predicted_bytes
from dqtool.models.families import FAMILIES
from dqtool.models.networks.packed import planned_record
from dqtool.nn.assignment import assign_bits
from dqtool.nn.surgery import quant_layers, state_shapes
from dqtool.stages.distill import DistillOptions, distill
from dqtool.stages.export import ExportOptions, export
from dqtool.stages.shared.settings import RunSettings

CIFAR10 = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 2,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "downsample_padding": 0,
    "norm_eps": 1e-6,
}
"""google/ddpm-cifar10-32."""


@pytest.mark.parametrize("bits", ["4/4", "6/6", "5/3", "8/8", "4/16"])
def test_the_cost_model_predicts_the_file_to_the_byte(made: Path, tmp_path: Path, bits: str) -> None:
    distilled = distill(
        DistillOptions(str(made / "calibrated.safetensors"), str(tmp_path / "d.safetensors"), bits=bits, iters=0),
        RunSettings(quiet=True),
    )
    output = export(ExportOptions(distilled, str(tmp_path / "out")), RunSettings(quiet=True))
    metrics = open_artifact(output).manifest.metrics.as_read
    assert metrics["bytes"] == metrics["bytes_predicted"]
    assert metrics["bytes"] == (tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size


def test_cifar10_architecture_is_an_eighth_at_four_bits() -> None:
    family = FAMILIES["UNet2DModel"]
    with torch.device("meta"):
        network = family.build(CIFAR10)
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(35.75e6, rel=0.001)
    traced = family.graph(network, network.config).trace
    names = [info.name for info in traced.layers if info.kind != "attention"]
    plans = assign_bits(traced.layers, QuantizationSpec.parse("4/4"), dilated=names)
    shapes = network_shapes(family, CIFAR10)
    full, packed = predicted_bytes(shapes), predicted_bytes(state_shapes(shapes, plans, 100))
    assert full / packed >= 7.5
    six = assign_bits(traced.layers, QuantizationSpec.parse("6/6"))
    records = list(map(planned_record, six))
    assert 26 < bops_ratio(records) < 28.5


def test_dense_is_a_plain_model_with_low_bit_weights(made: Path, tmp_path: Path) -> None:
    from diffusers import UNet2DModel

    output = export(
        ExportOptions(str(made / "distilled.safetensors"), str(tmp_path / "dense"), "dense"), RunSettings(quiet=True)
    )
    plain = UNet2DModel.from_pretrained(str(tmp_path / "dense" / "unet"))
    packed = dqtool.load(str(made / "exported"))
    for name, layer in quant_layers(packed).items():
        weight = plain.get_submodule(name).weight.detach()
        if layer.dilation is not None:
            shape = (1, -1, *(1,) * (weight.dim() - 2))
            weight = weight * layer.dilation.view(shape)
        torch.testing.assert_close(weight, layer.quantized_weight(), rtol=1e-6, atol=1e-8)
    x = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(dqtool.load(output)(x, 10).sample, plain(x, 10).sample)


def test_ends_run_at_eight_bits_and_keep_overrides(made: Path, tmp_path: Path) -> None:
    output = distill(
        DistillOptions(
            str(made / "calibrated.safetensors"),
            str(tmp_path / "d.safetensors"),
            iters=0,
            keep=(r"time_embedding\..*=16/16", "conv_out=6/6"),
        ),
        RunSettings(quiet=True),
    )
    bits = {layer.name: layer.bits for layer in open_artifact(output).manifest.layers}
    assert bits["conv_in"] == (8, 8)
    assert bits["conv_out"] == (6, 6)
    assert bits["time_embedding.linear_1"] == (16, 16)
    assert bits["mid_block.resnets.0.conv1"] == (4, 4)
    assert bits["mid_block.attentions.0"] == (8, 4)  # softmax output, q·k·v
