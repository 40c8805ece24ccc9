"""`DiffusionPipeline.from_pretrained` on an exported directory: dqtool as a diffusers quantizer.

diffusers builds the float network on the meta device, asks the quantizer to prepare it, and then loads the state dict
into it. Preparing is putting packed layers in place; the tensors load by name. Scales stay float32 whatever
`torch_dtype` says, and a tensor that is missing or unknown is an error, where diffusers would warn or skip it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dqtool.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["METHOD", "quantization_config", "register"]

METHOD = "dqtool"
FORMAT = "dqtool/1"


class _Method(StrEnum):
    DQTOOL = METHOD


def quantization_config(
    records: list[dict[str, Any]],
    timesteps: int,
    prediction: Mapping[str, Sequence[int]] | None = None,
    static: bool = True,
) -> dict[str, Any]:
    """Return the `quantization_config` of an exported `config.json`.

    It holds the layers with their bits, in execution order, and by name the shape of a row of each table that corrects
    predictions, where there are some. `static` says of tables of one row whether it serves all timesteps.
    """
    known = {"quant_method": METHOD, "format": FORMAT, "timesteps": timesteps, "layers": records}
    if timesteps == 1:
        known["static"] = static
    return known if prediction is None else {**known, "prediction": {k: list(row) for k, row in prediction.items()}}


def register(auto: ModuleType) -> None:
    """Enter dqtool in diffusers' tables of quantizers (`diffusers.quantizers.auto`)."""
    from diffusers.quantizers.base import DiffusersQuantizer
    from diffusers.quantizers.quantization_config import QuantizationConfigMixin

    class DqtoolConfig(QuantizationConfigMixin):
        """The `quantization_config` of an exported directory."""

        def __init__(self, **kwargs: Any) -> None:
            self.quant_method = _Method.DQTOOL  # type: ignore[assignment]
            self.format = kwargs["format"]
            self.timesteps = kwargs["timesteps"]
            self.layers = kwargs["layers"]
            rows = kwargs.get("prediction")
            if isinstance(rows, list):  # of the first exports that had such tables, which were these two
                rows = dict.fromkeys(("scale", "bias"), rows)
            self.prediction = rows
            self.static: bool = self.timesteps == 1 and kwargs.get("static", True)

        def to_dict(self) -> dict[str, Any]:
            return quantization_config(self.layers, self.timesteps, self.prediction, self.static)

        def to_diff_dict(self) -> dict[str, Any]:
            """Everything: nothing here has a default."""
            return self.to_dict()

    class DqtoolQuantizer(DiffusersQuantizer):
        """Loads packed networks; nothing is quantized on the fly."""

        requires_calibration = True
        requires_parameters_quantization = True
        use_keep_in_fp32_modules = False

        quantization_config: DqtoolConfig

        def __init__(self, quantization_config: DqtoolConfig, **kwargs: Any) -> None:
            super().__init__(quantization_config, **kwargs)
            self.loaded: set[str] = set()

        def validate_environment(self, *args: Any, **kwargs: Any) -> None:
            if self.quantization_config.format != FORMAT:
                raise ArtifactError(
                    f"This model was exported by a newer dqtool (format {self.quantization_config.format})",
                    where="config.json, key quantization_config.format",
                    fix="Upgrade dqtool",
                )
            if not self.pre_quantized:
                raise ArtifactError(
                    "dqtool can't quantize a model while diffusers loads it",
                    fix="Run dilate, calibrate, distill and export, and load the exported directory",
                )

        def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
            self.loaded = set(loaded_keys)
            return loaded_keys

        def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
            from dqtool.graph.repeats import tie_repeats
            from dqtool.models.amendments import amend
            from dqtool.models.families import FAMILIES
            from dqtool.models.packed import plans_from
            from dqtool.nn.surgery import insert_packed

            amend(model, model.config)  # type: ignore[arg-type]
            family = FAMILIES.get(type(model).__name__)
            if family is not None and self.loaded:
                tie_repeats(model, self.loaded, family.repeats(model.config))  # type: ignore[arg-type]
            ours = self.quantization_config
            insert_packed(model, plans_from(ours.layers), ours.timesteps, ours.prediction)
            model.config.quantization_config = self.quantization_config  # type: ignore[union-attr]
            self.expected = set(model.state_dict())
            if self.loaded and self.loaded != self.expected:
                odd = sorted(self.loaded ^ self.expected)[0]
                problem = "lacks" if odd in self.expected else "holds an unknown tensor,"
                raise ArtifactError(
                    f"The exported file {problem} '{odd}'", fix="Export again, or upgrade dqtool if it is older"
                )

        def check_if_quantized_param(
            self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
        ) -> bool:
            return self._is_ours(model, param_name)

        def create_quantized_param(  # type: ignore[override]
            self,
            model: nn.Module,
            param_value: Tensor,
            param_name: str,
            target_device: Any,
            state_dict: dict[str, Any],
            unexpected_keys: list[str] | None = None,
            **kwargs: Any,
        ) -> None:
            parent, _, leaf = param_name.rpartition(".")
            holder = model.get_submodule(parent) if parent else model
            # From the state dict: `param_value` has been cast to torch_dtype already, and scales must not be.
            holder.register_buffer(leaf, state_dict[param_name].to(target_device))

        def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
            from dqtool.nn.calls import one_call_at_a_time
            from dqtool.nn.surgery import refresh_steps

            refresh_steps(model, self.quantization_config.static)
            return one_call_at_a_time(model)

        def _is_ours(self, model: nn.Module, name: str) -> bool:
            from dqtool.graph.attention import is_attention
            from dqtool.nn.layers import QuantLayer
            from dqtool.nn.prediction import PredictionTables

            parent, _, leaf = name.rpartition(".")
            holder = model.get_submodule(parent) if parent else model
            ours = isinstance(holder, QuantLayer | PredictionTables) or leaf == "timesteps"
            return ours or (is_attention(holder) and leaf != "bias")

        @property
        def is_serializable(self) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return False

    _offer_pipeline()
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = DqtoolQuantizer  # type: ignore[attr-defined]
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = DqtoolConfig  # type: ignore[attr-defined]


def _offer_pipeline() -> None:
    """Let `DiffusionPipeline.from_pretrained` find `LatentClassPipeline`: it looks a pipeline's class up among diffusers'
    own. As a property, because the class can't be made while diffusers is still being imported."""

    def pipeline(_module: ModuleType) -> type:
        from dqtool.models.latent_class import LatentClassPipeline

        return LatentClassPipeline

    diffusers = sys.modules["diffusers"]
    base = type(diffusers)
    diffusers.__class__ = type(base.__name__, (base,), {"LatentClassPipeline": property(pipeline)})
