"""`dq`: packed codes, read by `DiffusionPipeline.from_pretrained` (with dqtool imported) and `dqtool.load`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dqtool.artifacts import Artifact
from dqtool.artifacts.tensorfile import save_tensors
from dqtool.core.cost import FLOAT32
from dqtool.formats import Exported
from dqtool.formats.shapes import network_shapes, predicted_bytes
from dqtool.models.components.export_layout import WEIGHTS
from dqtool.models.families import family_of
from dqtool.models.hub.quantizer import quantization_config
from dqtool.models.networks.checked_artifacts import checked_tensors
from dqtool.models.networks.packed import is_static, plan_records, plans_of, prediction_rows
from dqtool.models.networks.packed_checks import step_count
from dqtool.models.sampling.fitted import FITTED
from dqtool.nn.integer import runs_as
from dqtool.nn.surgery import state_shapes

__all__ = ["prepare"]


def prepare(distilled: Artifact) -> Exported:
    """Prepare the distilled tensors as they are, with the layers' bits in the `quantization_config`.

    The manifest lists for each layer if integer runtimes compute it in int8 (`runs`).
    """
    manifest, tensors = distilled.manifest, checked_tensors(distilled)
    config, timesteps = dict(manifest.network.config), step_count(tensors)
    family = family_of(manifest.network.class_name, distilled.given, config)
    float_shapes = network_shapes(family, config, manifest.layers)
    rows = prediction_rows(tensors)
    predicted = predicted_bytes(state_shapes(float_shapes, plans_of(manifest), timesteps, rows))
    config["quantization_config"] = quantization_config(
        plan_records(manifest.layers),
        timesteps,
        rows,
        is_static(manifest, timesteps),
        manifest.metrics.as_read.get(FITTED),
    )

    def write(directory: Path) -> None:
        save_tensors(directory / WEIGHTS, tensors)

    # `runs` is int8, or the reason why integer runtimes compute the layer in float.
    layers = [replace(each, runs=runs_as(each.kind, *(each.bits or FLOAT32))) for each in manifest.layers]
    return Exported(config, layers, write, predicted)
