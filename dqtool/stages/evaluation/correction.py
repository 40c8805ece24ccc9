"""`--correction` of `eval` and `sample`: whether the network's own tables correct its predictions in a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dqtool import report
from dqtool.artifacts import Artifact, Manifest
from dqtool.artifacts.jsonvalues import Json, JsonObject
from dqtool.artifacts.records import SamplingRecord
from dqtool.errors import UsageError
from dqtool.models.sampling.fitted import AUTO, FITTED, OFF, ON, fitted_with, misfit, sentence

if TYPE_CHECKING:
    from torch import nn

    from dqtool.stages.evaluation.images import ImageMaker

__all__ = ["fitted_of", "switch_correction", "used_by_maker"]


def switch_correction(network: nn.Module, artifact: Artifact, maker: ImageMaker, asked: str, stage: str) -> str | None:
    """Switch the tables of `network` on or off for the sampling of `maker`, and return "on" or "off".

    `auto` switches them off, with one message, for a sampling that they are not for (`misfit`). Return None for a network
    without tables.

    Raises:
        UsageError: the tables are part of an exported graph and can't be switched off.
    """
    from dqtool.nn.prediction import has_prediction, set_correcting

    manifest = artifact.manifest
    fitted = fitted_of(manifest, has_prediction(network))
    if fitted is None:
        return None
    different = misfit(fitted, used_by_maker(maker, fitted))
    on = asked == ON or (asked == AUTO and not different)
    if not on and manifest.parameters.format == "openvino":
        if asked == OFF:
            raise UsageError(
                "The correction of predictions is part of this graph",
                where="--correction off",
                fix="Export with --format dq, which every runtime reads",
            )
        report.warn(f"{stage}: predictions are corrected for {sentence(fitted)}, which this graph can't leave out")
        return ON
    set_correcting(network, on)
    if asked == AUTO and different:
        report.warn(
            f"{stage}: the correction of predictions is off. It was fitted with {sentence(fitted)}; here are {different}. "
            "--correction on keeps it"
        )
    return ON if on else OFF


def fitted_of(manifest: Manifest, has_tables: bool) -> JsonObject | None:
    """Return the sampling that an artifact's tables were fitted with: its record, or the calibration's where an earlier
    version wrote none. Return None without tables."""
    found = manifest.metrics.as_read.get(FITTED)
    if isinstance(found, Mapping):
        return found
    return fitted_with(manifest.sampling) if has_tables and manifest.sampling is not None else None


def used_by_maker(maker: ImageMaker, fitted: JsonObject) -> dict[str, Json]:
    """Return the record of a maker's sampling. Listed timesteps are the calibration's own or have its spacing."""
    sampler, embedded = maker.sampler, maker.conditions.embedded
    spacing = fitted.get("spacing")
    return fitted_with(
        SamplingRecord(
            {**sampler.scheduler.config, "_class_name": type(sampler.scheduler).__name__},
            sampler.steps,
            sampler.eta,
            guidance=sampler.guidance if embedded is None else embedded,
            timesteps=None if sampler.listed is None else list(sampler.listed),
            spacing=spacing if isinstance(spacing, str) else None,
        )
    )
