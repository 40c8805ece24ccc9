"""Networks from dilated and calibrated artifacts: the float teacher, the trace, the trainable student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from dqtool.artifacts import Artifact, Checkpoints, Manifest, Workspace
from dqtool.artifacts.records import PipelineRecord, SamplingRecord
from dqtool.core.device import place
from dqtool.graph.trace import BlockInfo, Trace
from dqtool.models.components.companions import companions_of_artifact
from dqtool.models.conditions.conditioning import Conditions, Request
from dqtool.models.conditions.external import ConditionSource
from dqtool.models.networks.loading import build_network, network_of
from dqtool.models.networks.packed import layer_infos
from dqtool.models.networks.packed_checks import check_layers
from dqtool.models.sampling.sampler import Sampler
from dqtool.nn.assignment import LayerPlan, digest_of
from dqtool.nn.low_rank import attach_low_rank
from dqtool.nn.statistics import initial_tables
from dqtool.nn.surgery import assign_tables, initialise_weights, insert_fake
from dqtool.scaling.rescaling import undilated_weights
from dqtool.stages.shared.folder_images import encoded_images

__all__ = [
    "conditions_of",
    "sampler_of",
    "split_dilated",
    "student_of",
    "student_without_grids",
    "teacher_of",
    "trace_of",
]

STATISTICS = (".histogram", ".range", ".channel_range")


def trace_of(manifest: Manifest) -> Trace:
    """Layers and blocks as `dilate` observed them."""
    blocks = [BlockInfo(block.name, set(block.reads)) for block in manifest.metrics.blocks or ()]
    return Trace(layer_infos(manifest.layers), blocks, set(manifest.metrics.output_reads or ()))


def split_dilated(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split the tensors of a dilated or calibrated artifact into the state dict, with dilated weights, and the
    factors by layer."""
    dilation = {k.removesuffix(".dilation"): v for k, v in tensors.items() if k.endswith(".dilation")}
    state = {
        k: v
        for k, v in tensors.items()
        if not k.endswith((*STATISTICS, ".dilation")) and not k.startswith(("trajectory.", "condition."))
    }
    state.pop("timesteps", None)
    return state, dilation


def teacher_of(manifest: Manifest, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Build the full-precision network: dilated weights are divided by their factors (the original ones to one ulp)."""
    state, _ = split_dilated(tensors)
    state |= undilated_weights(manifest, tensors)
    # Shared, not copied: nobody writes into the teacher, and a large network should be in memory once.
    network = build_network(manifest.network.class_name, manifest.network.config, state, "teacher", share=True)
    check_layers(network, layer_infos(manifest.layers), [block.name for block in manifest.metrics.blocks or ()])
    return place(network)


def student_of(
    manifest: Manifest,
    tensors: Mapping[str, Tensor],
    plans: Sequence[LayerPlan],
    static: bool = False,
    workspace: Workspace | None = None,
    name: str = "the student",
) -> nn.Module:
    """Build the trainable quantized network of a calibrated artifact, its quantizers initialised (plain PTQ).

    `static` gives all steps one activation quantizer. `workspace` keeps the weights' grids and branches for an interrupted
    run, under the network's `name`.
    """
    network = student_without_grids(manifest, tensors, plans, static)
    name = f"{name} {digest_of(plans)}"
    attach_low_rank(network, plans, None if workspace is None else Checkpoints(workspace, f"branches of {name}"))
    initialise_weights(network, None if workspace is None else Checkpoints(workspace, f"grids of {name}"))
    return network


def student_without_grids(
    manifest: Manifest, tensors: Mapping[str, Tensor], plans: Sequence[LayerPlan], static: bool = False
) -> nn.Module:
    """Build the network of `student_of` without what takes long: branches, and grids of the weights."""
    state, dilation = split_dilated(tensors)
    # The layers that are quantized below copy their weights; what stays as it is may be views of the artifact's file.
    copied = {f"{info.name}.{leaf}" for info in layer_infos(manifest.layers) for leaf in ("weight", "bias")}
    state = {name: value if name in copied else value.clone() for name, value in state.items()}
    network = build_network(manifest.network.class_name, manifest.network.config, state, "student", share=True)
    check_layers(network, layer_infos(manifest.layers))
    place(network)
    timesteps = tensors["timesteps"][:1] if static else tensors["timesteps"]
    insert_fake(network, plans, timesteps, dilation).static = static
    assign_tables(network, plans, initial_tables(plans, tensors, static))
    return network


def conditions_of(artifact: Artifact, request: Request, source: ConditionSource | None = None) -> Conditions:
    """Return the conditions of images of an artifact's model, by the components that it carries, or from `source`.

    Raises:
        UsageError: guidance or prompts for a model that knows none, or nothing makes the network's conditions.
    """
    family, config = network_of(artifact.manifest.network)
    companions = companions_of_artifact(artifact)
    card = {} if companions is None else companions.card
    source = source or ConditionSource()
    request = replace(request, card=card)
    if source.images is not None and (channels := family.condition_channels(config)):
        total, *size = family.sample_shape(config)
        request = replace(request, images=encoded_images(source.images, (total - channels, *size), companions))
    return source.conditions(family, config, request, companions)


def sampler_of(
    artifact: Artifact, conditions: Conditions, steps: int | None = None, name: str | None = None
) -> Sampler:
    """Return the sampler that an artifact was calibrated for; before `calibrate`, its pipeline's own with 20 steps.

    `steps` and `name` replace the recorded ones.

    Raises:
        UsageError: an unknown sampler, or one that does not fit the model's noise schedule.
    """
    family, config = network_of(artifact.manifest.network)
    pipeline = artifact.manifest.pipeline or PipelineRecord()
    sampling = pipeline.sampling or SamplingRecord(pipeline.scheduler or family.scheduler or {}, steps=20, eta=0.0)
    return Sampler.calibrated(family, config, sampling, conditions.guidance, steps, name)
