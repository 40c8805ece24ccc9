"""Options of `dqtool quantize`: its own, and those of the stages that it passes on."""

from __future__ import annotations

import dataclasses
import typing
from typing import Annotated, Any

from dqtool.errors import UsageError
from dqtool.stages.options.calibrate import CalibrateOptions
from dqtool.stages.options.declared import INPUT, QUALITY, Option
from dqtool.stages.options.dilate import DilateOptions
from dqtool.stages.options.distill import DistillOptions
from dqtool.stages.options.shared import OUTPUT_DIRECTORY

__all__ = ["EFFORTS", "PASSED_ON", "QuantizeOptions", "stage_values"]

EFFORTS = ("fast", "default", "best")

PASSED_ON: tuple[tuple[type, tuple[str, ...]], ...] = (
    (
        DilateOptions,
        ("model", "config", "prediction_type", "scheduler", "variant", "tokenizer", "pipeline", "family", "example",
         "time_scale", "components", "lora"),
    ),
    (
        CalibrateOptions,
        ("steps", "sampler", "spacing", "timesteps", "clip", "variance", "samples", "seed", "eta", "guidance", "prompts",
         "image_guidance", "conditions", "images", "random_conditions", "batch_size"),
    ),
    (
        DistillOptions,
        ("bits", "target_psnr", "target_size", "target_bops", "protect", "keep", "low_rank", "correct_noise",
         "low_memory"),
    ),
)  # fmt: skip
"""Options that `quantize` takes from the stages, with the class that declares each."""

RECEIVERS = {
    "dilate": DilateOptions,
    "calibrate": CalibrateOptions,
    "distill": DistillOptions,
}
"""Stages that receive options of `quantize`: each receives those that its class declares under the same name."""

NOT_RECEIVED = {("dilate", "bits"), ("calibrate", "pipeline"), ("distill", "batch_size")}
"""Options that mean something else to a stage, that it refuses, or that it finds in its input."""

ALSO_EVAL = ("prompts", "conditions", "images", "random_conditions", "guidance", "batch_size")
"""Options that `eval` receives too."""

OWN = (
    ("output", Annotated[str, OUTPUT_DIRECTORY], "exported"),
    (
        "apply_to",
        Annotated[
            str | None,
            Option(
                "Model to quantize with the calibration of MODEL, such as a finetune of it. Both must have the same architecture, "
                "noise schedule and prediction type. MODEL may be the directory of an earlier quantize, which is then not "
                "calibrated again. A --lora is fused into MODEL2.",
                "MODEL2",
                panel=INPUT,
            ),
        ],
        None,
    ),
    (
        "effort",
        Annotated[
            str,
            Option(
                "Time to spend. fast trains nothing and takes few samples, default trains as the recipes do and less where "
                "the network is too large for a CPU, best takes twice the samples and iterations.",
                "fast|default|best",
                panel=QUALITY,
            ),
        ],
        "default",
    ),
)


def _fields() -> list[tuple[str, Any, Any]]:
    """Return (name, annotation, default) of all options. An option that an effort sets has the default None."""
    found: list[tuple[str, Any, Any]] = []
    for owner, names in PASSED_ON:
        hints = typing.get_type_hints(owner, include_extras=True)
        defaults = {field.name: field.default for field in dataclasses.fields(owner)}
        for name in names:
            hint, default = hints[name], defaults[name]
            if name == "samples":
                plain, option = typing.get_args(hint)
                hint, default = Annotated[plain | None, dataclasses.replace(option, show_default=False)], None
            found.append((name, hint, dataclasses.field(default=default)))
        if owner is DilateOptions:
            found += [(name, hint, dataclasses.field(default=default)) for name, hint, default in OWN]
    return found


def _check(options: Any) -> None:
    """Raise `UsageError` for an unknown effort; the stages check the options that they receive."""
    if options.effort not in EFFORTS:
        raise UsageError(
            f"unknown effort '{options.effort}'", where="--effort", fix=f"Choose from {', '.join(EFFORTS)}"
        )


QuantizeOptions: type = dataclasses.make_dataclass(
    "QuantizeOptions",
    _fields(),
    frozen=True,
    namespace={"__post_init__": _check, "__doc__": "Options of `dqtool quantize`.", "__module__": __name__},
)


def stage_values(options: Any, stage: str) -> dict[str, Any]:
    """Return the options that a stage receives, by field name. Options left at None or at their default are left out."""
    if stage in RECEIVERS:
        names = {field.name for field in dataclasses.fields(RECEIVERS[stage])}
    else:
        names = set(ALSO_EVAL) if stage == "eval" else set()
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    kept = [name for name in defaults if name in names and name != "output" and (stage, name) not in NOT_RECEIVED]
    values = {name: getattr(options, name) for name in kept}
    if stage == "calibrate" and "/" not in values["bits"]:
        del values["bits"]  # chosen by distill
    return {name: value for name, value in values.items() if value is not None and value != defaults[name]}
