"""diffusers' mixin for pipelines, with networks that dqtool exported. Runs inside of a copy of diffusers' tests."""

from __future__ import annotations

import os
import unittest
from pathlib import Path
from typing import Any

import diffusers
import torch

import dqtool  # noqa: F401  (exports load from here on)

from .pipeline_params import TEXT_TO_IMAGE_BATCH_PARAMS, TEXT_TO_IMAGE_PARAMS
from .test_pipelines_common import PipelineTesterMixin

AREA = Path(os.environ["DQTOOL_MIXINS"])


class DqtoolPipeline(PipelineTesterMixin):
    """The parts of the mixin that a pipeline supplies; `kind` names it."""

    kind: str
    size = 16
    params = TEXT_TO_IMAGE_PARAMS - {"cross_attention_kwargs"}
    batch_params = TEXT_TO_IMAGE_BATCH_PARAMS
    image_params = image_latents_params = callback_cfg_params = frozenset()
    test_xformers_attention = False

    def get_dummy_components(self, **_: Any) -> dict[str, Any]:
        """The components of the exported pipeline."""
        pipe = self.pipeline_class.from_pretrained(AREA / "exported" / self.kind)
        return dict(pipe.components)

    def get_dummy_inputs(self, device: Any, seed: int = 0) -> dict[str, Any]:
        """Arguments of one call."""
        return {
            "prompt": "a handwritten seven",
            "generator": torch.Generator("cpu").manual_seed(seed),
            "num_inference_steps": 2,
            "guidance_scale": 3.0,
            "height": self.size,
            "width": self.size,
            "output_type": "np",
        }


class StableDiffusionTests(DqtoolPipeline, unittest.TestCase):
    pipeline_class, kind = diffusers.StableDiffusionPipeline, "sd"

    def test_encode_prompt_works_in_isolation(self) -> None:  # type: ignore[override]
        super().test_encode_prompt_works_in_isolation({"device": "cpu", "do_classifier_free_guidance": True})


class PixArtTests(DqtoolPipeline, unittest.TestCase):
    pipeline_class, kind = diffusers.PixArtAlphaPipeline, "pixart"

    def get_dummy_inputs(self, device: Any, seed: int = 0) -> dict[str, Any]:
        return {**super().get_dummy_inputs(device, seed), "use_resolution_binning": False}

    @unittest.skip("diffusers' own tests of this pipeline leave it out")
    def test_save_load_optional_components(self) -> None:
        pass


class SD3Tests(DqtoolPipeline, unittest.TestCase):
    pipeline_class, kind = diffusers.StableDiffusion3Pipeline, "sd3"


class FluxTests(DqtoolPipeline, unittest.TestCase):
    pipeline_class, kind = diffusers.FluxPipeline, "flux"

    def get_dummy_inputs(self, device: Any, seed: int = 0) -> dict[str, Any]:
        return {**super().get_dummy_inputs(device, seed), "max_sequence_length": 8}
