"""Corrections of predictions say what they were fitted with, and are switched off for a sampling that they are not for."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dqtool
from dqtool.artifacts import CARD, open_artifact
from dqtool.artifacts.records import SamplingRecord
from dqtool.errors import DqtoolWarning, UsageError
from dqtool.models.hub.corrections import fitted_of_network
from dqtool.models.sampling.fitted import FITTED, fitted_with, misfit
from dqtool.nn.prediction import has_prediction, is_correcting, set_correcting
from dqtool.runtimes import RUNTIMES
from dqtool.stages.eval import EvalOptions, evaluate
from dqtool.stages.inspect import describe, render
from dqtool.stages.shared.settings import RunSettings

FIT = {"scheduler": "DDIMScheduler", "spacing": "leading", "steps": 4, "eta": 0.0, "guidance": 1.0}


@pytest.fixture
def exported(made: Path) -> str:
    """Return an export with a correction, made with DDIM over 4 steps. For reading only."""
    return str(made / "exported")


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        ({}, True),
        ({"steps": 50}, True),
        ({"guidance": 3.0}, True),
        ({"scheduler": "UniPCMultistepScheduler", "steps": 8}, True),
        ({"scheduler": "EulerDiscreteScheduler", "spacing": "trailing"}, True),
        ({"scheduler": "PNDMScheduler"}, False),
        ({"scheduler": "LMSDiscreteScheduler"}, False),
        ({"scheduler": "AnUnmeasuredScheduler"}, False),
        ({"eta": 1.0}, False),
        ({"steps": None, "guidance": None, "eta": None}, True),
    ],
)
def test_a_correction_fits_what_was_measured_to_do_no_harm(change: dict[str, Any], fits: bool) -> None:
    assert (misfit(FIT, FIT | change) == "") is fits


def test_a_correction_fitted_with_a_sampler_that_extrapolates_is_for_that_one_alone() -> None:
    fit = FIT | {"scheduler": "PNDMScheduler"}
    assert misfit(fit, fit) == ""
    assert misfit(fit, fit | {"steps": 5}) == "5 steps in place of 4 steps"
    assert misfit(fit, FIT) == "DDIMScheduler in place of PNDMScheduler"


def test_listed_timesteps_have_their_own_spacing() -> None:
    scheduler = {"_class_name": "DDIMScheduler", "timestep_spacing": "leading"}
    sampling = SamplingRecord(scheduler, 3, 0.0)
    assert fitted_with(sampling)["spacing"] == "leading"
    assert fitted_with(replace(sampling, timesteps=[9.0, 4.0, 0.0]))["spacing"] == "listed"
    assert fitted_with(replace(sampling, timesteps=[9.0, 4.0, 0.0], spacing="quad"))["spacing"] == "quad"


def test_artifact_export_config_card_and_inspect_say_what_it_was_fitted_with(made: Path, exported: str) -> None:
    distilled, directory = open_artifact(made / "distilled.safetensors").manifest, open_artifact(exported).manifest
    fitted = fitted_with(distilled.sampling)
    config = json.loads((Path(exported) / "unet" / "config.json").read_text())["quantization_config"]
    assert distilled.metrics.as_read[FITTED] == directory.metrics.as_read[FITTED] == config[FITTED] == fitted
    card = (Path(exported) / CARD).read_text()
    text = "\n".join(render(describe(exported)))
    for each in (card, text):
        assert fitted["scheduler"] in each and f"{fitted['steps']} steps" in each
    network = dqtool.load(exported, "simulate")
    assert has_prediction(network)
    assert fitted_of_network(network) == fitted


def test_the_owner_of_an_export_may_edit_its_card(chain: Path) -> None:
    (chain / "exported" / CARD).write_text("mine")
    assert open_artifact(chain / "exported").manifest.stage == "export"


def evaluated(exported: str, output: Path, **options: Any) -> dict[str, Any]:
    reference = str(Path(exported).parent / "tiny")
    given = EvalOptions(
        exported, str(output), reference, metrics=("similarity",), samples=2, runtime="simulate", **options
    )
    evaluate(given, RunSettings(quiet=True))
    return open_artifact(output).manifest.metrics.as_read


def test_eval_switches_a_correction_off_where_it_harms_and_says_so(
    exported: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluated(exported, tmp_path / "same.json")["correction"] == "on"
    assert "correction" not in capsys.readouterr().err
    steps = {"sampler": "plms"}
    found = {each: evaluated(exported, tmp_path / f"{each}.json", correction=each, **steps) for each in ("auto", "off")}
    assert found["auto"]["correction"] == found["off"]["correction"] == "off"
    assert found["auto"]["psnr"] == found["off"]["psnr"]
    kept = evaluated(exported, tmp_path / "on.json", correction="on", **steps)
    assert kept["correction"] == "on" and kept["psnr"] != found["off"]["psnr"]
    assert capsys.readouterr().err.count("the correction of predictions is off") == 1


def test_without_its_correction_a_network_is_the_one_before_the_fit(made: Path, tmp_path: Path) -> None:
    """Rows of tables with and without the correction can share one training."""
    from dqtool.stages.distill import DistillOptions, distill

    given = {"iters": 1, "refine_iters": 1}
    state = {}
    for correct in (False, True):
        path = str(tmp_path / f"{correct}.safetensors")
        options = DistillOptions(str(made / "calibrated.safetensors"), path, correct_noise=correct, **given)
        state[correct] = open_artifact(distill(options, RunSettings(quiet=True))).tensors()
    same = {name: tensor for name, tensor in state[True].items() if not name.startswith("prediction.")}
    assert same.keys() == state[False].keys() and len(same) < len(state[True])
    assert all(torch.equal(tensor, state[False][name]) for name, tensor in same.items())


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(UsageError, match="auto, on, off"):
        EvalOptions(correction="maybe")
    with pytest.raises(UsageError, match="auto, on, off"):
        dqtool.DqtoolConfig(correction="maybe")


def drawn(exported: str, scheduler: str | None, steps: int = 4, **config: Any) -> tuple[Tensor, list[str]]:
    """Return samples of a diffusers pipeline with another scheduler, and dqtool's warnings on the correction."""
    import diffusers

    class Plain(diffusers.DiffusionPipeline):
        """Pipeline that asks nothing of its scheduler but a step."""

        def __init__(self, unet: Any, scheduler: Any) -> None:
            super().__init__()
            self.register_modules(unet=unet, scheduler=scheduler)

        @torch.no_grad()
        def __call__(self, num_inference_steps: int = 50) -> Tensor:
            """Sample two images."""
            x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
            self.scheduler.set_timesteps(num_inference_steps)
            for t in self.scheduler.timesteps:
                x_in = self.scheduler.scale_model_input(x, t)
                x = self.scheduler.step(self.unet(x_in, t).sample, t, x).prev_sample
            return x

    given = dqtool.DqtoolConfig(runtime="simulate", **config)
    network = diffusers.UNet2DModel.from_pretrained(exported, subfolder="unet", quantization_config=given)
    own = diffusers.DDIMScheduler.from_pretrained(exported, subfolder="scheduler")
    pipeline = Plain(network, own if scheduler is None else getattr(diffusers, scheduler).from_config(own.config))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        images = pipeline(num_inference_steps=steps)
    assert is_correcting(network) is (config.get("correction") != "off"), "the call left the network as it found it"
    found = [str(each.message) for each in seen if issubclass(each.category, DqtoolWarning)]
    return images, [text for text in found if "correction" in text]


