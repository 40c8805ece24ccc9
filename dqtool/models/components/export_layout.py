"""Layout of an exported directory, which is a diffusers directory. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from dqtool.artifacts.names import check_component
from dqtool.artifacts.records import PipelineRecord

__all__ = ["WEIGHTS", "component_prefix", "weights_file", "weights_files"]

WEIGHTS = "diffusion_pytorch_model.safetensors"


def component_prefix(pipeline: PipelineRecord | None) -> str:
    """Return `"unet/"` for a pipeline, `""` for a bare component: a component in gives a component out.

    Raises:
        ArtifactError: the component's name, which comes from a manifest, is no plain word.
    """
    if pipeline is None or pipeline.component is None:
        return ""
    return f"{check_component(pipeline.component, 'manifest, key pipeline.component')}/"


def weights_file(pipeline: PipelineRecord | None) -> str:
    """Return the path of the network's weights relative to the exported directory."""
    return component_prefix(pipeline) + WEIGHTS


def weights_files(pipeline: PipelineRecord | None, files: Iterable[str]) -> list[str]:
    """Return the network's weight files among an export's `files`: one file or its shards, of a variant where no other exists."""
    whole = weights_file(pipeline)
    stem = whole.removesuffix(".safetensors")
    others = sorted(name for name in files if name.startswith(stem) and name.endswith(".safetensors"))
    return others if whole not in others and others else [whole]
