"""Networks that diffusers loads from an export: the engine that runs, and what users do with networks of diffusers."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import dqtool
from dqtool.errors import ArtifactError, DqtoolWarning, EnvironmentFault, UsageError
from dqtool.runtimes import cpu, integer_report
from dqtool.runtimes.cpu.native_product import NativeProduct
from dqtool.runtimes.cpu.onednn_product import OnednnProduct
from dqtool.runtimes.cpu.product import Product

RUNTIMES = ("cpu", "simulate")


@pytest.fixture(scope="module")
def exported(made: Path) -> Path:
    return made / "exported"


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DQTOOL_RUNTIME", raising=False)


def network_of(exported: Path, runtime: str | None = None, **options: Any) -> Any:
    from diffusers import UNet2DModel

    asked = {} if runtime is None else {"quantization_config": dqtool.DqtoolConfig(runtime=runtime)}
    return UNet2DModel.from_pretrained(str(exported / "unet"), **asked, **options)


def answer(network: nn.Module, timestep: float = 999.0) -> torch.Tensor:
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return network(x.to(network.dtype), timestep).sample  # type: ignore[arg-type]


def test_a_pipeline_runs_on_the_integer_kernels(
    exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from diffusers import DiffusionPipeline, UNet2DModel

    pipeline: Any = DiffusionPipeline.from_pretrained(str(exported))
    said = capsys.readouterr().err
    assert said.count("runtime:") == 1 and "runtime: cpu (int8 in eager PyTorch on x86 CPUs)" in said
    assert type(pipeline.unet) is UNet2DModel and pipeline.unet.runtime == "cpu"
    calls: list[type] = []
    for kind in (NativeProduct, OnednnProduct):
        multiply = kind.multiply

        def counted(self: Any, *a: Any, multiply: Any = multiply, **k: Any) -> Any:
            calls.append(type(self))
            return multiply(self, *a, **k)

        monkeypatch.setattr(kind, "multiply", counted)
    loaded = dqtool.load(str(exported), runtime="cpu")
    for timestep in loaded.timesteps.tolist():
        assert torch.equal(answer(pipeline.unet, timestep), answer(loaded, timestep))
    assert len(calls) >= 2 * 4 * sum(isinstance(m, Product) for m in pipeline.unet.modules())
    assert set(integer_report(pipeline.unet).values()) == {"int8"}
    pipeline.set_progress_bar_config(disable=True)
    images = [
        p(num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="np").images
        for p in (pipeline, type(pipeline)(unet=loaded, scheduler=pipeline.scheduler))
    ]
    assert (images[0] == images[1]).all()


def test_the_runtime_is_asked_for(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import DiffusionPipeline, PipelineQuantizationConfig

    simulated = answer(dqtool.load(str(exported), "simulate"))
    found = network_of(exported, "simulate")
    assert found.runtime == "simulate" and torch.equal(answer(found), simulated)
    for config in (
        PipelineQuantizationConfig(quant_mapping={"unet": dqtool.DqtoolConfig(runtime="simulate")}),
        PipelineQuantizationConfig(
            quant_backend="dqtool", quant_kwargs={"runtime": "simulate"}, components_to_quantize="unet"
        ),
    ):
        pipeline: Any = DiffusionPipeline.from_pretrained(str(exported), quantization_config=config)
        assert pipeline.unet.runtime == "simulate"
    with pytest.raises(UsageError, match=r"dqtool.load\(directory, runtime='openvino'\)"):
        dqtool.DqtoolConfig(runtime="openvino")
    monkeypatch.setenv("DQTOOL_RUNTIME", "simulate")
    assert network_of(exported).runtime == dqtool.load(str(exported)).runtime == "simulate"
    assert network_of(exported, "cpu").runtime == "cpu"


def test_machines_without_the_kernels_simulate(
    exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(cpu, "available", lambda: "this is a test")
    assert network_of(exported).runtime == "simulate"
    assert "not cpu, this is a test" in capsys.readouterr().err
    with pytest.raises(EnvironmentFault, match="this is a test"):
        network_of(exported, "cpu")


def test_one_warning_a_pipeline_call(exported: Path) -> None:
    from diffusers import DiffusionPipeline

    pipeline: Any = DiffusionPipeline.from_pretrained(str(exported))
    pipeline.set_progress_bar_config(disable=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for steps in (4, 3, 3):
            pipeline(num_inference_steps=steps, generator=torch.Generator().manual_seed(0))
    texts = [str(each.message) for each in caught if issubclass(each.category, DqtoolWarning)]
    assert len(texts) == 2
    assert all(text.startswith("2 of the 3 timesteps of this run are not among the 4 calibrated") for text in texts)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(exported: Path, runtime: str, dtype: torch.dtype) -> None:
    reference = answer(network_of(exported, runtime))
    for name in ("torch_dtype", "dtype"):
        network = network_of(exported, runtime, **{name: dtype})
        assert network.dtype == answer(network).dtype == dtype == network.config["_pre_quantization_dtype"]
        assert (answer(network).float() - reference).norm() < 0.5 * reference.norm()  # codes of 4 bits flip
    assert network_of(exported, runtime).config["_pre_quantization_dtype"] == torch.float32


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("way", ["hub", "load"])
def test_saved_networks_load_again(exported: Path, tmp_path: Path, runtime: str, way: str) -> None:
    network: Any = dqtool.load(str(exported), runtime) if way == "load" else network_of(exported, runtime)
    expected = answer(network)
    for index, options in enumerate(({}, {"variant": "fp16"}, {"max_shard_size": "20KB"})):
        target = tmp_path / str(index) / "unet"
        network.save_pretrained(target, **options)
        assert (target / "dqtool.json").is_file()
        assert torch.equal(answer(dqtool.load(str(target), runtime)), expected)
        variant = {k: v for k, v in options.items() if k == "variant"}
        assert torch.equal(answer(network_of(target.parent, runtime, **variant)), expected)
    assert len(list((tmp_path / "2" / "unet").glob("*-of-*.safetensors"))) > 1
    again = network_of(tmp_path / "0", runtime)
    again.save_pretrained(tmp_path / "0" / "unet")  # over the files that it is mapped from
    assert torch.equal(answer(again), expected)
    assert torch.equal(answer(dqtool.load(str(tmp_path / "0" / "unet"), runtime)), expected)


def test_a_saved_pipeline_loads_with_both(exported: Path, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    pipeline: Any = DiffusionPipeline.from_pretrained(str(exported))
    pipeline.save_pretrained(tmp_path / "saved")
    again: Any = DiffusionPipeline.from_pretrained(str(tmp_path / "saved"))
    expected = answer(pipeline.unet)
    assert torch.equal(answer(again.unet), expected)
    assert torch.equal(answer(dqtool.load(str(tmp_path / "saved"), "cpu")), expected)


def test_push_to_hub_uploads_what_loads(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = network_of(exported)

    def upload(self: Any, directory: str, repo_id: str, **_: Any) -> None:
        shutil.copytree(directory, tmp_path / "hub" / "unet")

    monkeypatch.setattr(type(network), "_upload_folder", upload)
    answers = type("Repo", (), {"repo_id": "me/it"})
    monkeypatch.setattr("diffusers.utils.hub_utils.create_repo", lambda *_a, **_k: answers)
    network.push_to_hub("me/it", token="none")
    assert torch.equal(answer(dqtool.load(str(tmp_path / "hub" / "unet"), "cpu")), answer(network))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_copies_pickles_and_files(exported: Path, runtime: str) -> None:
    network = network_of(exported, runtime)
    expected = answer(network)
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    twins = [copy.deepcopy(network), pickle.loads(pickle.dumps(network)), torch.load(file, weights_only=False)]
    for twin in twins:
        assert type(twin) is type(network) and twin.runtime == runtime
        assert torch.equal(answer(twin), expected)
        assert twin.conv_in is not network.conv_in


def test_another_process_unpickles_it(exported: Path, tmp_path: Path) -> None:
    network = network_of(exported)
    (tmp_path / "network.pickle").write_bytes(pickle.dumps(network))
    code = (
        "import pickle, sys, torch; n = pickle.load(open(sys.argv[1], 'rb'));"
        "x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3));"
        "print(n.float().dtype, n.runtime, float(n(x, 999.0).sample.double().sum()))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "network.pickle")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    dtype, runtime, total = ran.stdout.split()
    assert (dtype, runtime) == ("torch.float32", "cpu")
    assert float(total) == pytest.approx(float(answer(network).double().sum()), abs=1e-6)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_another_pipeline_takes_the_components(exported: Path, runtime: str) -> None:
    from diffusers import DDIMPipeline, DDPMPipeline, DiffusionPipeline

    pipeline: Any = DiffusionPipeline.from_pretrained(str(exported))
    pipeline.unet = network_of(exported, runtime)
    assert isinstance(pipeline, DDIMPipeline)
    other = DDPMPipeline.from_pipe(pipeline)
    assert other.unet is pipeline.unet and torch.equal(answer(other.unet), answer(network_of(exported, runtime)))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_counts_are_of_the_float_network(exported: Path, made: Path, runtime: str) -> None:
    from diffusers import UNet2DModel

    whole = UNet2DModel.from_pretrained(str(made / "tiny" / "unet"))
    network = network_of(exported, runtime)
    assert network.num_parameters() == whole.num_parameters()
    assert network.num_parameters(only_trainable=True) < 0.1 * whole.num_parameters()  # norms
    state = load_file(exported / "unet" / "diffusion_pytorch_model.safetensors")
    words = sum(t.nbytes for name, t in state.items() if name.endswith("weight_packed"))
    assert words < network.get_memory_footprint() < whole.get_memory_footprint()
    if runtime == "simulate":
        answer(network)
        assert network.get_memory_footprint() > whole.get_memory_footprint()  # a float copy from the first call on


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_dequantized_layers_are_float_ones(exported: Path, made: Path, runtime: str) -> None:
    from diffusers import UNet2DModel

    network = network_of(exported, runtime)
    codes = network_of(exported, "simulate").conv_in
    expected = codes.quantized_weight()
    if codes.dilation is not None:
        expected = expected / codes.dilation.view(1, -1, 1, 1)
    assert network.dequantize() is network
    assert type(network.conv_in) is nn.Conv2d
    torch.testing.assert_close(network.conv_in.weight, expected)
    whole = UNet2DModel.from_pretrained(str(made / "tiny" / "unet"))
    assert network.state_dict().keys() == whole.state_dict().keys()
    error = (answer(network) - answer(whole)).norm() / answer(whole).norm()
    assert error < 0.5
    network.save_pretrained(made / f"float-{runtime}")
    assert "quantization_config" not in json.loads((made / f"float-{runtime}" / "config.json").read_text())
    torch.testing.assert_close(answer(UNet2DModel.from_pretrained(made / f"float-{runtime}")), answer(network))


def test_inference_mode_leaves_gradients(exported: Path) -> None:
    network = network_of(exported, "simulate")
    x = torch.randn(1, 1, 8, 8)
    with torch.inference_mode():
        expected = network(x, 999.0).sample.clone()
    x.requires_grad_(True)
    found = network(x, 999.0).sample
    assert torch.equal(found, expected)
    found.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_quantized_attention_stays(exported: Path, runtime: str) -> None:
    network = network_of(exported, runtime)
    expected = answer(network)
    for name in ("set_default_attn_processor", "fuse_qkv_projections"):
        if hasattr(type(network), name):
            getattr(network, name)()
    assert torch.equal(answer(network), expected)


def test_one_pipeline_in_many_threads(exported: Path) -> None:
    from diffusers import DiffusionPipeline

    pipeline: Any = DiffusionPipeline.from_pretrained(str(exported))
    pipeline.set_progress_bar_config(disable=True)

    def make(seed: int) -> Any:
        mine = type(pipeline).from_pipe(pipeline)  # schedulers count steps: each thread has its own
        mine.scheduler = copy.deepcopy(pipeline.scheduler)
        mine.set_progress_bar_config(disable=True)
        return mine(num_inference_steps=4, generator=torch.Generator().manual_seed(seed), output_type="np").images

    alone = [make(seed) for seed in range(3)]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(make, range(3)))
    assert all((a == b).all() for a, b in zip(alone, together, strict=True))


def test_what_is_not_quantized_is_refused(made: Path) -> None:
    from diffusers import UNet2DModel

    with pytest.raises(ArtifactError, match="can't quantize a model while diffusers loads it"):
        UNet2DModel.from_pretrained(str(made / "tiny" / "unet"), quantization_config=dqtool.DqtoolConfig())
    with pytest.raises(UsageError, match="--keep"):
        UNet2DModel.from_pretrained(
            str(made / "exported" / "unet"),
            quantization_config=dqtool.DqtoolConfig(modules_to_not_convert=["conv_in"]),
        )


def test_device_maps(exported: Path) -> None:
    network = network_of(exported, device_map={"": "cpu"})
    assert network.runtime == "cpu"
    assert torch.equal(answer(network), answer(network_of(exported, "cpu")))


def test_the_config_is_light_to_import() -> None:
    code = (
        "import sys, dqtool; assert 'torch' not in sys.modules; print(dqtool.DqtoolConfig(runtime='simulate').runtime)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "simulate"
