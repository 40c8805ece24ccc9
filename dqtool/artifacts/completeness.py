"""Check that a manifest holds everything that the stage after its own needs."""

from __future__ import annotations

from dqtool.artifacts.manifest import REPORTS, Manifest
from dqtool.artifacts.manifest_reading import refuse
from dqtool.artifacts.schema import Mismatch

__all__ = ["check_complete"]


def check_complete(manifest: Manifest, where: str) -> None:
    """Raise `ArtifactError` with the first key that the next stage needs and the manifest at `where` lacks."""
    refuse(_missing(manifest), where)


def _missing(found: Manifest) -> Mismatch | None:
    """Return the first thing that the next stage needs and the manifest lacks."""
    stage, there = found.stage, "there: the key is missing"
    if stage in REPORTS:
        return None
    if found.model is None:
        return Mismatch("model", there)
    if stage in ("dilate", "calibrate") and (found.metrics.blocks is None or found.metrics.output_reads is None):
        return Mismatch("metrics.blocks" if found.metrics.blocks is None else "metrics.output_reads", there)
    if stage in ("calibrate", "distill", "export") and (found.pipeline is None or found.pipeline.sampling is None):
        return Mismatch("pipeline.sampling", there)
    if stage == "calibrate" and found.metrics.samples_per_step is None:
        return Mismatch("metrics.samples_per_step", there)
    if stage in ("distill", "export"):
        for number, layer in enumerate(found.layers):
            if layer.bits is None or layer.dilated is None:
                return Mismatch(f"layers[{number}].{'bits' if layer.bits is None else 'dilated'}", there)
    if stage == "export" and not found.parameters.format:
        return Mismatch("parameters.format", "a text")
    pipeline = found.pipeline
    if pipeline is not None and pipeline.component is not None:
        entry = (pipeline.model_index or {}).get(pipeline.component)
        if not _is_entry(entry):
            return Mismatch(f"pipeline.model_index.{pipeline.component}", "a list of library and class")
        if pipeline.scheduler is None:
            return Mismatch("pipeline.scheduler", "an object")
    if pipeline is not None and pipeline.model_index is not None and pipeline.component is None:
        return Mismatch("pipeline.component", "a text")
    for name, entry in ((pipeline.model_index if pipeline else None) or {}).items():
        if isinstance(entry, list | tuple) and not _is_entry(entry):
            return Mismatch(f"pipeline.model_index.{name}", "a list of library and class")
    return None


def _is_entry(entry: object) -> bool:
    return isinstance(entry, list | tuple) and len(entry) == 2 and all(isinstance(e, str | None) for e in entry)
