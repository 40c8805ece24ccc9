"""Loaded networks in the hands of pipelines: arguments, attributes, threads and dtypes as of the network they stand for."""

from __future__ import annotations

import copy
import inspect
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import build, component_directory
from synthetic import synthetic_network
from torch import Tensor, nn

import dqtool
from dqtool.errors import UsageError
from dqtool.graph.attention import is_attention
from dqtool.models.families import family_of
from dqtool.nn.call_lock import CallLock
from dqtool.runtimes import cpu
from dqtool.runtimes.cpu import convert
from dqtool.stages.calibrate import CalibrateOptions, calibrate
from dqtool.stages.dilate import DilateOptions, dilate
from dqtool.stages.distill import DistillOptions, distill
from dqtool.stages.export import ExportOptions, export
from dqtool.stages.shared.settings import RunSettings


@pytest.fixture(scope="session")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`simulated(name)`: a fresh network of that family at 6/6, made up."""
    made: dict[str, nn.Module] = {}

    def network(name: str) -> nn.Module:
        if name not in made:
            path: Path = component_directory(name, tmp_path_factory.mktemp(name) / "model")
            made[name] = synthetic_network(str(path), "6/6")
        return copy.deepcopy(made[name])

    return network


def example(network: nn.Module, batch: int = 2, row: int = 1) -> dict[str, Any]:
    """Arguments for one call, at a timestep of the table."""
    family = family_of(type(network).__name__, "test")
    hints = {"_context_tokens": 5, "_sample_size": 8}
    torch.manual_seed(0)
    arguments = family.example(hints | dict(network.config), batch=batch)
    return arguments | {"timestep": network.timesteps[row].expand(batch).clone(), "return_dict": False}


@pytest.mark.parametrize("name", ["unet2d_condition", "pixart", "sd3", "flux"])
def test_arguments_by_place_are_those_by_name(simulated: Any, name: str) -> None:
    network = simulated(name)
    engine = convert(copy.deepcopy(network))
    arguments = example(network)
    expected = engine(**arguments)[0]
    names = list(inspect.signature(type(network).forward).parameters)[1:]
    assert list(inspect.signature(engine.forward).parameters) == names
    last = max(names.index(key) for key in arguments if key != "return_dict")
    found = engine(*(arguments.get(key) for key in names[: last + 1]), return_dict=False)[0]
    assert torch.equal(found, expected)
    assert not engine.__dict__["_dqtool_steps"].missed


def test_mixed_steps_with_any_argument_first(simulated: Any) -> None:
    engine = convert(simulated("unet2d_condition"))
    arguments = example(engine) | {"timestep": engine.timesteps[[0, 3]]}
    assert torch.equal(engine(**{"return_dict": False, **arguments})[0], engine(**arguments)[0])
    backwards = dict(reversed(arguments.items()))
    assert next(iter(backwards)) == "return_dict"
    assert torch.equal(engine(**backwards)[0], engine(**arguments)[0])


def exported(name: str, directory: Path) -> str:
    """An export of the family's tiny network with random conditions, calibrated and not trained."""
    quiet = RunSettings(quiet=True)
    model = component_directory(name, directory / "model")
    at = {stage: str(directory / f"{stage}.safetensors") for stage in ("dilated", "calibrated", "distilled")}
    dilate(DilateOptions(str(model), at["dilated"], scaling="wd"), quiet)
    calibrate(
        CalibrateOptions(at["dilated"], at["calibrated"], steps=2, samples=4, random_conditions=True, scaling="keep"),
        quiet,
    )
    distill(DistillOptions(at["calibrated"], at["distilled"], bits="6/6", method="ptq"), quiet)
    export(ExportOptions(at["distilled"], str(directory / "exported")), quiet)
    return str(directory / "exported")


@pytest.mark.parametrize("runtime", ["cpu", "openvino"])
def test_what_pipelines_read_of_a_network(tmp_path: Path, runtime: str) -> None:
    if runtime == "openvino":
        pytest.importorskip("openvino")
    unet = dqtool.load(exported("sdxl", tmp_path / "sdxl"), runtime)
    assert unet.add_embedding.linear_1.in_features == unet.config.projection_class_embeddings_input_dim
    transformer = dqtool.load(exported("flux", tmp_path / "flux"), runtime)
    assert not hasattr(transformer, "add_embedding")
    with transformer.cache_context("cond"):
        pass


