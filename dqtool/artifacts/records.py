"""Contents of a manifest as typed records: model, pipeline, sampling, layers, inputs, metrics, environment.

A manifest's checksum shows that nobody edited it, but an attacker can compute one. `records_of` checks every value that a
stage relies on before any use, and an error names the key.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from dqtool.artifacts.manifest import REPORTS
from dqtool.artifacts.schema import Between, Count, Name, Problem, Size, Step, record
from dqtool.errors import ArtifactError

if TYPE_CHECKING:
    from dqtool.artifacts.manifest import Manifest

__all__ = [
    "BlockRecord",
    "EnvironmentRecord",
    "InputRecord",
    "LayerRecord",
    "MetricsRecord",
    "ModelRecord",
    "PipelineRecord",
    "Records",
    "SamplingRecord",
    "ScalingRecord",
    "records_of",
]

Bits = Literal[2, 3, 4, 5, 6, 7, 8, 16, 32]
Entry = tuple[str | None, str | None] | str | float | bool | list[Any] | dict[str, Any] | None
Finite = Annotated[float, Between(-1e30, 1e30)]
_MOST = 100_000


@dataclass(frozen=True)
class InputRecord:
    """An input of the stage: its name as given, digest, and the stage that made it (None: a model)."""

    name: str
    sha256: Annotated[str, Between(64, 64)]
    stage: str | None = None


@dataclass(frozen=True)
class ScalingRecord:
    """Scaling of a layer's channels: the method, and a summary of its factors."""

    method: str | None = None
    max: Finite | None = None
    mean: Finite | None = None
    mean_inverse: Finite | None = None
    unsaturated_share: Finite | None = None
    folded_into: list[str] | None = None
    shifted_in: list[str] | None = None


@dataclass(frozen=True)
class LayerRecord:
    """A layer in execution order; `shape` `[out, in, ...]` of its weight, `bits` of weight and input once chosen.

    `low_rank` is the rank of the float branch beside its product, `rotation` the group size of its input's rotation; 0 for
    none.
    """

    name: Name
    kind: Literal["conv2d", "linear", "attention"]
    shape: Annotated[tuple[Size, ...], Between(1, 8)]
    macs: Count
    role: Literal["input", "output"] | None = None
    groups: Size = 1
    heads: Annotated[int, Between(0, 1 << 17)] = 0
    bias: bool = False
    shares: Name | None = None
    rotation: Literal[0, 16, 32, 64] = 0
    bits: tuple[Bits, Bits] | None = None
    dilated: bool | None = None
    low_rank: Annotated[int, Between(0, 1 << 16)] = 0
    runs: str | None = None
    scaling: ScalingRecord | None = None


@dataclass(frozen=True)
class BlockRecord:
    """A unit of training, and the blocks whose outputs it reads."""

    name: Name
    reads: list[Name] = field(default_factory=list)


@dataclass(frozen=True)
class ModelRecord:
    """The network: its diffusers class and config, and where it came from."""

    class_name: Annotated[Name, "class"]
    config: dict[str, Any]
    family: str
    source: str
    source_config: str | None = None
    source_component: str | None = None
    source_loras: list[str] = field(default_factory=list)
    source_sha256: Annotated[str, Between(64, 64)] | None = None
    source_told: dict[str, str] = field(default_factory=dict)
    parameters: Count = 0


@dataclass(frozen=True)
class ConditionsRecord:
    """Origin of the conditions of a calibration that are not the model's own."""

    origin: Annotated[Literal["file", "pipeline", "random"], "from"]
    path: Name | None = None
    sha256: Annotated[str, Between(64, 64)] | None = None


@dataclass(frozen=True)
class SamplingRecord:
    """Sampling of the model in calibration."""

    scheduler: dict[str, Any]
    steps: Step
    eta: Annotated[float, Between(0, 1e6)]
    sampler: str | None = None
    guidance: Finite | None = None
    embedded_guidance: Finite | None = None
    conditions: ConditionsRecord | None = None


@dataclass(frozen=True)
class PipelineRecord:
    """The pipeline around the network. An original checkpoint has its noise schedule only."""

    component: Name | None = None
    model_index: dict[str, Entry] | None = None
    scheduler: dict[str, Any] | None = None
    sampling: SamplingRecord | None = None


@dataclass(frozen=True)
class LaterRecord:
    """The scaling that `dilate` leaves to be chosen in `calibrate`."""

    scaling: str
    cap: Annotated[float, Between(1, 1e9)]
    threshold: Finite
    bits: str


@dataclass(frozen=True)
class MetricsRecord:
    """The metrics that a later stage reads; others are finite numbers and texts."""

    blocks: Annotated[list[BlockRecord], Between(1, _MOST)] | None = None
    output_reads: list[Name] | None = None
    samples_per_step: Annotated[list[Count], Between(1, _MOST)] | None = None
    activation_range_ratios: dict[str, Finite] | None = None
    scaling_in_calibrate: LaterRecord | None = None
    bytes: Count | None = None


