"""`dqtool dilate`: Weight Dilation of a full-precision model, from its weights alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dqtool import report
from dqtool.artifacts import Written, check_writable, sha256_file
from dqtool.artifacts.jsonvalues import ForeignConfig, Json
from dqtool.artifacts.records import InputRecord, ModelRecord
from dqtool.artifacts.schema import unchecked
from dqtool.errors import ArtifactError, DqtoolError, UsageError
from dqtool.models.sources.example_files import example_files
from dqtool.models.sources.resolve import ModelSource
from dqtool.stages.options.dilate import DilateOptions
from dqtool.stages.shared.paths import model_places, read_paths
from dqtool.stages.shared.running import RunSettings, StageOutput, run_unless_cached

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dqtool.graph.network import NetworkGraph
    from dqtool.models.families import Family

__all__ = ["DilateOptions", "dilate"]

CODE_VERSION = 1


def dilate(options: DilateOptions, settings: RunSettings) -> str:
    """Scale the model's in-channels and write the dilated artifact; returns its path as given.

    Raises:
        UsageError: contradicting options.
        NumericError: the dilated network's output differs from the original's by more than round-off.
    """
    source = options.source()
    source.check_schedule()
    if source.lacks is not None:
        report.warn(source.lacks)
    reads = [*read_paths(options), *model_places(source)]
    check_writable(options.output, inputs=[*reads, *settings.reads], overwrite=settings.overwrite)
    inputs = [InputRecord(source.given, source.sha256())]
    parameters = fingerprint_parameters(options)
    run_unless_cached(
        "dilate",
        CODE_VERSION,
        options.output,
        parameters,
        inputs,
        settings,
        lambda _key: produce(source, options),
        reads=reads,
    )
    return options.output


def fingerprint_parameters(options: DilateOptions) -> dict[str, Json]:
    """Return all parameters that decide the result; the model that they apply to is an input."""
    parameters: dict[str, Json] = {"scaling": options.scaling, "cap": options.cap, "fold": options.fold}
    if options.threshold != 1:
        parameters["threshold"] = options.threshold
    if options.lora:
        parameters["lora"] = list(options.lora)
    if options.family is not None:
        parameters["family"] = options.family
    if options.example is not None:
        parameters["example"] = [sha256_file(path) for path in example_files(options.example)]
    if options.family == "generic":  # the first version passed the scheduler's own timestep
        parameters["time_scale"] = options.time_scale
    return parameters


def produce(source: ModelSource, options: DilateOptions) -> StageOutput:
    """Load and dilate; the check of the equivalence runs while the file is written."""
    import torch

    from dqtool.core.threads import operation_threads
    from dqtool.graph.tied_modules import drop_copies
    from dqtool.graph.trace import kept_float
    from dqtool.models.components.companions import attachments_of
    from dqtool.models.families import family_of
    from dqtool.models.networks.loading import build_network, load_weights
    from dqtool.scaling.dilating import dilate_network
    from dqtool.scaling.folding import find_folds
    from dqtool.scaling.methods import scaling_method
    from dqtool.scaling.records import report_scaling
    from dqtool.scaling.verifying import check_equivalence

    class_name, config = describe_network(source, options)
    family = family_of(class_name, str(source.config_path))
    state = drop_copies(load_weights(source), family.tied_modules(config))
    network = build_network(class_name, config, state, source.given, share=True)
    graph = recorded_network(network, family, config)
    traced = graph.trace
    float_parts = kept_float(network, traced.layers, graph.recording.products)
    if float_parts:
        name, reason = next(iter(float_parts.items()))
        report.warn(f"{len(float_parts)} layers or products stay float, first {name}: {reason}")
    method = scaling_method(options.scaling)
    folds = find_folds(graph.recording, traced.layers) if options.fold else []
    dilated = dilate_network(network, state, traced.layers, method, options.cap, options.threshold, folds)
    model = unchecked(
        {
            "class": class_name,
            "config": config,
            "family": family.name,
            "source": source.given,
            "source_config": options.config,
            "source_component": options.components,
            "source_loras": list(options.lora),
            "source_told": options.hints().record(),
            "source_sha256": source.sha256(),
            "parameters": sum(t.numel() for t in state.values()),
        },
        ModelRecord,
    )
    metrics: dict[str, Json] = {
        **dilated.metrics,
        "blocks": [{"name": block.name, "reads": sorted(block.reads)} for block in traced.blocks],
        "output_reads": sorted(traced.output_reads),
    }
    if float_parts:
        metrics["kept_float"] = float_parts
    threads = torch.get_num_threads()

    def proof(written: Written) -> dict[str, float]:
        def waited() -> dict[str, Tensor]:
            found = written()
            torch.set_num_threads(threads)  # nothing else is left to do
            return found

        with operation_threads(max(1, threads - 1), then=threads):
            error = check_equivalence(network, waited, dilated.scales, family, config, source.given)
        report_scaling(dilated.records, dilated.metrics, error)
        return {"equivalence_error": error}

    pipeline, attachments = source.pipeline_record(), attachments_of(source)
    return StageOutput(dilated.tensors, model, pipeline, dilated.records, metrics, attachments=attachments, proof=proof)


def recorded_network(network: nn.Module, family: Family, config: ForeignConfig) -> NetworkGraph:
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
            fix="Give an --example FILE.safetensors with one tensor [1, ...] for each further argument, and what is no tensor "
            "in FILE.json beside it",
        ) from e


def describe_network(source: ModelSource, options: DilateOptions) -> tuple[str, ForeignConfig]:
    """Return class and config of the network as artifacts record them, with what its pipeline or an example adds.

    Raises:
        UsageError: a family that does not exist or does not serve this class, or an example without `generic`.
    """
    from dqtool.models.components.companions import companions_of_source
    from dqtool.models.families import FAMILIES, family_of
    from dqtool.models.families.generic import PREFIX, Generic
    from dqtool.models.sampling.network_time import TIME, network_time

    class_name, config = source.class_name, dict(source.config)
    if options.family == "generic":
        class_name = PREFIX + class_name
        if options.example is not None:
            config |= Generic(source.class_name).record_example(options.example)
        config[TIME] = network_time(source.class_name, config, source.scheduler, options.time_scale).record()
    elif options.time_scale is not None:
        raise UsageError("Known families know what time they pass", where="--time-scale", fix="Leave it out")
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
    return class_name, config if companions is None else {**config, **family.input_properties(companions)}