def in_threads(network: nn.Module, calls: list[dict[str, Any]], times: int) -> list[list[Tensor]]:
    """Return the outputs of each call, repeated `times` times, with one thread per call."""

    def repeat(arguments: dict[str, Any]) -> list[Tensor]:
        with torch.no_grad():
            return [network(**arguments)[0] for _ in range(times)]

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(repeat, calls))


@pytest.mark.parametrize("runtime", ["simulate", "cpu", "openvino"])
def test_calls_from_several_threads_keep_their_steps(tmp_path: Path, runtime: str) -> None:
    if runtime == "openvino":
        pytest.importorskip("openvino")
    network = dqtool.load(exported("unet2d", tmp_path), runtime)
    steps = dqtool.load(str(tmp_path / "exported"), "simulate").timesteps
    calls = [
        {"sample": torch.randn(1, 3, 8, 8), "timestep": steps[row], "return_dict": False} for row in range(len(steps))
    ]
    with torch.no_grad():
        alone = [network(**arguments)[0] for arguments in calls]
    for gave, expected in zip(in_threads(network, calls, 12), alone, strict=True):
        assert all(torch.equal(each, expected) for each in gave)
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert type(twin).__name__ == type(network).__name__ and twin.runtime == runtime
        with torch.no_grad():
            assert all(torch.equal(twin(**arguments)[0], y) for arguments, y in zip(calls, alone, strict=True))
            with lock_of(network), ThreadPoolExecutor(1) as pool:  # a copy waits for itself alone
                pool.submit(twin, **calls[0]).result(timeout=60)


def lock_of(network: nn.Module) -> CallLock:
    """The one lock of a loaded network."""
    (lock,) = (value for value in network.__dict__.values() if isinstance(value, CallLock))
    return lock


@pytest.mark.parametrize("runtime", ["simulate", "cpu"])
def test_attention_slicing_leaves_the_quantized_products(simulated: Any, runtime: str) -> None:
    network = simulated("unet2d_condition")
    network = convert(network) if runtime == "cpu" else network
    arguments = example(network)
    expected = network(**arguments)[0]
    processors = [m.processor for m in network.modules() if is_attention(m)]
    for pipeline_call in ("auto", "max", 1, None):
        network.set_attention_slice(pipeline_call)
        assert torch.equal(network(**arguments)[0], expected)
    assert [m.processor for m in network.modules() if is_attention(m)] == processors
    twin = copy.deepcopy(network)
    twin.set_attention_slice("auto")
    assert torch.equal(twin(**arguments)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["unet2d", "unet2d_condition", "pixart"])
def test_networks_moved_to_another_dtype_compute_as_before(simulated: Any, name: str, dtype: torch.dtype) -> None:
    engine = convert(simulated(name))
    arguments = example(engine)
    expected = engine(**arguments)[0]
    assert engine.dtype == expected.dtype == torch.float32
    moved = copy.deepcopy(engine).to(dtype)
    assert moved.dtype == dtype
    assert torch.equal(moved(**arguments)[0], expected)
    low = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    rounded = {k: v.float() if isinstance(v, Tensor) else v for k, v in low.items()}
    assert torch.equal(moved(**low)[0], engine(**rounded)[0].to(dtype))
    assert moved.dtype == dtype
    assert moved.to("cpu").dtype == dtype and moved.float().dtype == torch.float32
    assert torch.equal(moved(**arguments)[0], expected)


