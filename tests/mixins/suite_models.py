"""diffusers' mixin for quantized models, on networks that dqtool exported. Runs inside of a copy of diffusers' tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import pytest
import torch

import dqtool
from dqtool.nn.adaptable import Adaptable

from .. import testing_utils

# The mixin is marked for accelerators alone, and most of dqtool's networks run on the CPU.
testing_utils.require_accelerator = lambda each: each

from .testing_utils.quantization import QuantizationTesterMixin  # noqa: E402

AREA = Path(os.environ["DQTOOL_MIXINS"])


class DqtoolMixin(QuantizationTesterMixin):
    """The parts of the mixin that a backend supplies; `kind` is the pipeline that holds the network."""

    kind: str
    component = "transformer"
    sharded_serialization_config: ClassVar[dict[str, Any]] = {}

    @property
    def pretrained_model_name_or_path(self) -> str:
        """The float network."""
        return str(AREA / "float" / self.kind / self.component)

    def _create_quantized_model(self, config_kwargs: dict[str, Any], **extra: Any) -> Any:
        exported = AREA / "exported" / self.kind / self.component
        return self.model_class.from_pretrained(
            exported, quantization_config=dqtool.DqtoolConfig(**config_kwargs), **extra
        )

    def _verify_if_layer_quantized(self, name: str, module: Any, config_kwargs: dict[str, Any]) -> None:
        assert isinstance(module, Adaptable)

    def get_dummy_inputs(self) -> dict[str, Any]:
        """The network's arguments."""
        return torch.load(AREA / f"{self.kind}.pt", weights_only=True)

    def test_num_parameters(self) -> None:
        self._test_quantization_num_parameters({})

    def test_memory_footprint(self) -> None:
        self._test_quantization_memory_footprint({})

    def test_inference(self) -> None:
        self._test_quantization_inference({})

    def test_dtype_assignment(self) -> None:
        self._test_quantization_dtype_assignment({})

    def test_lora_inference(self) -> None:
        self._test_quantization_lora_inference({})

    def test_serialization(self, tmp_path: Path) -> None:
        self._test_quantization_serialization({}, tmp_path)

    def test_config_serialization(self) -> None:
        self._test_quantization_config_serialization({})

    def test_original_dtype(self) -> None:
        self._test_original_dtype({})

    def test_quantized_layers(self) -> None:
        self._test_quantized_layers({})

    def test_keep_modules_in_fp32(self) -> None:
        self._test_keep_modules_in_fp32({})

    def test_modules_to_not_convert(self) -> None:
        self._test_quantization_modules_to_not_convert({}, ["to_out"])

    def test_device_map(self) -> None:
        self._test_quantization_device_map({})

    def test_cpu_device_map(self) -> None:
        self._test_quantization_cpu_device_map({})

    def test_dequantize(self) -> None:
        self._test_dequantize({})

    def test_training(self) -> None:
        self._test_quantization_training({})


class TestUNet2DCondition(DqtoolMixin):
    model_class, kind, component = diffusers.UNet2DConditionModel, "sd", "unet"


class TestPixArt(DqtoolMixin):
    model_class, kind = diffusers.PixArtTransformer2DModel, "pixart"


class TestSD3(DqtoolMixin):
    model_class, kind = diffusers.SD3Transformer2DModel, "sd3"


class TestFlux(DqtoolMixin):
    model_class, kind = diffusers.FluxTransformer2DModel, "flux"


pytestmark = pytest.mark.filterwarnings("ignore")
