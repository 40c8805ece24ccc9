"""`calibrate --statistics`: the calibration of one model for another of the same architecture, such as a finetune."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import TYPE_CHECKING

from dqtool.artifacts import Artifact, Manifest, open_artifact
from dqtool.artifacts.jsonvalues import Json
from dqtool.artifacts.records import PipelineRecord
from dqtool.errors import ArtifactError, UsageError
from dqtool.stages.options.calibrate import CalibrateOptions
from dqtool.stages.shared.running import StageOutput

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["check_reusable", "produce_reused", "reused_parameters", "statistics_of"]

OWN = ("artifact", "output", "statistics", "batch_size")
"""Options that go together with `--statistics`; the others decide about a trajectory that is not sampled."""
UNLIKE = ("_diffusers_version", "_name_or_path")
"""Keys of configs that tell nothing about a network."""


def statistics_of(options: CalibrateOptions) -> Artifact:
    """Return the calibrated artifact that `--statistics` names.

    Raises:
        UsageError: an option beside it asks for another calibration.
        ArtifactError: the artifact is of another stage.
    """
    assert options.statistics is not None
    others = [
        f"--{field.name.replace('_', '-')}"
        for field in fields(options)
        if field.name not in OWN and getattr(options, field.name) != field.default
    ]
    if others:
        raise UsageError(
            "Statistics are taken over with the settings that they were made with",
            where=f"{', '.join(others)} beside --statistics",
            fix="Leave these options out, or calibrate this model itself",
        )
    return open_artifact(options.statistics, ["calibrate"])


def reused_parameters(calibrated: Artifact) -> dict[str, Json]:
    """Return the parameters of the calibration whose statistics are taken over, and a note that they are."""
    return {**calibrated.manifest.parameters.as_read, "statistics": "taken over"}


def check_reusable(dilated: Artifact, calibrated: Artifact) -> None:
    """Raise `ArtifactError` for the statistics of a model of another architecture, noise schedule or prediction type."""
    for what, mine, theirs in _compared(dilated.manifest, calibrated.manifest):
        if mine != theirs:
            raise ArtifactError(
                f"These are the statistics of another kind of model: its {what} is {theirs!s:.100}, this model's {mine!s:.100}",
                where=f"--statistics {calibrated.given}",
                fix="Calibrate this model itself, or take the statistics of a model that it was finetuned from",
            )
    if any(
        layer.scaling and layer.scaling.folded_into for layer in (*dilated.manifest.layers, *calibrated.manifest.layers)
    ):
        raise ArtifactError(
            "Folded factors are part of a network, and can't be taken over",
            where=f"--statistics {calibrated.given}",
            fix="Run `dqtool dilate` of both models without --fold",
        )


def _compared(mine: Manifest, theirs: Manifest) -> Iterator[tuple[str, object, object]]:
    """Yield what two models must have in common: its name, and its value in both."""
    yield "class", mine.network.class_name, theirs.network.class_name
    for what, of in (
        ("scheduler", lambda manifest: (manifest.pipeline or PipelineRecord()).scheduler or {}),
        ("config", lambda manifest: manifest.network.config),
        ("layer", lambda manifest: {layer.name: (layer.kind, *layer.shape) for layer in manifest.layers}),
    ):
        one, other = of(mine), of(theirs)
        for key in dict.fromkeys([*one, *other]):
            if key not in UNLIKE:
                yield f"{what} {key}", one.get(key), other.get(key)


def produce_reused(dilated: Artifact, calibrated: Artifact) -> StageOutput:
    """Return the calibration of `dilated` with the factors, samples and statistics of `calibrated`."""
    from dqtool.models.networks.checked_artifacts import checked_tensors
    from dqtool.scaling.reusing import reuse_factors
    from dqtool.stages.shared.artifact_models import split_dilated, teacher_of

    manifest, tensors, found = dilated.manifest, checked_tensors(dilated), checked_tensors(calibrated)
    reused = reuse_factors(manifest, tensors, teacher_of(manifest, tensors), calibrated.manifest, found)
    network, _ = split_dilated(found)
    everything: dict[str, Tensor] = {
        name: value for name, value in found.items() if name not in network and not name.endswith(".dilation")
    }
    metrics = {**calibrated.manifest.metrics.to_json(), **manifest.metrics.to_json(), **reused.metrics}
    pipeline = replace(manifest.pipeline or PipelineRecord(), sampling=calibrated.manifest.sampling)
    return StageOutput(
        reused.tensors | everything,
        manifest.network,
        pipeline,
        reused.records,
        metrics,
        attachments=dilated.attachments(),
    )
