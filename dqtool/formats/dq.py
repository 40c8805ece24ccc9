"""`dq`: packed codes, as `DiffusionPipeline.from_pretrained` (with dqtool imported) and `dqtool.load` read them."""

from __future__ import annotations

from pathlib import Path

from dqtool.artifacts import Artifact
from dqtool.artifacts.tensorfile import save_tensors
from dqtool.core.cost import file_bytes
from dqtool.formats import Exported
from dqtool.formats.shapes import network_shapes, swapped
from dqtool.models.export_layout import WEIGHTS
from dqtool.models.families import family_of
from dqtool.models.hub import quantization_config
from dqtool.models.packed import plan_records, plans_of
from dqtool.nn.surgery import state_shapes

__all__ = ["prepare"]


def prepare(distilled: Artifact) -> Exported:
    """The distilled tensors as they are; the layers' bits stand in the `quantization_config`."""
    manifest, tensors = distilled.manifest, distilled.tensors()
    config, timesteps = dict(manifest.model["config"]), len(tensors["timesteps"])
    float_shapes = network_shapes(family_of(manifest.model["class"], distilled.given), config, manifest.layers)
    predicted = file_bytes(swapped(state_shapes(float_shapes, plans_of(manifest), timesteps)))
    config["quantization_config"] = quantization_config(plan_records(manifest.layers), timesteps)

    def write(directory: Path) -> None:
        save_tensors(directory / WEIGHTS, tensors)

    return Exported(config, manifest.layers, write, predicted)
