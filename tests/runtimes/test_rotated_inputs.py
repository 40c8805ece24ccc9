"""Rotated inputs in every runtime and format: the same floats, the same integers, the same files."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from families import component_directory
from helpers import rewrite_weights, tiny_pipeline, weights_of
from safetensors.torch import load_file
from synthetic import answer_at_second_step, relative_error, synthetic_network
from torch import Tensor

import dqtool
from dqtool.bench.integers import ENGINES
from dqtool.core.rotation import SIZES, factor, rotate
from dqtool.models.families import family_of
from dqtool.nn.packed_layer import PackedLayer
from dqtool.runtimes import integer_report
from dqtool.runtimes.cpu import convert, library
from dqtool.runtimes.cpu.product import Product

WIDE = {"block_out_channels": (16, 32)}


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, run: Run) -> Path:
    """Return the folder of a tiny model with rotated inputs, as `distilled` and as `exported`."""
    work = tmp_path_factory.mktemp("rotation")
    tiny_pipeline(work / "tiny", downsample_padding=0, **WIDE)
    weights = load_file(weights_of(work / "tiny"))
    norms = {
        name: t * torch.where(torch.arange(len(t)) % 11 == 3, 10, 1) for name, t in weights.items() if is_norm(name)
    }
    rewrite_weights(work / "tiny", norms)
    for arguments in (
        ("dilate", "tiny"),
        ("calibrate", "--steps", "3", "--samples", "12", "--scaling", "rotation", "--bits", "6/6"),
        ("distill", "--bits", "6/6", "--iters", "0", "--refine-iters", "0"),
        ("export",),
        ("export", "--format", "dense", "-o", "dense"),
    ):
        result = run(*arguments, cwd=work)
        assert result.returncode == 0, result.stderr
    return work


def is_norm(name: str) -> bool:
    """Return whether the tensor is the gain of a norm."""
    return "norm" in name and name.endswith(".weight")


def rotated_network(name: str, directory: Path, bits: str = "4/4") -> Any:
    """Return a packed network of a family, with every input rotated that a group fits."""
    return synthetic_network(str(component_directory(name, directory / "model")), bits, 3, rotated=True)


@pytest.mark.parametrize("size", SIZES)
def test_the_kernel_rotates_to_the_same_bits(size: int) -> None:
    kernels = library.get()
    if kernels is None:
        pytest.skip(library.problem() or "no kernels")
    x = torch.randn(37, 3 * size) * torch.logspace(-6, 6, 3 * size)
    out = torch.empty_like(x)
    kernels.dq_rotate(x.data_ptr(), out.data_ptr(), x.numel() // size, size, factor(size))
    assert torch.equal(out, rotate(x, size))


@pytest.mark.parametrize("name", ["unet2d", "unet2d_condition", "dit", "flux"])
def test_the_cpu_engine_rotates_what_the_simulation_rotates(name: str, tmp_path: Path) -> None:
    simulated = rotated_network(name, tmp_path, "6/6")
    engine = convert(copy.deepcopy(simulated))
    turned = [m for m in engine.modules() if isinstance(m, Product) and m.rotation]
    assert len(turned) > 4
    expected = answer_at_second_step(simulated)
    assert (
        relative_error(answer_at_second_step(engine), expected) < 2e-2
    )  # a code on a tie may differ, and 6 bits make it 1/64 of a range
    for product in turned:
        product.rotation = 0
    assert relative_error(answer_at_second_step(engine), expected) > 5e-2


@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_the_integers_of_rotated_inputs_are_the_reference_s(engine: str, tmp_path: Path) -> None:
    if engine == "openvino":
        pytest.importorskip("openvino")
    network = rotated_network("unet2d", tmp_path)
    assert sum(isinstance(m, PackedLayer) and m.rotation > 0 for m in network.modules()) > 10
    counted = list(ENGINES[engine](network))
    assert all(different == 0 for _, _, different in counted)


def test_every_layer_of_the_cpu_engine_gives_the_simulation_s_output(exported: Path) -> None:
    simulated = dqtool.load(str(exported / "exported"), "simulate")
    engine = dqtool.load(str(exported / "exported"), "cpu")
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in simulated.named_modules():
        module.register_forward_hook(
            lambda _m, args, y, name=name: seen.__setitem__(name, (args[0], y)) if args else None
        )
    x, step = torch.randn(2, 1, 8, 8), simulated.timesteps[1]
    with torch.no_grad():
        simulated(x, step)
        engine(x, step)
        products = {n: m for n, m in engine.named_modules() if isinstance(m, Product) and n in seen}
        assert sum(bool(m.rotation) for m in products.values()) > 5
        for name, product in products.items():
            given, expected = seen[name]
            assert relative_error(product(given), expected) < 1e-5, name


@pytest.mark.parametrize("runtime", ["cpu", "openvino"])
def test_runtimes_of_an_export_agree_with_the_simulation(exported: Path, runtime: str) -> None:
    if runtime == "openvino":
        pytest.importorskip("openvino")
    simulated = dqtool.load(str(exported / "exported"), "simulate")
    network = dqtool.load(str(exported / "exported"), runtime)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for step in simulated.timesteps.tolist():
        with torch.no_grad():
            assert relative_error(network(x, step).sample, simulated(x, step).sample) < 5e-2
    assert set(integer_report(network).values()) == {"int8"}


def test_manifest_plan_and_inspect_tell_of_the_rotation(exported: Path, run: Run) -> None:
    note = json.loads((exported / "exported" / "dqtool.json").read_text())
    sizes = {layer.get("rotation", 0) for layer in note["layers"]}
    assert sizes > {0}
    assert sizes <= {0, *SIZES}
    assert all(not layer["dilated"] for layer in note["layers"] if layer.get("rotation"))
    assert note["metrics"]["bytes_predicted"] == note["metrics"]["bytes"]
    shown = run("inspect", "exported", cwd=exported).stdout
    assert "rotated" in shown


def test_the_teacher_of_a_rotated_artifact_is_the_original(exported: Path) -> None:
    from dqtool.artifacts import open_artifact
    from dqtool.stages.shared.artifact_models import teacher_of

    calibrated, dilated = (open_artifact(str(exported / f"{n}.safetensors")) for n in ("calibrated", "dilated"))
    one, two = (teacher_of(a.manifest, a.tensors()) for a in (calibrated, dilated))
    for name, weight in one.named_parameters():
        other = two.get_parameter(name)
        assert float((weight - other).abs().max()) <= 1e-6 * float(other.abs().max().clamp(min=1e-9)), name


def test_dense_exports_and_dequantized_networks_turn_weights_back(exported: Path) -> None:
    packed = dqtool.load(str(exported / "exported"), "simulate")
    dense = dqtool.load(str(exported / "dense"), "simulate")
    layers = {n: m for n, m in packed.named_modules() if isinstance(m, PackedLayer) and m.rotation}
    floats = {}
    for name, layer in layers.items():
        floats[name] = layer.float_weight().clone()
        x = torch.randn((2, layer.in_channels, 5, 5) if layer.is_conv else (3, layer.in_features))
        torch.testing.assert_close(
            layer.multiply(layer.transform_input(x)), dense.get_submodule(name)(x), rtol=1e-4, atol=1e-5
        )
    assert len(floats) > 5
    packed.dequantize()
    for name, weight in floats.items():
        torch.testing.assert_close(packed.get_submodule(name).weight, weight)


@pytest.mark.parametrize("runtime", ["cpu", "simulate"])
def test_diffusers_loads_and_saves_rotated_networks(exported: Path, tmp_path: Path, runtime: str) -> None:
    from diffusers import UNet2DModel

    config = dqtool.DqtoolConfig(runtime=runtime)
    network = UNet2DModel.from_pretrained(exported / "exported" / "unet", quantization_config=config)
    network.save_pretrained(tmp_path / "saved")
    again = dqtool.load(str(tmp_path / "saved"), runtime)
    packed = dqtool.load(str(exported / "exported"), "simulate")
    x, step = torch.randn(1, 1, 8, 8), packed.timesteps[1]
    with torch.no_grad():
        expected = packed(x, step).sample
        assert relative_error(network(x, step).sample, expected) < 5e-2
        assert torch.equal(again(x, step).sample, network(x, step).sample)


def test_a_group_that_does_not_fit_is_refused(exported: Path) -> None:
    from dqtool.artifacts import read_manifest
    from dqtool.errors import ArtifactError
    from dqtool.models.networks.packed import packed_network, plans_from

    manifest = read_manifest(exported / "exported")
    place = next(i for i, layer in enumerate(manifest.layers) if layer.role == "input")
    layers = list(manifest.layers)
    layers[place] = replace(layers[place], rotation=16)
    state = dqtool.load(str(exported / "exported"), "simulate").state_dict()
    with pytest.raises(ArtifactError, match="groups of 16"):
        packed_network("UNet2DModel", manifest.network.config, plans_from(layers), state)


def test_graphs_of_a_converted_network_rotate(tmp_path: Path) -> None:
    engine = convert(rotated_network("unet2d", tmp_path))
    expected = answer_at_second_step(engine)
    program = torch.export.export(
        engine, (torch.zeros(2, 3, 8, 8), torch.tensor(50.0)), {"return_dict": False}, strict=False
    )
    torch.manual_seed(0)
    example = family_of(type(engine).__name__, "test").example(dict(engine.config), batch=2)
    got = program.module()(example["sample"], torch.tensor(50.0), return_dict=False)[0]
    assert relative_error(got, expected) < 1e-5
