"""Records of a manifest's object, checked: each value by its type, then the values against each other."""

from __future__ import annotations

import dataclasses

from dqtool.artifacts.jsonvalues import JsonObject
from dqtool.artifacts.records import METRICS, MetricsRecord, Records
from dqtool.artifacts.schema import Mismatch, record
from dqtool.errors import ArtifactError

__all__ = ["records_of", "refuse"]


def records_of(payload: JsonObject, stage: str, where: str) -> Records:
    """Return the records of a manifest's object; `where` is its path, for messages.

    Raises:
        ArtifactError: names the key of the first value that is not what it must be.
    """
    payload = {**payload, "model": payload["model"] or None}
    kind = METRICS.get(stage, MetricsRecord)
    try:
        metrics = record(payload["metrics"], kind, "metrics")
        found = record({**payload, "metrics": {}}, Records)
        found = dataclasses.replace(found, metrics=metrics)
        refuse(_crossed(found), where)
    except ValueError as error:
        refuse(error.args[0], where)
        raise
    return found


def refuse(problem: Mismatch | None, where: str) -> None:
    """Raise `ArtifactError` if there is a problem with the manifest at `where`."""
    if problem is not None:
        raise ArtifactError(
            f"The manifest is malformed: {problem.key} must be {problem.what}",
            where=f"{where}, key {problem.key}",
            fix="Make the artifact again, or restore the manifest that was written with it",
        )


def _crossed(found: Records) -> Mismatch | None:
    """Return the first value that contradicts another one; each is right by itself."""
    names: set[str] = set()
    for number, layer in enumerate(found.layers):
        key = f"layers[{number}]"
        if layer.name in names:
            return Mismatch(f"{key}.name", "a name that no layer before has")
        names.add(layer.name)
        if layer.kind != "attention" and len(layer.shape) != (4 if layer.kind == "conv2d" else 2):
            return Mismatch(f"{key}.shape", f"that of a {layer.kind} layer's weight")
        if layer.kind == "attention" and layer.heads < 1:
            return Mismatch(f"{key}.heads", "1 or more")
    for number, layer in enumerate(found.layers):
        if layer.shares is not None and layer.shares not in names:
            return Mismatch(f"layers[{number}].shares", "the name of a layer")
    blocks: set[str] = set()
    for number, block in enumerate(found.metrics.blocks or ()):
        if not blocks.issuperset(block.reads):
            return Mismatch(f"metrics.blocks[{number}].reads", "names of earlier blocks")
        blocks.add(block.name)
    if found.metrics.output_reads is not None and not blocks.issuperset(found.metrics.output_reads):
        return Mismatch("metrics.output_reads", "names of blocks")
    return None
