"""Promises of every adapter: blocks in execution order, every layer accounted for, equivalence, steps, round trips."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import NETWORKS, build, component_directory
from torch import nn

import dqtool
from dqtool.artifacts import open_artifact
from dqtool.core.bits import LayerBits
from dqtool.core.detail import detail
from dqtool.core.quantization import QuantizationSpec
from dqtool.graph.attention import is_attention
from dqtool.models.families import FAMILIES, family_of
from dqtool.models.sampling.sampler import SAMPLERS, Sampler, initial_noise, make_sampler
from dqtool.nn.assignment import assign_bits
from dqtool.nn.prediction import attach_prediction, row_shapes
from dqtool.nn.steps import StepIndex
from dqtool.nn.surgery import insert_fake, steps_of
from dqtool.stages.calibrate import CalibrateOptions, calibrate
from dqtool.stages.dilate import DilateOptions, dilate
from dqtool.stages.distill import DistillOptions, distill
from dqtool.stages.eval import EvalOptions, evaluate
from dqtool.stages.export import ExportOptions, export
from dqtool.stages.shared.settings import RunSettings

QUIET = RunSettings(quiet=True)
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}


@pytest.fixture(scope="module", params=NETWORKS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def chain(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All five stages on a bare component with random conditions."""
    directory = tmp_path_factory.mktemp(name)
    model = component_directory(name, directory / "model")
    at = {stage: str(directory / f"{stage}.safetensors") for stage in ("dilated", "calibrated", "distilled")}
    dilate(DilateOptions(str(model), at["dilated"]), QUIET)
    calibrate(
        CalibrateOptions(at["dilated"], at["calibrated"], steps=3, samples=9, batch_size=4, random_conditions=True),
        QUIET,
    )
    distill(DistillOptions(at["calibrated"], at["distilled"], iters=2, refine_iters=2), QUIET)
    export(ExportOptions(at["distilled"], str(directory / "exported")), QUIET)
    evaluate(EvalOptions(str(directory / "exported"), str(directory / "eval.json"), samples=4, batch_size=4), QUIET)
    return directory


def test_the_adapters_all_have_a_tiny_network() -> None:
    assert {config["_class_name"] for config in NETWORKS.values()} == set(FAMILIES)


