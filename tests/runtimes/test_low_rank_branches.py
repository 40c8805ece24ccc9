"""Low-rank branches in every runtime and format: the same integers, the same sums, the same files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from families import component_directory
from helpers import tiny_pipeline
from synthetic import answer_at_second_step, relative_error, synthetic_network
from torch import nn

import dqtool
from dqtool.bench.integers import ENGINES
from dqtool.core.quantization import QuantizationSpec
from dqtool.models.families import family_of
from dqtool.nn.assignment import assign_bits, with_branches
from dqtool.nn.branch import LowRankBranch
from dqtool.nn.low_rank import attach_low_rank
from dqtool.nn.packed_layer import PackedLayer
from dqtool.nn.surgery import insert_fake
from dqtool.runtimes import integer_report
from dqtool.runtimes.cpu import convert
from dqtool.runtimes.cpu.product import Product

RANK = 3


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, run: Run) -> Path:
    """Return the folder of a tiny model that is quantized at 4/4 with branches, as `distilled` and as `exported`."""
    work = tmp_path_factory.mktemp("low_rank")
    tiny_pipeline(work / "tiny", downsample_padding=0)
    for arguments in (
        ("dilate", "tiny"),
        ("calibrate", "--steps", "3", "--samples", "12"),
        ("distill", "--iters", "0", "--refine-iters", "0", "--low-rank", str(RANK)),
        ("export",),
        ("export", "--format", "dense", "-o", "dense"),
    ):
        result = run(*arguments, cwd=work)
        assert result.returncode == 0, result.stderr
    return work


@pytest.mark.filterwarnings("ignore:timestep:dqtool.errors.DqtoolWarning")
@pytest.mark.parametrize("name", ["unet2d", "dit"])
def test_without_quantizers_a_network_with_branches_is_the_float_network(name: str, tmp_path: Path) -> None:
    from dqtool.models.networks.loading import load_weights
    from dqtool.models.sources.resolve import resolve_model

    source = resolve_model(str(component_directory(name, tmp_path / "model")))
    family = family_of(source.class_name, "test")
    network = family.build(source.config)
    network.load_state_dict(load_weights(source))
    network.eval()
    layers = family.graph(network, source.config).trace.layers
    arguments = family.example(source.config, batch=2)
    with torch.no_grad():
        expected = network(**arguments, return_dict=False)[0]
        plans = with_branches(assign_bits(layers, QuantizationSpec.parse("4/4")), RANK)
        insert_fake(network, plans, torch.arange(3.0), {})
        attach_low_rank(network, plans)
        got = network(**arguments, return_dict=False)[0]
    assert sum(isinstance(m, LowRankBranch) for m in network.modules()) > 10
    assert float((got - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize("name", ["unet2d", "unet2d_condition", "dit", "flux"])
def test_the_cpu_engine_adds_the_branches_that_the_simulation_adds(name: str, tmp_path: Path) -> None:
    path = component_directory(name, tmp_path / "model")
    simulated = synthetic_network(str(path), "6/6", steps=3, low_rank=RANK)
    engine = convert(copy.deepcopy(simulated))
    branched = [m for m in engine.modules() if isinstance(m, Product) and m.low_rank is not None]
    assert branched
    expected = answer_at_second_step(simulated)
    assert (
        relative_error(answer_at_second_step(engine), expected) < 2e-2
    )  # a code on a tie may differ, and 6 bits make it 1/64 of a range
    for product in branched:
        product.low_rank = None
    assert relative_error(answer_at_second_step(engine), expected) > 5e-2


def test_every_layer_of_the_cpu_engine_adds_its_branch(tmp_path: Path) -> None:
    from dqtool.nn.integer import integer_layer
    from dqtool.runtimes.cpu import choose_product
    from dqtool.runtimes.cpu.codes import CurrentStep

    path = component_directory("unet2d_condition", tmp_path / "model")
    network = synthetic_network(str(path), "4/4", steps=3, low_rank=RANK)
    seen = 0
    for layer in network.modules():
        if isinstance(layer, PackedLayer) and layer.low_rank is not None:
            product = choose_product(integer_layer(layer), CurrentStep())
            assert product is not None
            layer.steps.select(torch.zeros(1, dtype=torch.long))
            channels = layer.in_channels if layer.is_conv else layer.in_features
            x = torch.randn((2, channels, 6, 5) if layer.is_conv else (2, 7, channels))
            with torch.no_grad():
                torch.testing.assert_close(product(x), layer(x), rtol=1e-4, atol=1e-4)
            seen += 1
    assert seen > 20


@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_the_integers_beside_branches_are_the_reference_s(engine: str, tmp_path: Path) -> None:
    if engine == "openvino":
        pytest.importorskip("openvino")
    network = synthetic_network(str(component_directory("unet2d", tmp_path / "model")), "4/4", 3, low_rank=RANK)
    counted = list(ENGINES[engine](network))
    assert len(counted) > 10
    assert all(different == 0 for _, _, different in counted)


@pytest.mark.parametrize("runtime", ["cpu", "openvino"])
def test_runtimes_of_an_export_agree_with_the_simulation(exported: Path, runtime: str) -> None:
    if runtime == "openvino":
        pytest.importorskip("openvino")
    simulated = dqtool.load(str(exported / "exported"), "simulate")
    network = dqtool.load(str(exported / "exported"), runtime)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        steps = simulated.timesteps.tolist()
        found = sorted(relative_error(network(x, step).sample, simulated(x, step).sample) for step in steps)
    assert found[-2] < 5e-2 and found[-1] < 0.3, found  # a code on a tie may differ, and 4 bits make it 1/16 of a range
    assert set(integer_report(network).values()) == {"int8"}


def test_size_cost_and_manifest_count_the_branches(exported: Path, run: Run) -> None:
    note = json.loads((exported / "exported" / "dqtool.json").read_text())
    ranks = [layer.get("low_rank", 0) for layer in note["layers"]]
    assert set(ranks) == {0, RANK}
    assert note["metrics"]["bytes_predicted"] == note["metrics"]["bytes"]
    shown = run("inspect", "exported", cwd=exported).stdout
    assert "low-rank branches in 16 bits" in shown
    assert " rank " in shown
    plan = json.loads(
        run("distill", "--low-rank", str(RANK), "--iters", "0", "--refine-iters", "0", "-o", "x.safetensors",
            "--dry-run", "--json", cwd=exported).stdout
    )  # fmt: skip
    assert plan["work"]["bytes"] == (exported / "distilled.safetensors").stat().st_size
    assert plan["work"]["bops"] == note["metrics"]["bops"]


def test_reported_weight_errors_are_those_of_residual_and_branch(exported: Path) -> None:
    from dqtool.artifacts import read_manifest
    from dqtool.page.quantization_errors import quantization_errors
    from dqtool.page.results import Result

    chain = {stage: exported / f"{stage}.safetensors" for stage in ("calibrated", "distilled")}
    stages = {"calibrate": chain["calibrated"], "distill": chain["distilled"]}
    manifest = read_manifest(str(chain["distilled"]))
    found = quantization_errors(Result("cell", chain["distilled"], manifest, stages))
    ranked = {layer.name for layer in manifest.layers if layer.low_rank}
    assert len(ranked) > 10
    assert all(found.weights[name].total < 0.02 for name in ranked)


def test_dense_exports_and_dequantized_networks_hold_the_branch(exported: Path) -> None:
    packed = dqtool.load(str(exported / "exported"), "simulate")
    dense = dqtool.load(str(exported / "dense"), "simulate")
    layers = {n: m for n, m in packed.named_modules() if isinstance(m, PackedLayer) and m.low_rank is not None}
    floats = {name: layer.float_weight().clone() for name, layer in layers.items()}
    packed.dequantize()
    for name, weight in floats.items():
        torch.testing.assert_close(dense.get_submodule(name).weight, weight)
        torch.testing.assert_close(packed.get_submodule(name).weight, weight)


@pytest.mark.parametrize("runtime", ["cpu", "simulate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_diffusers_loads_and_saves_branches(exported: Path, tmp_path: Path, runtime: str, dtype: torch.dtype) -> None:
    from diffusers import UNet2DModel

    config = dqtool.DqtoolConfig(runtime=runtime)
    network = UNet2DModel.from_pretrained(exported / "exported" / "unet", quantization_config=config, torch_dtype=dtype)
    packed = dqtool.load(str(exported / "exported"), "simulate")
    own = packed.state_dict()
    branches = [name for name in own if ".low_rank." in name]
    assert branches
    network.save_pretrained(tmp_path / "saved")
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "saved" / "diffusion_pytorch_model.safetensors")
    assert saved.keys() == own.keys()
    for name in branches:
        assert saved[name].dtype == torch.float16
        assert torch.equal(saved[name], own[name])
    again = dqtool.load(str(tmp_path / "saved"), runtime)
    x, step = torch.randn(1, 1, 8, 8), packed.timesteps[1]
    with torch.no_grad():
        assert relative_error(again(x, step).sample, packed(x, step).sample) < (5e-2 if dtype == torch.float32 else 0.3)


def test_a_lora_adds_to_the_branch(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    path = component_directory("unet2d_condition", tmp_path / "model")
    simulated = synthetic_network(str(path), "6/6", steps=3, low_rank=RANK)
    network: Any = convert(copy.deepcopy(simulated))
    name = "down_blocks.0.resnets.0.conv1"
    layer = simulated.get_submodule(name)
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 8, 3, 3, generator=generator), torch.randn(8, 2, 1, 1, generator=generator) * 0.2
    before = answer_at_second_step(network)
    state = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    network.load_lora_adapter(state, prefix=None, adapter_name="one")
    conv = nn.functional.conv2d
    layer.register_forward_hook(lambda layer, args, y: y + conv(conv(args[0], a, None, 1, layer.padding), b))
    expected = answer_at_second_step(simulated)
    assert relative_error(answer_at_second_step(network), expected) < 2e-2
    assert relative_error(before, expected) > 5e-2
    network.unload_lora()
    assert torch.equal(answer_at_second_step(network), before)


def test_a_rank_that_a_layer_can_t_have_is_refused(exported: Path, tmp_path: Path) -> None:
    from dqtool.artifacts.records import LayerRecord
    from dqtool.artifacts.schema import unchecked
    from dqtool.errors import ArtifactError
    from dqtool.models.networks.packed import packed_network, plans_from

    note = json.loads((exported / "exported" / "dqtool.json").read_text())
    for layer in note["layers"]:
        if layer.get("low_rank"):
            layer["low_rank"] = 1 << 15
    state = dqtool.load(str(exported / "exported"), "simulate").state_dict()
    with pytest.raises(ArtifactError, match="rank 32768"):
        packed_network(
            "UNet2DModel",
            note["model"]["config"],
            plans_from([unchecked(layer, LayerRecord) for layer in note["layers"]]),
            state,
        )


def test_graphs_of_a_converted_network_hold_the_branches(tmp_path: Path) -> None:
    network = synthetic_network(str(component_directory("unet2d", tmp_path / "model")), "4/4", 3, low_rank=RANK)
    engine = convert(network)
    expected = answer_at_second_step(engine)
    program = torch.export.export(
        engine, (torch.zeros(2, 3, 8, 8), torch.tensor(50.0)), {"return_dict": False}, strict=False
    )
    assert any(node.op == "get_attr" or "conv" in str(node.target) for node in program.graph.nodes)
    torch.manual_seed(0)
    example = family_of(type(engine).__name__, "test").example(dict(engine.config), batch=2)
    got = program.module()(example["sample"], torch.tensor(50.0), return_dict=False)[0]
    assert relative_error(got, expected) < 1e-5