def test_a_pipeline_with_a_scheduler_that_a_correction_harms_runs_without_it(exported: str) -> None:
    images, said = drawn(exported, "PNDMScheduler")
    assert len(said) == 1 and "PNDMScheduler in place of DDIMScheduler" in said[0]
    assert torch.equal(images, drawn(exported, "PNDMScheduler", correction="off")[0])
    kept, quiet = drawn(exported, "PNDMScheduler", correction="on")
    assert not torch.equal(images, kept) and quiet == []


def test_a_pipeline_with_its_own_scheduler_or_a_harmless_one_keeps_its_correction(exported: str) -> None:
    for scheduler in (None, "UniPCMultistepScheduler"):
        images, said = drawn(exported, scheduler)
        assert said == []
        assert not torch.equal(images, drawn(exported, scheduler, correction="off")[0])


@pytest.mark.parametrize("runtime", ["simulate", "cpu", "openvino"])
def test_every_runtime_has_the_switch(exported: str, runtime: str) -> None:
    reason = RUNTIMES[runtime].engine().available()
    if reason is not None:
        pytest.skip(reason)
    network = dqtool.load(exported, runtime)
    state = open_artifact(exported).tensors(file="unet/diffusion_pytorch_model.safetensors")
    x, timestep = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)), state["timesteps"][1]
    with torch.no_grad():
        on = network(x, timestep).sample
        set_correcting(network, False)
        off = network(x, timestep).sample
        set_correcting(network, True)
        assert torch.equal(network(x, timestep).sample, on)
    assert not torch.allclose(on, off, atol=1e-6)