def test_blocks_come_in_execution_order_and_every_layer_is_accounted_for(name: str) -> None:
    config, network = NETWORKS[name], build(name)
    family = family_of(config["_class_name"], "test")
    traced = family.graph(network, config).trace
    layers = {n for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert {info.name for info in traced.layers if info.kind != "attention"} == layers
    products = {n for n, m in network.named_modules() if is_attention(m)}
    assert {info.name for info in traced.layers if info.kind == "attention"} == products
    assert products
    roles = {info.role for info in traced.layers}
    assert {"input", "output"} <= roles
    inside = {n for n in layers if any(n == b.name or n.startswith(b.name + ".") for b in traced.blocks)}
    assert inside == layers
    order: list[str] = []
    for block in traced.blocks:
        network.get_submodule(block.name).register_forward_hook(lambda _m, _a, _y, n=block.name: order.append(n))
    with torch.no_grad():
        network(**family.example(config))
    assert list(dict.fromkeys(order)) == [block.name for block in traced.blocks]
    assert all(order.index(r) < order.index(b.name) for b in traced.blocks for r in b.reads)


def test_one_number_a_channel_reaches_that_channel_of_what_the_network_returns(name: str) -> None:
    config, network = NETWORKS[name], build(name)
    family = family_of(config["_class_name"], "test")
    example = family.example(config, batch=2)
    x = torch.randn(2, *family.sample_shape(config), generator=torch.Generator().manual_seed(0))
    channels = x.shape[1]
    factors = 2 + torch.arange(channels, dtype=torch.float32)  # 1 would show nothing
    conditions = family.conditions(config, 2, torch.Generator().manual_seed(0))
    timestep = example["timestep"][:1].reshape(()) if example["timestep"].dim() else example["timestep"]
    rows = family.per_channel(factors[None], 1.0, config)
    assert rows.shape[1:] == family.prediction_row(config)
    with torch.no_grad():
        plain = family.predict(network, x, timestep, conditions)
        network.register_forward_hook(lambda _m, _a, y: (y[0] * rows, *y[1:]))
        scaled = family.predict(network, x, timestep, conditions)
    expected = plain.clone()
    expected[:, :channels] *= factors.view(1, -1, *(1,) * (x.dim() - 2))
    assert torch.allclose(scaled, expected)


def test_predictions_of_images_are_corrected_with_the_input_that_they_answer(name: str) -> None:
    config, network = NETWORKS[name], build(name)
    family = family_of(config["_class_name"], "test")
    rows = row_shapes(family.prediction_row(config))
    if "detail" not in rows:
        assert set(rows) == {"scale", "bias"}
        return
    x = torch.randn(2, *family.sample_shape(config), generator=torch.Generator().manual_seed(0))
    conditions = family.conditions(config, 2, torch.Generator().manual_seed(0))
    numbers = {"scale": 2.0, "bias": 0.5, "detail": 0.25, "input": -1.0, "input_detail": 3.0}
    one = torch.ones(1, x.shape[1])
    tables = {k: family.per_channel(v * one, float(k == "scale"), config) for k, v in numbers.items()}
    timestep = torch.tensor(10.0)
    with torch.no_grad():
        plain = family.predict(network, x, timestep, conditions)
        network.__dict__["_dqtool_steps"] = StepIndex(timestep[None])
        attach_prediction(network, tables)
        changed = family.predict(network, x, timestep, conditions)
    first = plain[:, : x.shape[1]]
    expected = 2 * first + 0.5 - x + detail(0.25 * first + 3 * x)
    assert torch.allclose(changed[:, : x.shape[1]], expected, atol=1e-4)
    assert torch.equal(changed[:, x.shape[1] :], plain[:, x.shape[1] :])


def test_attention_on_float_operands_is_that_of_diffusers(name: str) -> None:
    config, network = NETWORKS[name], build(name)
    family = family_of(config["_class_name"], "test")
    example = family.example(config, batch=3)
    with torch.no_grad():
        expected = network(**example, return_dict=False)[0]
        traced = family.graph(network, config).trace
        insert_fake(network, assign_bits(traced.layers, QuantizationSpec(LayerBits(16, 16))), torch.arange(3.0), {})
        found = network(**example, return_dict=False)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_every_call_of_every_sampler_finds_its_own_step(name: str) -> None:
    config, network = NETWORKS[name], build(name)
    family = family_of(config["_class_name"], "test")
    traced = family.graph(network, config).trace
    flow = name in ("sd3", "flux")
    given = family.conditions(config, 2, torch.Generator().manual_seed(0))
    null = {key: value[:1] for key, value in given.items()}
    for kind in ["euler"] if flow else SAMPLERS:
        scheduler = make_sampler(FLOW if flow else None, kind)
        sampler = Sampler(family, scheduler, 4, guidance=2.0, tokens=family.tokens(config))
        quantized = build(name)
        timesteps = sampler.timesteps()
        insert_fake(quantized, assign_bits(traced.layers, QuantizationSpec(LayerBits(16, 16))), timesteps, {})
        asked, used = [], []

        def see(
            x: torch.Tensor,
            t: torch.Tensor,
            _y: torch.Tensor,
            quantized: nn.Module = quantized,
            asked: list[float] = asked,
            used: list[float] = used,
        ) -> None:
            assert len(x) == 4
            asked.append(float(t))
            used.append(float(steps_of(quantized).timesteps[steps_of(quantized).rows]))

        sampler.run(quantized, initial_noise(family.sample_shape(config), range(2), 0), given, [1, 2], see, null)
        assert used == pytest.approx(asked, rel=1e-6)
        assert not steps_of(quantized).missed
        assert set(asked) == set(timesteps.tolist())


def test_all_stages_run_and_dilation_changes_nothing(name: str, chain: Path) -> None:
    dilated = open_artifact(chain / "dilated.safetensors").manifest
    layers = {n for n, m in build(name).named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    reasons = dilated.metrics.as_read.get("kept_float", {})
    assert layers == {record.name for record in dilated.layers if record.kind != "attention"} | set(reasons)
    assert all(reasons.values())
    exported = open_artifact(chain / "exported").manifest
    assert [record.name for record in exported.layers] == [record.name for record in dilated.layers]
    assert all(max(record.bits) <= 8 for record in exported.layers)
    calibrated = open_artifact(chain / "calibrated.safetensors").manifest  # where the default scaling is chosen
    assert calibrated.metrics.as_read["equivalence_error"] < 1e-5
    assert calibrated.metrics.as_read["unsaturated_share"] > 0.1
    widened = dilate(DilateOptions(str(chain / "model"), str(chain / "wd.safetensors"), scaling="wd"), QUIET)
    metrics = open_artifact(widened).manifest.metrics.as_read
    assert metrics["equivalence_error"] < 1e-5
    assert metrics["unsaturated_share"] > 0.1
    figures = open_artifact(chain / "eval.json").manifest.metrics.as_read
    assert figures["psnr"]["mean"] > 5
    assert figures["missed_timesteps"] == []
    losses = open_artifact(chain / "distilled.safetensors").manifest.metrics.as_read["block_loss"]
    assert set(losses) == {block["name"] for block in dilated.metrics.as_read["blocks"]}


def test_export_loads_as_what_was_distilled(name: str, chain: Path) -> None:
    import diffusers

    config = NETWORKS[name]
    family = family_of(config["_class_name"], "test")
    exported = str(chain / "exported")
    ours = dqtool.load(exported, runtime="simulate")
    theirs = getattr(diffusers, config["_class_name"]).from_pretrained(
        exported, quantization_config=dqtool.DqtoolConfig(runtime="simulate")
    )
    with torch.no_grad():
        for timestep in ours.timesteps[:2]:
            example = family.example(config, batch=2)
            example["timestep"] = timestep.expand(2)
            assert torch.equal(ours(**example, return_dict=False)[0], theirs(**example, return_dict=False)[0])
    theirs.save_pretrained(chain / "again")
    weights = "diffusion_pytorch_model.safetensors"
    assert (chain / "again" / weights).read_bytes() == (chain / "exported" / weights).read_bytes()
