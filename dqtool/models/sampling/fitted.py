"""Sampling that a correction of predictions was fitted with, and its comparison with the sampling that is used.

The record goes from `distill` through the export to `config.json`. It holds the scheduler's class, the spacing of its
timesteps, the number of steps, eta, and the weight of classifier-free guidance (1 without).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dqtool.errors import UsageError

if TYPE_CHECKING:  # `dqtool --help` reads the names of the corrections, and needs no records.
    from dqtool.artifacts.jsonvalues import Json
    from dqtool.artifacts.records import SamplingRecord

__all__ = [
    "AUTO",
    "CORRECTIONS",
    "FITTED",
    "OFF",
    "ON",
    "check_correction",
    "differs_by",
    "fitted_with",
    "misfit",
    "sentence",
    "used_by",
]

FITTED = "corrected_for"
"""Key of the record in metrics of artifacts and in the `quantization_config` of exports."""

AUTO, ON, OFF = CORRECTIONS = ("auto", "on", "off")
"""Choices of a user: a correction where it fits, always, or never."""

HELPS = ("DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler")
"""Schedulers among which a correction helps, or costs nothing, when it was fitted with another one of them, with other
steps or with another spacing (`recipes/results/table-correction.md`)."""

HARMLESS = ("scheduler", "spacing", "steps", "guidance")
"""Keys of the record that may differ among these schedulers."""

_LISTED = "listed"
_WORDS = {"scheduler": "", "spacing": "spacing ", "steps": " steps", "eta": "eta ", "guidance": "guidance "}


def check_correction(value: str, where: str = "--correction") -> None:
    """Raise `UsageError` for a value that is not one of `CORRECTIONS`."""
    if value not in CORRECTIONS:
        raise UsageError(f"unknown correction '{value}'", where=where, fix=f"Choose from {', '.join(CORRECTIONS)}")


def fitted_with(sampling: SamplingRecord) -> dict[str, Json]:
    """Return the record of a correction that is fitted with a manifest's `sampling`."""
    scheduler, listed = sampling.scheduler, sampling.timesteps is not None
    return {
        "scheduler": str(scheduler.get("_class_name")),
        "spacing": (sampling.spacing or _LISTED) if listed else scheduler.get("timestep_spacing"),
        "steps": sampling.steps,
        "eta": float(sampling.eta),
        "guidance": float(sampling.embedded_guidance or sampling.guidance or 1.0),
    }


def used_by(
    scheduler: Any, steps: int | None, eta: float | None, guidance: float | None, listed: bool = False
) -> dict[str, Json]:
    """Return the same record of a diffusers scheduler in use. None stands for what is not known."""
    config = scheduler.config
    return {
        "scheduler": str(config.get("_class_name") or type(scheduler).__name__),
        "spacing": None if listed else config.get("timestep_spacing"),
        "steps": steps,
        "eta": eta,
        "guidance": guidance,
    }


def differs_by(fitted: Mapping[str, Any], used: Mapping[str, Any]) -> list[str]:
    """Return the keys of the record in which `used` differs from `fitted`. Entries that are not known don't differ."""
    return [
        key
        for key in _WORDS
        if used.get(key) is not None and fitted.get(key) is not None and not _same(fitted[key], used[key])
    ]


def misfit(fitted: Mapping[str, Any], used: Mapping[str, Any]) -> str:
    """Return why a correction is not for the sampling in use, such as `PNDMScheduler in place of DDIMScheduler`.

    Return "" where it is: the sampling is that of the fit, or differs in what was measured to do no harm (`HELPS`).
    """
    different = differs_by(fitted, used)
    if {fitted["scheduler"], used.get("scheduler")} <= {*HELPS, None}:
        different = [key for key in different if key not in HARMLESS]
    return ", ".join(f"{_word(key, used[key])} in place of {_word(key, fitted[key])}" for key in different)


def sentence(fitted: Mapping[str, Any]) -> str:
    """Return the record in words: `DDIMScheduler, trailing spacing, 20 steps, eta 0, guidance 1.2`."""
    parts = [str(fitted["scheduler"])]
    if fitted.get("spacing"):
        parts.append(f"{fitted['spacing']} spacing")
    return ", ".join([*parts, f"{fitted['steps']} steps", f"eta {fitted['eta']:g}", f"guidance {fitted['guidance']:g}"])


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return str(one) == str(other)
    return abs(float(one) - float(other)) <= 1e-6 * max(1.0, abs(float(one)))


def _word(key: str, value: Any) -> str:
    text = f"{value:g}" if isinstance(value, int | float) else str(value)
    return f"{text}{_WORDS[key]}" if key == "steps" else f"{_WORDS[key]}{text}"
