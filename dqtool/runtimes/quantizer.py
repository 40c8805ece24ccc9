"""dqtool as a quantizer of diffusers: its config, and the loading of exported networks.

diffusers builds the float network on the meta device, asks the quantizer to prepare it, and then loads the state dict
into it. Preparing puts packed layers in place; the tensors load by name. Scales stay float32 whatever the network's dtype
is, and a tensor that is missing or unknown is an error, where diffusers would warn or skip it. What is loaded then becomes
the fastest engine of the machine.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from dqtool import report
from dqtool.artifacts import Artifact, Manifest, read_manifest
from dqtool.artifacts.jsonvalues import Json, JsonObject
from dqtool.errors import ArtifactError, DqtoolError, EnvironmentFault, UsageError
from dqtool.models.hub.corrections import ASKED
from dqtool.models.hub.quantizer import FORMAT, METHOD, quantization_config
from dqtool.models.network_methods import MANIFEST, Origin, add_methods, to_float
from dqtool.models.networks.packed import checked_plans
from dqtool.models.networks.packed_checks import check_state, step_count
from dqtool.models.sampling.fitted import check_correction
from dqtool.nn.assignment import LayerPlan
from dqtool.nn.branch import BRANCH
from dqtool.nn.prediction import set_correcting
from dqtool.runtimes import VARIABLE, runtime_name
from dqtool.runtimes.choice import preferred
from dqtool.runtimes.names import GPU

__all__ = ["DqtoolConfig", "DqtoolQuantizer", "register", "register_in_transformers"]

INTEGER = "cpu"
"""The integer runtime that works inside a network of diffusers."""


class _Method(StrEnum):
    DQTOOL = METHOD


class DqtoolConfig(QuantizationConfigMixin):
    """The `quantization_config` of an exported directory, and what a user asks of its loading.

    `runtime` is `auto` (the fastest of the device that the network is on), `cpu`, `cuda` or `simulate`. `correction` is `auto` (predictions are
    corrected unless the scheduler is one that this harms), `on` or `off`. A config made with these alone goes to
    `from_pretrained(..., quantization_config=...)` of a network, or as `quant_mapping` of a `PipelineQuantizationConfig`.
    The other fields come from the export.
    """

    def __init__(
        self,
        runtime: str | None = None,
        format: str = FORMAT,
        timesteps: int = 0,
        layers: Sequence[JsonObject] | None = None,
        prediction: Mapping[str, Sequence[int]] | list[int] | None = None,
        static: bool = True,
        corrected_for: Mapping[str, Any] | None = None,
        modules_to_not_convert: list[str] | None = None,
        correction: str | None = None,
    ) -> None:
        runtime = runtime and runtime_name(runtime)
        if runtime not in (None, "auto", INTEGER, GPU, "simulate"):
            other = runtime in ("openvino", "openvino-bf16")
            raise UsageError(
                f"from_pretrained has no runtime '{runtime}'",
                where="DqtoolConfig, runtime",
                fix=f"Set the network afterwards: pipe.unet = dqtool.load(directory, runtime='{runtime}')"
                if other
                else f"Choose from auto, {INTEGER}, {GPU} and simulate",
            )
        self.quant_method = _Method.DQTOOL  # type: ignore[assignment]
        self.runtime = runtime
        self.format, self.timesteps, self.layers = format, timesteps, layers or []
        if isinstance(prediction, list):  # the first exports with such tables had these two
            prediction = dict.fromkeys(("scale", "bias"), prediction)
        self.prediction = prediction
        self.static = timesteps == 1 and static
        self.corrected_for = corrected_for
        if correction is not None:
            check_correction(correction, "DqtoolConfig, correction")
        self.correction = correction
        self.modules_to_not_convert = modules_to_not_convert

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Return the config of an export; keys of newer formats are left to `DqtoolQuantizer.validate_environment`."""
        fields = inspect.signature(cls.__init__).parameters
        config = cls(**{k: v for k, v in (config_dict | kwargs).items() if k in fields})
        return (config, {}) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Json]:
        """Return the fields that an export's `config.json` holds."""
        return quantization_config(self.layers, self.timesteps, self.prediction, self.static, self.corrected_for)

    def to_diff_dict(self) -> dict[str, Json]:
        """Return all fields: none has a default."""
        return self.to_dict()


