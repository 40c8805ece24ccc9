"""The compressed-tensors export: the library decompresses it, and layers that it can't hold are refused by name."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import Run
from helpers import refused
from safetensors.torch import load_file

import dqtool
from dqtool.core.bits import LayerBits
from dqtool.errors import ArtifactError
from dqtool.formats.compressed_tensors import refuse
from dqtool.graph.trace import LayerInfo
from dqtool.nn.assignment import LayerPlan
from dqtool.nn.surgery import quant_layers

pytest.importorskip("compressed_tensors")

KEEP = ("--keep", r".*conv.*=16/16", "--keep", r".*attentions\.\d+=16/16")
"""Options that leave everything but the tiny model's linear layers in float."""


def export(run: Run, made: Path, directory: Path, bits: str, *keep: str, steps: str = "1") -> None:
    """Write a `dq` directory of the tiny model, not dilated, and the artifacts it is made from."""
    for arguments in (
        ("dilate", str(made / "tiny"), "--scaling", "none"),
        ("calibrate", "--steps", steps, "--samples", "8", "--scaling", "keep"),
        ("distill", "--bits", bits, "--iters", "0", "--refine-iters", "0", *KEEP, *keep),
        ("export", "-o", "dq"),
    ):
        result = run(*arguments, cwd=directory)
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("bits", "steps", "keep"),
    [("4/16", "4", ()), ("4/4", "1", ("--keep", "time_embedding.linear_1=8/8")), ("3/8", "1", ()), ("6/5", "1", ())],
)
def test_the_library_reads_it(
    made: Path, tmp_path: Path, run: Run, bits: str, steps: str, keep: tuple[str, ...]
) -> None:
    from compressed_tensors.compressors.base import decompress_module
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from diffusers import UNet2DModel

    export(run, made, tmp_path, bits, *keep, steps=steps)
    result = run("export", "-o", "ct", "--format", "compressed-tensors", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    config = json.loads((tmp_path / "ct" / "unet" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    quantization = QuantizationConfig.model_validate(config.pop("quantization_config"))
    state = load_file(tmp_path / "ct" / "unet" / "diffusion_pytorch_model.safetensors")
    network = UNet2DModel.from_config(config)
    apply_quantization_config(network, quantization)
    reference = quant_layers(dqtool.load(str(tmp_path / "dq"), "simulate"))
    compared = 0
    for name, layer in reference.items():
        module = network.get_submodule(name)
        own = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
        if not layer.bits.quantizes_weight:
            assert torch.equal(own["weight"], layer.weight)
            continue
        scheme = module.quantization_scheme
        assert scheme.weights.num_bits == layer.bits.weight
        from compressed_tensors.compressors import BaseCompressor

        plain = BaseCompressor.get_value_from_registry("pack-quantized").decompress(own, scheme)
        assert torch.equal(plain["weight"], layer.quantized_weight()), name
        if layer.bits.quantizes_input:
            assert scheme.input_activations.num_bits == layer.bits.input
            from compressed_tensors.quantization.lifecycle.forward import fake_quantize

            x = torch.randn(3, own["weight_shape"][1]) * layer.input_scale[0] * 8
            got = fake_quantize(x, own["input_scale"], own["input_zero_point"], scheme.input_activations)
            different = (got - layer.quantize_input(x)).abs() > 1e-6
            assert (
                different.float().mean() < 0.01
            )  # the library divides where dqtool multiplies, so that ties may differ
        compared += 1
    assert compared == sum(1 for layer in reference.values() if not layer.is_conv)
    assert decompress_module is not None


def test_what_it_cannot_hold_is_named(made: Path, tmp_path: Path, run: Run) -> None:
    result = run("distill", str(made / "calibrated.safetensors"), "--iters", "0", "-o", "d.safetensors", cwd=tmp_path)
    assert result.returncode == 0
    said = refused(run, tmp_path, 3, "export", "d.safetensors", "-o", "ct", "--format", "compressed-tensors")
    assert "convolutions are quantized: conv_in and " in said
    assert "attention products are quantized: " in said
    assert "the quantizers of 4 steps differ: time_embedding.linear_1 and " in said
    assert " ... " not in said


def test_reasons_are_whole_however_long_the_names_are() -> None:
    plans = [
        LayerPlan(info=LayerInfo(f"{'block.' * 40}{kind}.{n}", kind, (2, 2), 4), bits=LayerBits(4, 8))
        for kind in ("conv2d", "linear")
        for n in range(3)
    ]
    tensors = {f"{plan.info.name}.{key}": torch.arange(2.0) for plan in plans for key in ("input_scale", "dilation")}
    with pytest.raises(ArtifactError) as caught:
        refuse(plans, tensors, "d.safetensors")
    said = str(caught.value)
    assert "convolutions are quantized: 3 layers; the quantizers of 2 steps differ: 3 layers" in said
    assert "export with --format dq" in said and " ... " not in said and len(said) <= 500


def test_without_the_extra(made: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    export(run, made, tmp_path, "4/16", steps="1")
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    said = refused(run, tmp_path, 4, "export", "-o", "ct", "--format", "compressed-tensors")
    assert 'pip install "dqtool[compressed-tensors]"' in said
