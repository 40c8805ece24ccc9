"""The openvino runtime: the integers of the int64 reference in every layer, and the simulation's network end to end."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from families import dit_pipeline
from synthetic import synthetic_network
from torch import Tensor, nn

import dqtool
from dqtool.artifacts import open_artifact, store
from dqtool.errors import ArtifactError, DqtoolWarning, EnvironmentFault, UsageError
from dqtool.nn.integer import accumulate
from dqtool.nn.packed_layer import PackedLayer
from dqtool.nn.traceable import TraceableLayer
from dqtool.nn.traceable_codes import StepTables
from dqtool.runtimes import openvino_bf16
from dqtool.runtimes.choice import runtime_order
from dqtool.stages.calibrate import CalibrateOptions, calibrate
from dqtool.stages.dilate import DilateOptions, dilate
from dqtool.stages.distill import DistillOptions, distill
from dqtool.stages.export import ExportOptions, export
from dqtool.stages.shared.settings import RunSettings

openvino = pytest.importorskip("openvino")

from dqtool.formats.openvino import OpenVINOProduct, saturates, to_openvino  # noqa: E402

STEPS = 5


class Probe(nn.Module):
    """Quantizes one input per layer and multiplies: codes and accumulators of every layer, steps along the batch."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.tables = StepTables(network.timesteps)
        packed = {name: m for name, m in network.named_modules() if isinstance(m, PackedLayer)}
        self.names = list(packed)
        product = OpenVINOProduct(saturates())
        self.layers = nn.ModuleList(TraceableLayer(m, self.tables, product) for m in packed.values())
        self.tables.freeze()

    def forward(self, timestep: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        self.tables.enter(timestep)
        outputs = []
        for layer, x in zip(self.layers, inputs, strict=True):
            codes = layer.quantize(x)
            outputs += [codes, layer.product.layer(codes, layer.weight, torch.ones(len(layer.weight)), layer.form)]
        self.tables.leave()
        return tuple(outputs)


@pytest.mark.parametrize("bits", ["4/4", "6/6", "8/8"])
def test_accumulators_equal_the_reference_in_every_layer_and_step(bits: str) -> None:
    torch.manual_seed(0)
    network = synthetic_network("zoo:digits-ddpm", bits, STEPS)
    probe = Probe(network).eval()
    inputs = []
    for layer in probe.layers:
        channels = layer.weight.shape[1]
        inputs.append(torch.randn(STEPS, channels, 5, 6) if layer.form.is_conv else torch.randn(STEPS, 3, channels))
    model = to_openvino(probe, (network.timesteps, *inputs))
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    results = compiled([network.timesteps.numpy(), *(x.numpy() for x in inputs)])
    outputs = [torch.from_numpy(results[port]) for port in compiled.outputs]
    assert len(probe.names) == 77
    for index, (name, layer, x) in enumerate(zip(probe.names, probe.layers, inputs, strict=True)):
        form, operand = layer.form, layer.form.input
        codes = torch.cat([operand.codes(x[t : t + 1], t, channel_dim=1 if form.is_conv else -1) for t in range(STEPS)])
        expected = accumulate(codes, form)
        got_codes, got = outputs[2 * index], outputs[2 * index + 1]
        zero = torch.zeros(STEPS) if operand.signed else operand.zero_point.float()
        along = (-1, *(1,) * (x.dim() - 1))
        centred = got_codes - zero.view(along)
        if not operand.signed and form.is_conv and form.padding[0]:
            top, left = form.padding
            centred = centred[:, :, top:-top, left:-left]
        assert torch.equal(centred.to(torch.int32), codes), name
        out = (1, -1, 1, 1) if form.is_conv else (1, 1, -1)
        expected = expected + zero.view(along).long() * form.weight_sum.view(out)
        # int32 accumulators leave the engine as float32: compared after the same rounding.
        assert torch.equal(got, expected.to(torch.float32)), name
    run_as = {
        node.get_rt_info()["runtimePrecision"].astype(str)
        for node in compiled.get_runtime_model().get_ops()
        if node.get_rt_info()["layerType"].astype(str) in ("Convolution", "FullyConnected")
    }
    assert run_as <= {"i8", "u8"}


@pytest.fixture(scope="session")
def exported(made: Path, tmp_path_factory: pytest.TempPathFactory, run: Run) -> dict[str, Path]:
    """The tiny model at 6/6: exported as dq, and as openvino."""
    work = tmp_path_factory.mktemp("openvino")
    commands = [
        (
            *("distill", str(made / "calibrated.safetensors"), "--bits", "6/6", "--iters", "0"),
            *("--refine-iters", "0", "-o", "d.safetensors"),
        ),
        ("export", "d.safetensors", "-o", "dq"),
        ("export", "d.safetensors", "-o", "openvino", "--format", "openvino"),
    ]
    for arguments in commands:
        result = run(*arguments, cwd=work)
        assert result.returncode == 0, result.stderr
    return {name: work / name for name in ("dq", "openvino")}


@pytest.mark.parametrize("name", ["dq", "openvino"])
def test_network_follows_the_simulation_at_any_batch_resolution_and_step(exported: dict[str, Path], name: str) -> None:
    simulated, engine = dqtool.load(str(exported["dq"]), "simulate"), dqtool.load(str(exported[name]), "openvino")
    steps = simulated.timesteps
    for shape, timestep in (((1, 1, 8, 8), steps[0]), ((2, 1, 12, 16), steps[2]), ((2, 1, 8, 8), steps[[3, 1]])):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        expected, got = simulated(x, timestep).sample, engine(x, timestep).sample
        assert got.shape == expected.shape
        assert got.dtype == torch.float32
        assert (got - expected).norm() < 0.1 * expected.norm()  # a code on a rounding tie may fall either way
    assert torch.equal(engine(x, steps[1], return_dict=False)[0], engine(sample=x, timestep=int(steps[1])).sample)


def test_bf16_around_the_products_is_refused_or_near(
    exported: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = str(exported["dq"])
    assert "openvino-bf16" not in runtime_order(open_artifact(directory))[0]
    if openvino_bf16.available() is not None:
        with pytest.raises(EnvironmentFault, match="no bf16 instructions"):
            dqtool.load(directory, "openvino-bf16")
        # A processor without them computes in float32 whatever it is told: the way there is the same.
        monkeypatch.setattr(openvino_bf16, "available", lambda: None)
    network, simulated = dqtool.load(directory, "openvino-bf16"), dqtool.load(directory, "simulate")
    assert network.precision == "bf16"
    x, step = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)), simulated.timesteps[1]
    expected, got = simulated(x, step).sample, network(x, step).sample
    assert (got - expected).norm() < 0.3 * expected.norm()