class DqtoolQuantizer(DiffusersQuantizer):
    """Loads exported networks. dqtool quantizes nothing while diffusers loads it."""

    requires_calibration = False  # refused in plain words below
    requires_parameters_quantization = True
    use_keep_in_fp32_modules = False

    quantization_config: DqtoolConfig

    def __init__(self, quantization_config: DqtoolConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.modules_to_not_convert = quantization_config.modules_to_not_convert or []
        self.loaded: set[str] = set()
        self.plans: list[LayerPlan] = []
        self.expected: dict[str, Tensor] = {}
        self.manifest: Manifest | None = None
        self.artifact: Artifact | None = None
        self.dtype: torch.dtype | None = None
        self.runtime = "simulate"

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raise `ArtifactError` for exports of a newer format, and for models that are not quantized."""
        if self.quantization_config.format != FORMAT:
            raise ArtifactError(
                f"This model was exported by a newer dqtool (format {self.quantization_config.format})",
                where="config.json, key quantization_config.format",
                fix="Upgrade dqtool",
            )
        if not self.pre_quantized or not self.quantization_config.layers:
            raise ArtifactError(
                "dqtool can't quantize a model while diffusers loads it",
                fix="Run dilate, calibrate, distill and export, and load the exported directory",
            )
        if self.modules_to_not_convert:
            raise UsageError(
                "The layers of an exported network are quantized already; modules_to_not_convert has no effect on them",
                where="DqtoolConfig, modules_to_not_convert",
                fix="Give `dqtool distill --keep 'REGEX=16/16'` for the layers that stay float, and export again",
            )

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """Note the dtype of inputs and outputs; float32 if none is given."""
        self.dtype = torch_dtype or torch.float32
        return self.dtype

    def adjust_target_dtype(self, torch_dtype: torch.dtype) -> torch.dtype:
        """Return the dtype that a device map counts with: packed words are int32 tensors of the size they have."""
        return torch.int32

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Note the names in the file, and read the manifest beside it or one directory up."""
        self.loaded = set(loaded_keys)
        for directory in {parent for name in checkpoint_files[:1] for parent in Path(name).parents[:2]}:
            if (directory / MANIFEST).is_file():
                try:
                    self.manifest = read_manifest(directory)
                    self.artifact = Artifact(directory, str(directory), self.manifest)
                except DqtoolError as e:
                    report.warn(f"{directory / MANIFEST} can't be read, and won't be saved with the network: {e}")
        return loaded_keys

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        from dqtool.graph.tied_modules import tie_modules
        from dqtool.models.config_extras import apply_config_extras
        from dqtool.models.families import FAMILIES
        from dqtool.nn.surgery import insert_packed

        ours = self.quantization_config
        plans = checked_plans(ours.layers, model)
        self.runtime = chosen_runtime(ours.runtime, kwargs.get("device_map"), self.artifact)
        apply_config_extras(model, model.config)  # type: ignore[arg-type]
        family = FAMILIES.get(type(model).__name__)
        if family is not None and self.loaded:
            tie_modules(model, self.loaded, family.tied_modules(model.config))  # type: ignore[arg-type]
        insert_packed(model, plans, ours.timesteps, ours.prediction)
        model.config.quantization_config = ours  # type: ignore[union-attr]
        expected = set(model.state_dict())
        if self.loaded and self.loaded != expected:
            odd = sorted(self.loaded ^ expected)[0]
            problem = "lacks" if odd in expected else "holds an unknown tensor,"
            raise ArtifactError(
                f"The exported file {problem} '{odd}'", fix="Export again, or upgrade dqtool if it is older"
            )
        self.plans = plans
        self.expected = dict(model.state_dict())

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """Return whether the tensor is loaded here, as the file has it: all are where integers compute."""
        from dqtool.nn.packed_form import is_quantized_tensor

        return self.runtime != "simulate" or is_quantized_tensor(model, param_name)

    def check_quantized_param_shape(self, *args: Any, **kwargs: Any) -> bool:
        """Return True: layers register tensors of the shapes that their plan has."""
        return True

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
        """Put a tensor of the file into its place, uncast: `param_value` has been cast to the network's dtype already."""
        parent, _, leaf = param_name.rpartition(".")
        holder = model.get_submodule(parent) if parent else model
        value = state_dict[param_name].to(target_device)
        if param_name == "timesteps":
            step_count(state_dict)
        check_state({param_name: value}, self.plans, self.expected)
        like = self.expected.get(param_name)
        if like is not None and like.shape != value.shape:
            raise ArtifactError(
                f"Tensor {param_name} has shape {list(value.shape)}, and the config says {list(like.shape)}",
                where=f"tensor {param_name}",
                fix="Export the network again",
            )
        if leaf in holder._parameters:
            holder._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        else:
            holder.register_buffer(leaf, value)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        from dqtool.nn.call_lock import one_call_at_a_time
        from dqtool.nn.surgery import refresh_steps

        refresh_steps(model, self.quantization_config.static)
        if self.runtime == "simulate":
            one_call_at_a_time(model)
        else:
            from dqtool.runtimes import RUNTIMES

            model.eval()
            RUNTIMES[self.runtime].engine().convert(model)
            if self.runtime == GPU:
                model.to(self.dtype or torch.float32)
            model.__dict__["_dqtool_dtype"] = self.dtype or torch.float32
        model.__dict__["runtime"] = self.runtime
        model.__dict__[ASKED] = self.quantization_config.correction or "auto"
        set_correcting(model, self.quantization_config.correction != "off")
        return add_methods(model, Origin(self.quantization_config.to_dict(), self.manifest))

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the tensors as exports hold them: floats in float32, whatever the network's dtype is, and branches in float16."""
        half = (torch.float16, torch.bfloat16)
        return {
            name: value.float() if value.dtype in half and f".{BRANCH}." not in name else value
            for name, value in state_dict.items()
        }, {}

    def _dequantize(self, model: nn.Module) -> nn.Module:
        return to_float(model)

    @property
    def is_serializable(self) -> bool:
        """True: `save_pretrained` writes what `from_pretrained` and `dqtool.load` read."""
        return True

    @property
    def is_trainable(self) -> bool:
        """False: packed codes have no gradient."""
        return False

    @property
    def is_compileable(self) -> bool:
        """True: `torch.compile` traces the network."""
        return True


def chosen_runtime(asked: str | None, device_map: Any = None, artifact: Artifact | None = None) -> str:
    """Return the runtime of a network that diffusers loads, and report it: `asked`, `$DQTOOL_RUNTIME`, or the fastest.

    The fastest is `cpu`, unless `dqtool bench` measured another order of the network `artifact` on this machine.

    Raises:
        UsageError: an unknown runtime in the environment variable.
        EnvironmentFault: the runtime that was asked for can't run here.
    """
    asked = asked or os.environ.get(VARIABLE) or "auto"
    asked = DqtoolConfig(runtime=asked).runtime or "auto"
    if asked == "simulate":
        report.say("runtime: simulate (float fake-quantization, the reference), as asked")
        return asked
    from dqtool.runtimes import RUNTIMES, cpu

    elsewhere = {str(d) for d in device_map.values()} - {"cpu"} if isinstance(device_map, dict) else set()
    if isinstance(device_map, str) and device_map != "cpu" and torch.cuda.is_available():
        elsewhere = {"cuda"}  # "auto", "balanced" and the like are resolved later, to GPUs
    on_gpu = bool(elsewhere) and all(d.isdigit() or d.startswith("cuda") for d in elsewhere)
    if asked == GPU or on_gpu:
        reason = RUNTIMES[GPU].engine().available()
        if reason is None:
            report.say(f"runtime: {GPU} ({RUNTIMES[GPU].summary})")
            return GPU
        if asked == GPU:
            raise EnvironmentFault(
                f"The {GPU} runtime can't run here: {reason}", where="DqtoolConfig, runtime", fix="Use runtime='auto'"
            )
    reason = cpu.available()
    if elsewhere:
        reason = f"the network is placed on {', '.join(sorted(elsewhere))}"
    if reason is None:
        name, why = preferred(artifact) if asked == "auto" and artifact is not None else (INTEGER, "")
        what = "int8 in eager PyTorch on x86 CPUs" if name == INTEGER else "float fake-quantization"
        report.say(f"runtime: {name} ({what}){why}")
        return name
    if asked == INTEGER:
        raise EnvironmentFault(
            f"The {INTEGER} runtime can't run here: {reason}", where="DqtoolConfig, runtime", fix="Use runtime='auto'"
        )
    report.say(f"runtime: simulate (float fake-quantization): not {INTEGER}, {reason}")
    return "simulate"


def register(auto: ModuleType) -> None:
    """Enter dqtool in diffusers' tables of quantizers (`diffusers.quantizers.auto`)."""
    _offer_pipeline()
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = DqtoolQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = DqtoolConfig
    transformers = sys.modules.get("transformers.quantizers.auto")
    if transformers is not None:
        register_in_transformers(transformers)
    _merge_runtimes(auto.DiffusersAutoQuantizer)


def _merge_runtimes(quantizers: Any) -> None:
    """Let a `DqtoolConfig` that is given to `from_pretrained` choose the runtime of an export, without diffusers' warning
    that an export's own config wins."""
    merge = quantizers.merge_quantization_configs.__func__
    if not hasattr(merge, "_dqtool"):
        merged = functools.partial(_merged, merge)
        quantizers.merge_quantization_configs = classmethod(merged)
        merged._dqtool = True  # type: ignore[attr-defined]


def _merged(merge: Any, quantizers: Any, stored: Any, given: Any) -> Any:
    if not isinstance(given, DqtoolConfig):
        return merge(quantizers, stored, given)
    found = merge(quantizers, stored, None)
    if isinstance(found, DqtoolConfig):
        found.runtime, found.correction = given.runtime, given.correction
        found.modules_to_not_convert = given.modules_to_not_convert
    return found


def _offer_pipeline() -> None:
    """Let `DiffusionPipeline.from_pretrained` find `LatentClassPipeline`: it looks a pipeline's class up among diffusers'
    own. As a property, because the class can't be made while diffusers is still being imported."""

    def pipeline(_module: ModuleType) -> type:
        from dqtool.models.latent_class import LatentClassPipeline

        return LatentClassPipeline

    diffusers = sys.modules["diffusers"]
    base = type(diffusers)
    if hasattr(base, "LatentClassPipeline"):
        return
    diffusers.__class__ = type(base.__name__, (base,), {"LatentClassPipeline": property(pipeline)})


def register_in_transformers(auto: ModuleType) -> None:
    """Enter the config in transformers' table (`transformers.quantizers.auto`): a `PipelineQuantizationConfig` with
    `quant_backend="dqtool"` looks it up in both libraries."""
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = DqtoolConfig


READY = True
"""All names of this module are there: diffusers may be given them."""

register(sys.modules["diffusers.quantizers.auto"])