def test_a_network_on_integers_simulates_on_another_device(
    simulated: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    network = simulated("unet2d_condition")
    engine = convert(copy.deepcopy(network))
    arguments = example(network)
    engine(**arguments)
    twin = copy.deepcopy(engine)
    assert twin.half().dtype == torch.float16
    monkeypatch.setattr(cpu, "SERVED", ("cpu",))
    assert twin.to("meta") is twin
    assert "runtime: simulate from here on" in capsys.readouterr().err
    assert {p.device.type for p in twin.parameters()} == {"meta"} and twin.dtype == torch.float16
    assert torch.equal(cpu.simulated_again(engine)(**arguments)[0], network(**arguments)[0])
    assert type(engine) is type(network) and not cpu.integer_report(engine)


@pytest.mark.parametrize("name", ["unet2d_condition", "sd3"])
def test_a_batch_of_none_gives_none(simulated: Any, name: str) -> None:
    network = simulated(name)
    engine = convert(copy.deepcopy(network))
    arguments = {k: v[:0] if isinstance(v, Tensor) else v for k, v in example(network).items()}
    for timestep in (arguments["timestep"], network.timesteps[1:2]):
        expected = network(**arguments | {"timestep": timestep.expand(0)})[0]
        found = engine(**arguments | {"timestep": timestep})[0]
        assert found.shape == expected.shape and found.dtype == expected.dtype
        assert len(found) == 0
    assert engine(**example(engine))[0].isfinite().all()


@pytest.mark.parametrize("where", ["sample", "encoder_hidden_states"])
def test_nan_is_not_lost(simulated: Any, where: str) -> None:
    engine = convert(simulated("unet2d_condition"))
    arguments = example(engine)
    expected = engine(**arguments)[0]
    arguments[where].view(2, -1)[1, 3] = torch.nan
    found = engine(**arguments)[0]
    assert torch.equal(found[0], expected[0])
    assert found[1].isnan().all()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A small UNet with a context by OpenVINO, and simulated."""
    pytest.importorskip("openvino")
    directory = exported("unet2d_condition", tmp_path_factory.mktemp("compiled"))
    return dqtool.load(directory, "openvino"), dqtool.load(directory, "simulate")


def test_openvino_takes_the_residuals_of_other_networks(compiled: tuple[Any, Any]) -> None:
    network, simulated = compiled
    generator = torch.Generator().manual_seed(3)
    shapes = [(2, 8, 8, 8), (2, 8, 8, 8), (2, 8, 4, 4), (2, 16, 4, 4)]
    down = tuple(torch.randn(shape, generator=generator) for shape in shapes)
    middle = torch.randn(2, 16, 4, 4, generator=generator)
    controlled = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    for extra in (controlled, {"down_intrablock_additional_residuals": [down[2], down[3]]}):
        with torch.no_grad():
            expected = simulated(**example(simulated), **{k: v if k[0] == "m" else list(v) for k, v in extra.items()})[
                0
            ]
        found = network(**example(simulated), **extra)[0]
        # Codes at a rounding boundary may differ by one; without the residuals the output is another one.
        assert float((found - expected).norm() / expected.norm()) < 0.02
        assert float((network(**example(simulated))[0] - expected).norm() / expected.norm()) > 0.2


def test_openvino_says_what_a_graph_can_not(compiled: tuple[Any, Any]) -> None:
    network, simulated = compiled
    arguments = example(simulated)
    expected = network(**arguments)[0]
    assert torch.equal(network(**arguments, cross_attention_kwargs={"scale": 0.5})[0], expected)
    with pytest.raises(UsageError, match=r'masks.*runtime="cpu"'):
        network(**arguments, cross_attention_kwargs={"masks": "none"})
    for method in (
        "enable_freeu",
        "set_attn_processor",
        "enable_cache",
        "load_lora_adapter",
        "_load_ip_adapter_weights",
    ):
        with pytest.raises(UsageError, match=r'OpenVINO can.t .*runtime="cpu"'):
            getattr(network, method)()
    network.disable_freeu()


def test_pipelines_take_an_openvino_network(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    from diffusers import DDIMPipeline, DDIMScheduler

    directory = exported("unet2d", tmp_path / "unet")
    network, simulated = dqtool.load(directory, "openvino"), dqtool.load(directory, "simulate")
    DDIMPipeline(build("unet2d"), DDIMScheduler(num_train_timesteps=1000)).save_pretrained(tmp_path / "pipeline")
    pipeline = DDIMPipeline.from_pretrained(tmp_path / "pipeline", unet=network)
    assert pipeline.unet is network
    reference = DDIMPipeline(simulated, DDIMScheduler(num_train_timesteps=1000))
    images = []
    for each in (pipeline, reference):
        each.set_progress_bar_config(disable=True)
        images.append(
            each(num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="numpy").images
        )
    assert abs(images[0] - images[1]).max() < 1e-3
    assert pipeline.to(torch.bfloat16).dtype == torch.bfloat16
    assert network(torch.zeros(1, 3, 8, 8), simulated.timesteps[0]).sample.dtype == torch.float32
    with pytest.raises(UsageError, match="on the CPU"):
        network._apply(
            lambda t: SimpleNamespace(device=torch.device("cuda"), dtype=t.dtype)
        )  # `.to("cuda")` calls this
