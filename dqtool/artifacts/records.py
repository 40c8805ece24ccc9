"""Contents of a manifest as typed records: model, pipeline, sampling, layers, inputs, metrics, parameters, environment.

A manifest's checksum shows that nobody edited it, but an attacker can compute one. `manifest_reading.records_of` checks every value that a
stage relies on before any use, and an error names the key. Keys that no record names are kept (`Record.as_read`) and
written again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from dqtool.artifacts.jsonvalues import ForeignConfig
from dqtool.artifacts.schema import Bounds, Count, Name, OneOf, Record, Size, Step

__all__ = [
    "METRICS",
    "BlockRecord",
    "ConditionsRecord",
    "CostRecord",
    "EnvironmentRecord",
    "EvalRecord",
    "FileRecord",
    "InputRecord",
    "LayerRecord",
    "MetricsRecord",
    "ModelRecord",
    "OperandRecord",
    "ParametersRecord",
    "PipelineRecord",
    "PlanRecord",
    "Records",
    "SamplingRecord",
    "ScalingRecord",
    "SensitivityRecord",
    "StageRecord",
]

Bits = Annotated[int, OneOf((2, 3, 4, 5, 6, 7, 8, 16, 32))]
Finite = Annotated[float, Bounds(-1e30, 1e30)]
Sha256 = Annotated[str, Bounds(64, 64)]
_MOST = 100_000


@dataclass(frozen=True)
class FileRecord(Record):
    """A file of an artifact. `name` is that of the only file; in a directory the path is the key."""

    bytes: Count
    sha256: Sha256
    name: str | None = None


@dataclass(frozen=True)
class StageRecord(Record):
    """A stage that an artifact went through: its name, the version of dqtool, and all its parameters."""

    stage: str
    version: str
    parameters: ParametersRecord


@dataclass(frozen=True)
class InputRecord(Record):
    """An input of the stage: its name as given, digest, and the stage that made it (None: a model).

    `history` lists the stages that made the input, first to last, so that an export and its results name the seeds, method
    and passes of the whole chain. Artifacts of version 0.1.0 lack it. `described` is the digest of what the input's manifest says
    of the network, its pipeline and its sampling, which the data does not hold; a model has none.
    """

    written: ClassVar[frozenset[str]] = frozenset({"stage"})

    name: str
    sha256: Sha256
    stage: str | None = None
    history: Annotated[list[StageRecord], Bounds(0, 100)] = field(default_factory=list)
    described: Sha256 | None = None

    @property
    def identity(self) -> str:
        """Return the part of the input in the fingerprint of what is made of it."""
        return self.sha256 if self.described is None else f"{self.sha256} {self.described}"


@dataclass(frozen=True)
class ScalingRecord(Record):
    """Scaling of a layer's channels: the method (and the one that chose it), and a summary of its factors."""

    method: str | None = None
    max: Finite | None = None
    mean: Finite | None = None
    mean_inverse: Finite | None = None
    unsaturated_share: Finite | None = None
    asked: str | None = None
    learned: bool = False
    folded_into: list[str] | None = None
    shifted_in: list[str] | None = None


@dataclass(frozen=True)
class LayerRecord(Record):
    """A layer in execution order; `shape` `[out, in, ...]` of its weight, `bits` of weight and input once chosen.

    `low_rank` is the rank of the float branch beside its product, `rotation` the group size of its input's rotation; 0 for
    none. `runs` is "int8", or the reason why integer runtimes compute the layer in float.
    """

    name: Name
    kind: Literal["conv2d", "linear", "attention"]
    shape: Annotated[tuple[Size, ...], Bounds(1, 8)]
    macs: Count
    role: Literal["input", "output"] | None = None
    groups: Size = 1
    heads: Annotated[int, Bounds(0, 1 << 17)] = 0
    bias: bool = False
    shares: Name | None = None
    rotation: Annotated[int, OneOf((0, 16, 32, 64))] = 0
    bits: tuple[Bits, Bits] | None = None
    dilated: bool | None = None
    low_rank: Annotated[int, Bounds(0, 1 << 16)] = 0
    runs: str | None = None
    scaling: ScalingRecord | None = None


@dataclass(frozen=True)
class BlockRecord(Record):
    """A unit of training, and the blocks whose outputs it reads."""

    name: Name
    reads: list[Name] = field(default_factory=list)


@dataclass(frozen=True)
class ModelRecord(Record):
    """The network: its diffusers class and config, and where it came from."""

    class_name: Annotated[Name, "class"]
    config: ForeignConfig
    family: str
    source: str
    source_config: str | None = None
    source_component: str | None = None
    source_loras: list[str] = field(default_factory=list)
    source_sha256: Sha256 | None = None
    source_told: dict[str, str] = field(default_factory=dict)
    parameters: Count = 0


@dataclass(frozen=True)
class ConditionsRecord(Record):
    """Origin of the conditions of a calibration that are not the model's own."""

    origin: Annotated[Literal["file", "pipeline", "images", "random"], "from"]
    path: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class SamplingRecord(Record):
    """Sampling of the model in calibration. `timesteps` are listed where the scheduler doesn't choose them itself."""

    written: ClassVar[frozenset[str]] = frozenset({"sampler"})

    scheduler: ForeignConfig
    steps: Step
    eta: Annotated[float, Bounds(0, 1e6)]
    sampler: str | None = None
    guidance: Finite | None = None
    embedded_guidance: Finite | None = None
    image_guidance: Finite | None = None
    timesteps: list[Finite] | None = None
    spacing: str | None = None
    conditions: ConditionsRecord | None = None