@dataclass(frozen=True)
class EnvironmentRecord:
    """Environment that computed an artifact: versions of packages, platform, device, threads."""

    versions: dict[str, str] = field(default_factory=dict)
    platform: str = ""
    device: str = ""
    threads: Count | None = None


@dataclass(frozen=True)
class Records:
    """All records of a manifest; `model` and `pipeline` are None where the manifest has none."""

    model: ModelRecord | None
    pipeline: PipelineRecord | None
    layers: list[LayerRecord]
    inputs: list[InputRecord]
    metrics: MetricsRecord
    environment: EnvironmentRecord
    parameters: dict[str, Any]


def records_of(manifest: Manifest, where: str, *, whole: bool = False) -> Records:
    """Return a manifest's records; `where` is its path, for messages. With `whole` it must hold all that the stage after
    its own needs.

    Raises:
        ArtifactError: names the key of the first value that is not what it must be.
    """
    payload = {
        "model": manifest.model or None,
        "pipeline": manifest.pipeline,
        "layers": manifest.layers,
        "inputs": manifest.inputs,
        "metrics": manifest.metrics,
        "environment": manifest.environment,
        "parameters": manifest.parameters,
    }
    try:
        if manifest.stage in REPORTS and not whole:
            payload["layers"] = []  # no stage reads the layers of a report
        found = record(payload, Records)
        problem = _crossed(found) or (_missing(found, manifest.stage) if whole else None)
        if problem is not None:
            raise ValueError(problem)
    except ValueError as error:
        problem = error.args[0]
        raise ArtifactError(
            f"The manifest is malformed: {problem.key} must be {problem.what}",
            where=f"{where}, key {problem.key}",
            fix="Make the artifact again, or restore the manifest that was written with it",
        ) from error
    return found


def _crossed(found: Records) -> Problem | None:
    """Return what is wrong with records that each are right."""
    names: set[str] = set()
    for number, layer in enumerate(found.layers):
        key = f"layers[{number}]"
        if layer.name in names:
            return Problem(f"{key}.name", "a name that no layer before has")
        names.add(layer.name)
        if layer.kind != "attention" and len(layer.shape) != (4 if layer.kind == "conv2d" else 2):
            return Problem(f"{key}.shape", f"that of a {layer.kind} layer's weight")
        if layer.kind == "attention" and layer.heads < 1:
            return Problem(f"{key}.heads", "1 or more")
    for number, layer in enumerate(found.layers):
        if layer.shares is not None and layer.shares not in names:
            return Problem(f"layers[{number}].shares", "the name of a layer")
    blocks: set[str] = set()
    for number, block in enumerate(found.metrics.blocks or ()):
        if not blocks.issuperset(block.reads):
            return Problem(f"metrics.blocks[{number}].reads", "names of earlier blocks")
        blocks.add(block.name)
    if found.metrics.output_reads is not None and not blocks.issuperset(found.metrics.output_reads):
        return Problem("metrics.output_reads", "names of blocks")
    return None


def _missing(found: Records, stage: str) -> Problem | None:
    """Return what the stage after `stage` needs and the manifest lacks."""
    there = "there: the key is missing"
    if stage in REPORTS:
        return None
    if found.model is None:
        return Problem("model", there)
    if stage in ("dilate", "calibrate") and (found.metrics.blocks is None or found.metrics.output_reads is None):
        return Problem("metrics.blocks" if found.metrics.blocks is None else "metrics.output_reads", there)
    if stage in ("calibrate", "distill", "export") and (found.pipeline is None or found.pipeline.sampling is None):
        return Problem("pipeline.sampling", there)
    if stage == "calibrate" and found.metrics.samples_per_step is None:
        return Problem("metrics.samples_per_step", there)
    if stage in ("distill", "export"):
        for number, layer in enumerate(found.layers):
            if layer.bits is None or layer.dilated is None:
                return Problem(f"layers[{number}].{'bits' if layer.bits is None else 'dilated'}", there)
    if stage == "export" and not isinstance(found.parameters.get("format"), str):
        return Problem("parameters.format", "a text")
    pipeline = found.pipeline
    if pipeline is not None and pipeline.component is not None:
        entry = (pipeline.model_index or {}).get(pipeline.component)
        if not _is_entry(entry):
            return Problem(f"pipeline.model_index.{pipeline.component}", "a list of library and class")
        if pipeline.scheduler is None:
            return Problem("pipeline.scheduler", "an object")
    if pipeline is not None and pipeline.model_index is not None and pipeline.component is None:
        return Problem("pipeline.component", "a text")
    for name, entry in ((pipeline.model_index if pipeline else None) or {}).items():
        if isinstance(entry, list | tuple) and not _is_entry(entry):
            return Problem(f"pipeline.model_index.{name}", "a list of library and class")
    return None


def _is_entry(entry: object) -> bool:
    return isinstance(entry, list | tuple) and len(entry) == 2 and all(isinstance(e, str | None) for e in entry)