def test_a_step_never_compiles_and_a_second_process_finds_the_graphs(
    exported: dict[str, Path], capsys: pytest.CaptureFixture
) -> None:
    x = torch.randn(3, 1, 8, 8)
    first = dqtool.load(str(exported["dq"]), "openvino")
    outputs = [first(x, t).sample for t in (0, 250, 999)]
    assert capsys.readouterr().err.count("compiling") == 1
    again = dqtool.load(str(exported["dq"]), "openvino")
    assert all(torch.equal(again(x, t).sample, y) for t, y in zip((0, 250, 999), outputs, strict=True))
    assert "compiling" not in capsys.readouterr().err


def test_a_damaged_cache_is_made_again(
    exported: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    x = torch.randn(1, 1, 8, 8)
    expected = dqtool.load(str(exported["dq"]), "openvino")(x, 0).sample
    shutil.copytree(Path(os.environ["DQTOOL_CACHE"]) / "openvino", tmp_path / "openvino")
    monkeypatch.setenv("DQTOOL_CACHE", str(tmp_path))
    for blob in tmp_path.rglob("*.blob"):
        blob.write_bytes(b"damaged")
    assert torch.equal(dqtool.load(str(exported["dq"]), "openvino")(x, 0).sample, expected)
    assert "made again" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_cache_is_done_without(
    exported: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o500)
    monkeypatch.setenv("DQTOOL_CACHE", str(tmp_path))
    assert dqtool.load(str(exported["dq"]), "openvino")(torch.randn(1, 1, 8, 8), 0).sample.shape == (1, 1, 8, 8)


def test_a_full_disk_is_no_bug(
    exported: dict[str, Path],
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """OpenVINO says it with a RuntimeError."""

    def full(*_args: object, **_options: object) -> None:
        raise RuntimeError("basic_ios::clear: iostream error")

    graph = exported["openvino"] / "unet" / "openvino_model.xml"
    for module in ("dqtool.formats.openvino", "dqtool.runtimes.openvino_graphs"):  # tracing again takes seconds
        monkeypatch.setattr(f"{module}.build_ir", lambda *_, **__: openvino.Core().read_model(graph))
    monkeypatch.setattr(openvino, "save_model", full)
    monkeypatch.setenv("DQTOOL_CACHE", str(tmp_path / "cache"))
    assert dqtool.load(str(exported["dq"]), "openvino")(torch.randn(1, 1, 8, 8), 0).sample.shape == (1, 1, 8, 8)
    assert "can't be kept" in capsys.readouterr().err
    options = ExportOptions(str(made / "distilled.safetensors"), str(tmp_path / "ir"), format="openvino")
    with pytest.raises(EnvironmentFault, match="iostream"):
        export(options, RunSettings(quiet=True))
    assert not (tmp_path / "ir").exists()


def test_auto_reads_each_file_once(made: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("export", str(made / "distilled.safetensors"), "--format", "dense", "-o", "dense", cwd=tmp_path)
    assert result.returncode == 0
    seen: list[Path] = []
    verify = store._verify
    monkeypatch.setattr(store, "_verify", lambda path, *rest: seen.append(path) or verify(path, *rest))
    dqtool.load(str(tmp_path / "dense"))
    assert len(seen) == len(set(seen)) > 0


def test_pipeline_takes_it(exported: dict[str, Path]) -> None:
    from diffusers import DDIMPipeline

    pipeline = DDIMPipeline.from_pretrained(exported["dq"])
    expected = pipeline(generator=torch.Generator().manual_seed(0), num_inference_steps=4, output_type="np").images
    pipeline.unet = dqtool.load(str(exported["dq"]), "openvino")
    got = pipeline(generator=torch.Generator().manual_seed(0), num_inference_steps=4, output_type="np").images
    assert abs(got - expected).mean() < 0.03  # rounding ties; images differ by a third from each other


def test_faults(exported: dict[str, Path], made: Path, tmp_path: Path, run: Run, monkeypatch) -> None:
    engine = dqtool.load(str(exported["dq"]), "openvino")
    x = torch.randn(1, 1, 8, 8)
    with pytest.warns(DqtoolWarning, match="not among"):
        engine(x, 123)
    with pytest.raises(UsageError, match="with the arguments .*class_labels"):
        engine(x, 0, class_labels=torch.tensor([1]))
    result = run("export", str(made / "distilled.safetensors"), "--format", "dense", "-o", "dense", cwd=tmp_path)
    assert result.returncode == 0
    with pytest.raises(ArtifactError, match="--format dense"):
        dqtool.load(str(tmp_path / "dense"), "openvino")
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(EnvironmentFault, match=r'pip install "dqtool\[openvino\]"'):
        dqtool.load(str(exported["dq"]), "openvino")
    result = run("export", str(made / "distilled.safetensors"), "--format", "openvino", "-o", "ir", cwd=tmp_path)
    assert result.returncode == 4
    assert 'pip install "dqtool[openvino]"' in result.stderr
    assert not (tmp_path / "ir").exists()


def test_exported_ir_runs_in_integers_without_dqtool(exported: dict[str, Path]) -> None:
    manifest = json.loads((exported["openvino"] / "dqtool.json").read_text())
    assert {layer["runs"] for layer in manifest["layers"]} == {"int8"}
    compiled = openvino.Core().compile_model(exported["openvino"] / "unet" / "openvino_model.xml", "CPU")
    x = torch.randn(2, 1, 8, 8).numpy()
    assert compiled({"sample": x, "timestep": torch.tensor([10.0]).numpy()})[0].shape == x.shape


def test_four_bits_stay_four_bits_on_disk(made: Path, tmp_path: Path, run: Run) -> None:
    result = run("export", str(made / "distilled.safetensors"), "--format", "openvino", "-o", "ir", cwd=tmp_path)
    assert result.returncode == 0
    model = openvino.Core().read_model(tmp_path / "ir" / "unet" / "openvino_model.xml")
    types = [str(op.get_element_type().get_type_name()) for op in model.get_ops() if op.get_type_name() == "Constant"]
    layers = json.loads((tmp_path / "ir" / "dqtool.json").read_text())["layers"]
    widths = [layer["bits"][0] for layer in layers if layer["kind"] != "attention"]
    # Sums must not overflow on any machine: a weight of 8 bits is split, and its odd part fits four bits too.
    assert types.count("u4") == widths.count(4) + widths.count(8)


def test_sizes_of_as_many_tokens_have_positions_of_their_own(tmp_path: Path) -> None:
    """A transformer's positions are constants of a trace."""
    quiet = RunSettings(quiet=True)
    at = {name: str(tmp_path / name) for name in ("dilated", "calibrated", "distilled", "dq", "ir")}
    dilate(DilateOptions(str(dit_pipeline(tmp_path / "model")), at["dilated"], scaling="wd"), quiet)
    calibrate(CalibrateOptions(at["dilated"], at["calibrated"], steps=2, samples=4, scaling="keep"), quiet)
    distill(DistillOptions(at["calibrated"], at["distilled"], bits="6/6", method="ptq"), quiet)
    export(ExportOptions(at["distilled"], at["dq"]), quiet)
    export(ExportOptions(at["distilled"], at["ir"], format="openvino"), quiet)
    simulated, engine, of_ir = (
        dqtool.load(at[d], r) for d, r in (("dq", "simulate"), ("dq", "openvino"), ("ir", "openvino"))
    )
    size, channels = simulated.config.sample_size, simulated.config.in_channels
    labels, step = torch.tensor([1]), simulated.timesteps[:1].float()
    for height, width in ((size, size), (size * 2, size // 2), (size // 2, size * 2)):
        x = torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(1))
        expected = simulated(x, step, class_labels=labels).sample
        assert (engine(x, step, class_labels=labels).sample - expected).norm() < 0.1 * expected.norm()
        if height == width:
            of_ir(x, step, class_labels=labels)
            continue
        with pytest.raises(UsageError, match="can't take inputs of the shapes"):
            of_ir(x, step, class_labels=labels)


def test_what_is_no_tensor_is_refused(exported: dict[str, Path]) -> None:
    engine = dqtool.load(str(exported["dq"]), "openvino")
    with pytest.raises(UsageError, match="'class_labels' is 'seven'"):
        engine(torch.randn(1, 1, 8, 8), 0, class_labels="seven")


def test_graphs_whose_fused_code_needs_too_many_registers_compile_without_it() -> None:
    """OpenVINO 2026 fails so on Mochi's attention."""
    from dqtool.runtimes.openvino_graphs import with_or_without_snippets

    def compiled(settings: Mapping[str, Any]) -> Mapping[str, Any]:
        if "SNIPPETS_MODE" not in settings:
            raise RuntimeError("Can't allocate registers for a snippet: not enough registers")
        return settings

    assert with_or_without_snippets(compiled, {"a": 1}) == {"a": 1, "SNIPPETS_MODE": "DISABLE"}
    with pytest.raises(RuntimeError, match="else"):
        with_or_without_snippets(lambda _: (_ for _ in ()).throw(RuntimeError("something else")), {})