@dataclass(frozen=True)
class PipelineRecord(Record):
    """The pipeline around the network. An original checkpoint has its noise schedule only."""

    component: Name | None = None
    model_index: ForeignConfig | None = None
    scheduler: ForeignConfig | None = None
    sampling: SamplingRecord | None = None


@dataclass(frozen=True)
class RecipeRecord(Record):
    """Options of a training method. Each method has more of its own."""

    iters: int | None = None
    refine_iters: int | None = None


@dataclass(frozen=True)
class SavedRecord(Record):
    """A file beside a report, or one that it was made with: its name, and digest."""

    file: str
    sha256: str | None = None


@dataclass(frozen=True)
class ParametersRecord(Record):
    """Parameters of a stage that others read; each stage records more (`as_read`). 0.1 recorded `scaling` as an object."""

    format: str | None = None
    method: str | None = None
    preset: str | None = None
    scaling: str | dict[str, Any] | None = None
    cap: Finite | None = None
    threshold: Finite | None = None
    seed: int | None = None
    steps: int | None = None
    samples: int | None = None
    passes: int | None = None
    sampler: str | None = None
    guidance: Finite | None = None
    runtime: str | None = None
    static: bool = False
    train_samples: int | None = None
    image_size: int | None = None
    correct_noise: bool = False
    grid: str | None = None
    prompts: list[str] | str | None = None
    files: dict[str, SavedRecord] = field(default_factory=dict)
    keep: list[str] = field(default_factory=list)
    recipe: RecipeRecord | None = None


@dataclass(frozen=True)
class LaterRecord:
    """The scaling that `dilate` leaves to be chosen in `calibrate`."""

    scaling: str
    cap: Annotated[float, Bounds(1, 1e9)]
    threshold: Finite
    bits: str


@dataclass(frozen=True)
class MetricsRecord(Record):
    """The metrics that a later stage reads; others are finite numbers and texts."""

    blocks: Annotated[list[BlockRecord], Bounds(1, _MOST)] | None = None
    output_reads: list[Name] | None = None
    samples_per_step: Annotated[list[Count], Bounds(1, _MOST)] | None = None
    activation_range_ratios: dict[str, Finite] | None = None
    scaling_in_calibrate: LaterRecord | None = None
    bytes: Count | None = None


@dataclass(frozen=True)
class CostRecord(Record):
    """Size of the weights' file and bit operations of a step, beside those of float32."""

    bytes: Count
    bytes_float32: Count
    size_ratio: Finite
    bops: Count
    bops_float32: Count
    bops_ratio: Finite


@dataclass(frozen=True)
class ExtractorRecord(Record):
    """A network whose features a figure is computed on."""

    name: str | None = None
    sha256: str | None = None
    features: int | None = None


@dataclass(frozen=True)
class EvalRecord(MetricsRecord):
    """Metrics of an eval report. Its figures have keys of their own (`dqtool.metrics.FIGURES`): see `as_read`.

    Attributes:
        reference: figures of the full-precision model.
        reference_is: description of a reference other than that model.
        layer_errors: relative squared error of each layer's output.
        missed_timesteps: timesteps that the step tables are not for.
    """

    samples: Count | None = None
    runtime: str | None = None
    reference: dict[str, Any] = field(default_factory=dict)
    reference_is: str | None = None
    cost: CostRecord | None = None
    layer_errors: dict[str, Finite] = field(default_factory=dict)
    missed_timesteps: list[Finite] | None = None
    grid: SavedRecord | None = None
    extractor: ExtractorRecord | None = None
    extractors: dict[str, ExtractorRecord] = field(default_factory=dict)


@dataclass(frozen=True)
class OperandRecord(Record):
    """Error of the samples when one operand of one layer alone is quantized, and its share of all such errors."""

    layer: Name
    operand: str
    bits: int
    error: Finite
    psnr: dict[str, Finite]
    share: Finite


@dataclass(frozen=True)
class PlanRecord(Record):
    """A choice of bits on the frontier of quality against size and bit operations."""

    bits: str
    psnr: Finite
    weight_bytes: Count
    bops: Count
    measured_psnr: Finite | None = None


@dataclass(frozen=True)
class SensitivityRecord(MetricsRecord):
    """Metrics of a sensitivity report; `keep` lists the options to type."""

    written: ClassVar[frozenset[str]] = frozenset({"operands", "keep", "frontier"})

    operands: list[OperandRecord] = field(default_factory=list)
    predicted_psnr: Finite | None = None
    keep: list[str] = field(default_factory=list)
    frontier: list[PlanRecord] = field(default_factory=list)


METRICS: dict[str, type[MetricsRecord]] = {"eval": EvalRecord, "sensitivity": SensitivityRecord}
"""Records of the metrics of stages whose metrics are a report."""


@dataclass(frozen=True)
class EnvironmentRecord(Record):
    """Environment that computed an artifact: versions of packages, platform, device, threads, and processes if several
    shared the work."""

    versions: dict[str, str] = field(default_factory=dict)
    platform: str = ""
    device: str = ""
    threads: Count | None = None
    processes: Count | None = None


@dataclass(frozen=True)
class Records:
    """All records of a manifest; `model` and `pipeline` are None where the manifest has none."""

    model: ModelRecord | None
    pipeline: PipelineRecord | None
    layers: list[LayerRecord]
    inputs: list[InputRecord]
    metrics: MetricsRecord
    environment: EnvironmentRecord
    parameters: ParametersRecord
    file: FileRecord | None = None
    files: dict[str, FileRecord] | None = None
