"""Pipelines of other kinds through the stages: their own conditions, samplers and companions."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from families import text_pipeline, unconditional_pipeline

from dqtool.artifacts import open_artifact
from dqtool.errors import UsageError
from dqtool.models.sources.resolve import resolve_model
from dqtool.stages.calibrate import CalibrateOptions, calibrate
from dqtool.stages.dilate import DilateOptions, dilate
from dqtool.stages.distill import DistillOptions, distill
from dqtool.stages.eval import EvalOptions, evaluate
from dqtool.stages.evaluation.images import maker_of_source
from dqtool.stages.export import ExportOptions, export
from dqtool.stages.shared.settings import RunSettings

QUIET = RunSettings(quiet=True)


@pytest.mark.parametrize("kind", ["sdxl", "pixart", "sd3", "sd3-t5", "flux", "unconditional"])
def test_other_pipelines_go_through_all_stages_under_their_own_conditions(tmp_path: Path, kind: str) -> None:
    from diffusers import DiffusionPipeline

    from dqtool.errors import DqtoolWarning

    text = kind != "unconditional"
    model = text_pipeline(kind, tmp_path / "model") if text else unconditional_pipeline(tmp_path / "model")
    at = {stage: str(tmp_path / f"{stage}.safetensors") for stage in ("dilated", "calibrated", "distilled")}
    dilate(DilateOptions(str(model), at["dilated"]), QUIET)
    calibrate(CalibrateOptions(at["dilated"], at["calibrated"], steps=2, samples=8, batch_size=2), QUIET)
    calibrated = open_artifact(at["calibrated"])
    if text:
        source = resolve_model(str(model))
        asked = maker_of_source(source, 2, 0, 2).conditions
        table = calibrated.tensors()
        for name, values in asked.table.items():
            torch.testing.assert_close(table[f"condition.{name}"], values, rtol=1e-4, atol=1e-5)
        assert calibrated.manifest.sampling.as_read.get("guidance", 1.0) == asked.guidance
        assert kind == "flux" or asked.guided
    distill(DistillOptions(at["calibrated"], at["distilled"], bits="8/8", iters=1, refine_iters=1, batch_size=2), QUIET)
    exported = export(ExportOptions(at["distilled"], str(tmp_path / "exported")), QUIET)
    options = EvalOptions(exported, str(tmp_path / "eval.json"), metrics=("similarity", "cost"), samples=2)
    figures = open_artifact(evaluate(options, QUIET)).manifest.metrics.as_read
    assert figures["psnr"]["mean"] > 15
    assert figures["missed_timesteps"] == []
    absent = {"text_encoder_3": None, "tokenizer_3": None} if kind == "sd3" else {}
    pipeline: Any = DiffusionPipeline.from_pretrained(exported, **absent)
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": 16, "width": 16} if text else {}
    if kind == "pixart":
        size |= {"use_resolution_binning": False, "clean_caption": False}
    given = {"prompt": "the digit 3"} if text else {"batch_size": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error", DqtoolWarning)
        images = pipeline(**given, num_inference_steps=2, output_type="np", **size).images
    assert images.shape[1:3] == (16, 16)


def test_eval_with_another_sampler_than_calibrated(tmp_path: Path) -> None:
    """Works, and says so where it visits other timesteps; one of another noise schedule is refused with the reason."""
    from dqtool.errors import DqtoolWarning
    from dqtool.stages.evaluation.images import maker_of_artifact

    for kind in ("sd", "sd3"):
        at = {stage: str(tmp_path / f"{kind}-{stage}.safetensors") for stage in ("dilated", "calibrated", "ptq")}
        dilate(DilateOptions(str(text_pipeline(kind, tmp_path / kind)), at["dilated"]), QUIET)
        calibrate(CalibrateOptions(at["dilated"], at["calibrated"], steps=4, samples=8), QUIET)
        distill(DistillOptions(at["calibrated"], at["ptq"], bits="8/8", iters=0), QUIET)
    ptq, options = str(tmp_path / "sd-ptq.safetensors"), {"metrics": ("similarity",), "samples": 1}
    calibrated = set(open_artifact(ptq).tensors()["timesteps"].tolist())
    strangers = {}
    for sampler in ("ddim", "ddpm", "plms", "dpmsolver", "euler"):
        output = str(tmp_path / f"{sampler}.json")
        asked = set(maker_of_artifact(open_artifact(ptq), 1, 0, sampler=sampler).sampler.timesteps().tolist())
        strangers[sampler] = sorted(asked - calibrated)
        with pytest.warns(DqtoolWarning) if strangers[sampler] else contextlib.nullcontext():
            evaluate(EvalOptions(ptq, output, sampler=sampler, **options), QUIET)
        figures = open_artifact(output).manifest.metrics.as_read
        assert sorted(figures["missed_timesteps"]) == pytest.approx(strangers[sampler])
        assert figures["psnr"]["mean"] > 10
    assert not strangers["ddim"]
    with pytest.raises(UsageError, match="flow matching"):
        output = str(tmp_path / "refused.json")
        evaluate(EvalOptions(str(tmp_path / "sd3-ptq.safetensors"), output, sampler="ddim", **options), QUIET)


def test_embedded_companions_are_float32_in_what_is_exported(tmp_path: Path) -> None:
    """Embedded companions have half precision, which the stock pipelines can't combine with a float32 network."""
    from diffusers import DiffusionPipeline
    from safetensors.torch import load_file

    at = {stage: str(tmp_path / f"{stage}.safetensors") for stage in ("dilated", "calibrated", "ptq")}
    dilate(DilateOptions("zoo:digits-sd", at["dilated"]), QUIET)
    calibrate(CalibrateOptions(at["dilated"], at["calibrated"], steps=2, samples=4), QUIET)
    distill(DistillOptions(at["calibrated"], at["ptq"], bits="8/8", iters=0), QUIET)
    exported = export(ExportOptions(at["ptq"], str(tmp_path / "exported")), QUIET)
    source = resolve_model("zoo:digits-sd")
    assert source.pipeline is not None
    for name in ("text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"):
        half, wide = load_file(source.pipeline / name), load_file(Path(exported) / name)
        assert all(torch.equal(wide[key], half[key].to(wide[key].dtype)) for key in half)
        assert {str(tensor.dtype) for tensor in wide.values() if tensor.is_floating_point()} == {"torch.float32"}
    pipeline: Any = DiffusionPipeline.from_pretrained(exported)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(["a handwritten seven"], num_inference_steps=2, guidance_scale=1.2).images[0].size == (16, 16)
