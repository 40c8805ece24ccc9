"""`dqtool dilate`: Weight Dilation (or another scaling) of a full-precision model. Needs weights only."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from dqtool import report
from dqtool.artifacts import Artifact, DeferredTensors, Written, check_writable, open_artifact, sha256_file
from dqtool.core.bits import parse_bits
from dqtool.errors import ArtifactError, DqtoolError, UsageError
from dqtool.models.sources import ModelSource, resolve_model
from dqtool.models.told import Told
from dqtool.scaling.by_activations import CHOSEN_IN_CALIBRATE, LATER
from dqtool.stages.running import Common, Product, execute

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dqtool.graph.network import NetworkGraph
    from dqtool.models.families import Family
    from dqtool.scaling.methods import ScalingMethod, ScalingResult

__all__ = ["DilateOptions", "dilate"]

CODE_VERSION = 1

SCALING_VERSIONS = {"auto": 2}
"""Of methods whose results have changed: what an older one made is made again, and nothing else."""


@dataclass(frozen=True)
class DilateOptions:
    """Options of `dqtool dilate`."""

    model: str
    output: str = "dilated.safetensors"
    config: str | None = None
    scaling: str = "auto"
    stats: str | None = None
    cap: float = 64.0
    threshold: float = 1.0
    fold: bool = False
    bits: str = "4/4"
    family: str | None = None
    example: str | None = None
    components: str | None = None
    lora: tuple[str, ...] = ()
    prediction_type: str | None = None
    scheduler: str | None = None
    tokenizer: str | None = None
    pipeline: str | None = None
    variant: str | None = None

    def told(self) -> Told:
        """What the user says of the model beyond its files."""
        return Told(self.prediction_type, self.scheduler, self.tokenizer, self.pipeline, self.variant)

    def source(self) -> ModelSource:
        """The model that is meant. Raises what `resolve_model` raises."""
        return resolve_model(self.model, self.config, self.components, self.lora, self.told())


def dilate(options: DilateOptions, common: Common) -> str:
    """Scale the model's in-channels and write the dilated artifact; returns its path as given.

    Raises:
        UsageError: an unknown scaling, one that needs `stats`, or `fold` before there are factors.
        NumericError: the dilated network's output differs from the original's by more than round-off.
    """
    parse_bits(options.bits)
    source = options.source()
    source.check_schedule()
    if source.lacks is not None:
        report.warn(source.lacks)
    stats = None if options.stats is None else open_artifact(options.stats, ["calibrate"])
    if options.fold and waits(options):
        raise UsageError(
            f"With --scaling {options.scaling} and no --stats the factors are chosen in calibrate",
            where="--fold",
            fix="Give a calibrated artifact with --stats, or use --scaling wd",
        )
    reads = [*source.weights, *(lora.path for lora in source.loras)]
    check_writable(options.output, inputs=[options.model, *reads])
    inputs: list[dict[str, Any]] = [{"name": source.given, "sha256": source.sha256(), "stage": None}]
    if stats is not None:
        inputs.append({"name": stats.given, "sha256": stats.sha256, "stage": stats.stage})
    parameters = resolved(options)
    execute(
        "dilate",
        CODE_VERSION,
        options.output,
        parameters,
        inputs,
        common,
        lambda _key: produce(source, stats, options),
        reads=reads,
    )
    return options.output


def resolved(options: DilateOptions) -> dict[str, Any]:
    """All parameters that decide the result; what they are applied to, model and statistics, are inputs."""
    parameters: dict[str, Any] = {"scaling": options.scaling, "cap": options.cap, "fold": options.fold}
    if options.scaling in SCALING_VERSIONS:
        parameters["scaling_version"] = SCALING_VERSIONS[options.scaling]
    if options.threshold != 1:
        parameters["threshold"] = options.threshold
    if options.stats is not None or waits(options):
        parameters["bits"] = options.bits
    if options.lora:
        parameters["lora"] = list(options.lora)
    if options.family is not None:
        parameters["family"] = options.family
    if options.example is not None:
        parameters["example"] = sha256_file(options.example)
    return parameters


def waits(options: DilateOptions) -> bool:
    """Whether the factors are left to be chosen in `calibrate`, which sees activations."""
    return options.stats is None and options.scaling in CHOSEN_IN_CALIBRATE


def produce(source: ModelSource, stats: Artifact | None, options: DilateOptions) -> Product:
    """Load and scale; the check of the equivalence runs while the file is written."""
    import torch

    from dqtool.core.threads import operation_threads
    from dqtool.graph.repeats import drop_repeats
    from dqtool.graph.trace import kept_float
    from dqtool.models.companions import attachments_of
    from dqtool.models.families import family_of
    from dqtool.models.loading import build_network, load_weights
    from dqtool.scaling.choosing import choose_scaling, statistics_for
    from dqtool.scaling.folding import Fold, add_shift_to_bias, find_folds, find_shifts, fold_scales, subtract_shift
    from dqtool.scaling.methods import scaling_method
    from dqtool.scaling.records import (
        layer_scales,
        method_used,
        report_scaling,
        scaling_metrics,
        scaling_record,
        with_folds,
    )
    from dqtool.scaling.verifying import check_equivalence

    class_name, config = described(source, options)
    family = family_of(class_name, str(source.config_path))
    state = drop_repeats(load_weights(source), family.repeats(config))
    network = build_network(class_name, config, state, source.given, share=True)
    graph = recorded_network(network, family, config)
    traced = graph.trace
    float_parts = kept_float(network, traced.layers)
    if float_parts:
        name, reason = next(iter(float_parts.items()))
        report.warn(f"{len(float_parts)} layers or products stay float, first {name}: {reason}")
    asked, later = scaling_method(options.scaling), waits(options)
    shifts: dict[str, Fold] = {}
    if asked.shifts and not later:
        shifts = find_shifts(graph.recording, traced.layers)
    chosen: dict[str, ScalingResult] = {}
    if not later:
        chosen = choose_scaling(
            network,
            family,
            traced.layers,
            statistics_for(asked, stats),
            asked,
            options.cap,
            options.bits,
            shifts,
            options.threshold,
        )
    scales = layer_scales(traced.layers, chosen)
    tensors = DeferredTensors(state)
    records = []
    for info in traced.layers:
        scale = scales.get(info.name)
        record = asdict(info)
        if scale is not None:
            name, result = f"{info.name}.weight", chosen[info.shares or info.name]
            # Made when it is written, so that the whole network need not fit twice.
            whole = partial(scaled_rows, method_used(asked, result), state[name], scale, info.groups)
            tensors.defer(name, state[name], whole, whole if info.groups == 1 else None)
            tensors[f"{info.name}.dilation"] = scale
            record["scaling"] = scaling_record(asked, result)
            if result.shift is not None:
                add_shift_to_bias(tensors, info, state[name], result.shift)
                record["scaling"]["shifted_in"] = shifts[info.shares or info.name].names
        records.append(record)
    for owner, result in chosen.items():
        if result.shift is not None:
            subtract_shift(tensors, shifts[owner], result.shift)
    if options.fold:
        folded = fold_scales(tensors, find_folds(graph.recording, traced.layers), crossing=True)
        scales = {name: scale for name, scale in scales.items() if name not in folded}
        records = with_folds(records, folded)
    model = {
        "class": class_name,
        "config": config,
        "family": family.name,
        "source": source.given,
        "source_config": options.config,
        "source_component": options.components,
        "source_loras": list(options.lora),
        "source_told": options.told().record(),
        "source_sha256": source.sha256(),
        "parameters": sum(t.numel() for t in state.values()),
    }
    metrics: dict[str, Any] = {
        **scaling_metrics(scales),
        "blocks": [{"name": block.name, "reads": sorted(block.reads)} for block in traced.blocks],
        "output_reads": sorted(traced.output_reads),
    }
    if float_parts:
        metrics["kept_float"] = float_parts
    if later:
        metrics[LATER] = {
            "scaling": options.scaling,
            "cap": options.cap,
            "threshold": options.threshold,
            "bits": options.bits,
        }
    threads = torch.get_num_threads()

    def proof(written: Written) -> dict[str, float]:
        def waited() -> dict[str, Tensor]:
            found = written()
            torch.set_num_threads(threads)  # nothing else is left to do
            return found

        with operation_threads(max(1, threads - 1), then=threads):
            error = check_equivalence(network, waited, scales, family, config, source.given)
        if later:
            report.say(
                f"weights left as they are: calibrate, which sees activations, chooses the factors ({options.scaling})"
            )
        else:
            report_scaling(records, metrics, error)
        return {"equivalence_error": error}

    pipeline, attachments = source.pipeline_record(), attachments_of(source)
    return Product(tensors, model, pipeline, records, metrics, attachments=attachments, proof=proof)


def scaled_rows(method: ScalingMethod, weight: Tensor, scale: Tensor, groups: int, rows: slice = slice(None)) -> Tensor:
    """Those rows of the scaled weight (all of them, where there are groups), made by one thread."""
    from dqtool.core.threads import operation_threads

    with operation_threads(1):
        return method.apply(weight[rows], scale, groups)


def recorded_network(network: nn.Module, family: Family, config: dict[str, Any]) -> NetworkGraph:
    """Return the network's graph, recorded.

    Raises:
        ArtifactError: a network without an adapter does not run on what is known of its inputs.
    """
    try:
        graph = family.graph(network, config)
        _ = graph.recording
        return graph
    except DqtoolError:
        raise
    except Exception as e:  # a config may be one that can be built and can't be run
        if family.name != "generic":
            raise ArtifactError(
                f"The network that the config describes does not run: {type(e).__name__}: {e}", where="model config"
            ) from e
        raise ArtifactError(
            f"{family.class_name} does not run on {', '.join(family.example(config))} alone: {e}",
            where="--family generic",
            fix="Give an --example FILE.safetensors with one tensor [1, ...] for each further argument",
        ) from e


def described(source: ModelSource, options: DilateOptions) -> tuple[str, dict[str, Any]]:
    """Class and config of the network as artifacts record them: what its pipeline or an example says is in the config.

    Raises:
        UsageError: a family that does not exist or does not serve this class, or an example without `generic`.
    """
    from dqtool.models.companions import companions_of_source
    from dqtool.models.families import FAMILIES, family_of
    from dqtool.models.families.generic import EXAMPLE, PREFIX, example_shapes

    class_name, config = source.class_name, dict(source.config)
    if options.family == "generic":
        class_name = PREFIX + class_name
        if options.example is not None:
            config[EXAMPLE] = example_shapes(options.example)
    elif options.example is not None:
        raise UsageError("An example is for `--family generic`; known families need none", where="--example")
    elif options.family is not None and options.family != getattr(FAMILIES.get(class_name), "name", None):
        names = [*sorted(family.name for family in FAMILIES.values()), "generic"]
        known = options.family in names
        raise UsageError(
            f"'{options.family}' {'does not serve networks of class ' + class_name if known else 'is no family'}",
            where="--family",
            fix=f"Leave it out: the class decides; or choose generic ({', '.join(names)} exist)",
        )
    family = family_of(class_name, str(source.config_path), config)
    companions = companions_of_source(source)
    return class_name, config if companions is None else config | family.hints(companions)
