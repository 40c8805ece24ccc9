"""Layers, plans and quantized networks, read from manifests; runtimes, diffusers' loader and stages start from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from dqtool.artifacts import Artifact, Manifest
from dqtool.artifacts.jsonvalues import ForeignConfig, Json
from dqtool.artifacts.records import LayerRecord
from dqtool.artifacts.schema import record, unchecked
from dqtool.core.bits import bits_from_json
from dqtool.errors import ArtifactError
from dqtool.graph.tied_modules import tie_modules
from dqtool.graph.trace import LayerInfo
from dqtool.models.components.export_layout import weights_files
from dqtool.models.config_schema import bounded_parameters
from dqtool.models.families import family_of
from dqtool.models.networks.loading import materialise
from dqtool.models.networks.packed_checks import check_plans, check_state, step_count
from dqtool.nn.assignment import LayerPlan
from dqtool.nn.prediction import NAME as PREDICTION
from dqtool.nn.surgery import insert_packed, refresh_steps

__all__ = [
    "checked_plans",
    "empty_network",
    "exported_tensors",
    "is_static",
    "layer_infos",
    "layer_record",
    "packed_network",
    "plan_records",
    "planned_record",
    "plans_from",
    "plans_of",
    "prediction_rows",
]

INFO_FIELDS = tuple(LayerInfo.__dataclass_fields__)


def layer_infos(records: Sequence[LayerRecord]) -> list[LayerInfo]:
    """Return the layers of a manifest or of a quantization config, in execution order."""
    return [LayerInfo(**{key: getattr(record, key) for key in INFO_FIELDS}) for record in records]


def layer_record(info: LayerInfo) -> LayerRecord:
    """Return the record of a layer whose bits are not chosen yet."""
    fields = {key: value for key, value in asdict(info).items() if key != "rotation" or value}
    return unchecked(fields, LayerRecord)


def planned_record(plan: LayerPlan) -> LayerRecord:
    """Return the record of a layer with its bits."""
    return replace(layer_record(plan.info), bits=plan.bits.widths, dilated=plan.dilated, low_rank=plan.low_rank)


def plans_from(records: Sequence[LayerRecord]) -> list[LayerPlan]:
    """Return the layers with their bits, from a manifest's or a quantization config's records.

    Raises:
        ArtifactError: a layer has no bits yet.
    """
    plans = []
    for info, own in zip(layer_infos(records), records, strict=True):
        if own.bits is None:
            raise ArtifactError("This layer has no bits yet", where=f"layer {own.name}", fix="Run `dqtool distill`")
        plans.append(LayerPlan(info, bits_from_json(info.kind, own.bits), bool(own.dilated), own.low_rank))
    return plans


def checked_plans(records: Any, network: nn.Module) -> list[LayerPlan]:
    """Return the layers that a `quantization_config` lists, found to be those of the network.

    Raises:
        ArtifactError: a record has a wrong type or size, or its layer is not the network's.
    """
    layers = []
    try:
        for number, each in enumerate(records):
            layers.append(record(each, LayerRecord, f"quantization_config.layers[{number}]"))
            if layers[-1].bits is None or layers[-1].dilated is None:
                raise ValueError(
                    f"quantization_config.layers[{number}] has no bits or does not say whether it is dilated"
                )
    except ValueError as error:
        raise ArtifactError(
            f"This export describes its layers wrongly: {error}", where="config.json", fix="Export the network again"
        ) from error
    plans = plans_from(layers)
    check_plans(network, plans)
    return plans


def plans_of(manifest: Manifest) -> list[LayerPlan]:
    """Return the layers of a distilled or exported artifact with their bits."""
    return plans_from(manifest.layers)


def plan_records(records: Sequence[LayerRecord]) -> list[dict[str, Json]]:
    """Return the part of each layer's record that a loader needs, without fields at their default."""
    return [replace(record, runs=None, scaling=None, as_read={}).to_json() for record in records]


def exported_tensors(artifact: Artifact) -> dict[str, Tensor]:
    """Return the network's tensors of an export, views of its mapped file or shards."""
    manifest = artifact.manifest
    found: dict[str, Tensor] = {}
    for name in weights_files(manifest.pipeline, manifest.files or ()):
        found |= artifact.tensors(file=name)
    return found


def is_static(manifest: Manifest, timesteps: int) -> bool:
    """Return whether the step tables have one row that serves all steps, though several were calibrated."""
    return timesteps == 1 and manifest.sampling is not None and manifest.sampling.steps > 1


def prediction_rows(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]] | None:
    """Return the row shape of each prediction-correction table in a packed state, by name; None where it has none."""
    prefix = f"{PREDICTION}."
    return {n.removeprefix(prefix): tuple(t.shape[1:]) for n, t in state.items() if n.startswith(prefix)} or None


def packed_network(
    class_name: str,
    config: ForeignConfig,
    plans: Sequence[LayerPlan],
    state: Mapping[str, Tensor],
    static: bool = False,
) -> nn.Module:
    """Build the network of an artifact's packed tensors, ready to run with float fake-quantization.

    With `static` one row of the step tables serves all timesteps (`is_static`).

    Raises:
        ArtifactError: tensors are missing, unknown, of another shape, or hold invalid values.
        NumericError: a scale or timestep is NaN or infinite.
    """
    family = family_of(class_name, "manifest, key model.class", config)
    network = empty_network(class_name, config, plans, state)
    if not _assigned(network, state):
        try:
            network.load_state_dict(dict(state), assign=True)
        except RuntimeError as e:
            raise ArtifactError(f"The packed tensors don't fit the manifest: {e}", fix="Make the artifact again") from e
    materialise(network, family, config)
    refresh_steps(network, static)
    return network.eval().requires_grad_(False)


def empty_network(
    class_name: str, config: ForeignConfig, plans: Sequence[LayerPlan], state: Mapping[str, Tensor]
) -> nn.Module:
    """Return the network that `packed_network` fills, on `meta`, after checking that the tensors of `state` fit it.

    Raises the errors of `packed_network`.
    """
    family = family_of(class_name, "manifest, key model.class", config)
    with torch.device("meta"), bounded_parameters(4 * len(state) + 500):
        network = tie_modules(family.build(config), state, family.tied_modules(config))
    check_plans(network, plans)
    insert_packed(network, plans, step_count(state), prediction_rows(state))
    check_state(state, plans, network.state_dict())
    if problem := _misfits(network, state):
        raise ArtifactError(f"The packed tensors don't fit the manifest: {problem}", fix="Make the artifact again")
    return network


def _misfits(network: nn.Module, state: Mapping[str, Tensor]) -> str:
    """Return how many tensors are missing, unknown or of another shape, and the first of each."""
    own = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    kinds = {
        "missing": sorted(own.keys() - state.keys()),
        "unknown": sorted(state.keys() - own.keys()),
        "of another shape": sorted(n for n in own.keys() & state.keys() if own[n] != tuple(state[n].shape)),
    }
    return "; ".join(f"{len(names)} are {kind}, first {', '.join(names[:2])}" for kind, names in kinds.items() if names)


def _assigned(network: nn.Module, state: Mapping[str, Tensor]) -> bool:
    """Assign the tensors to an empty network, several times faster than `load_state_dict`; return whether that was possible.

    Changes nothing and returns False where names or shapes differ or a module has loading hooks; the caller then uses
    `load_state_dict`.
    """
    places: dict[str, tuple[dict[str, Any], str, Tensor, bool]] = {}
    for prefix, module in network.named_modules(remove_duplicate=False):
        if module._load_state_dict_pre_hooks or module._load_state_dict_post_hooks:
            return False
        dot = f"{prefix}." if prefix else ""
        for name, own in module._parameters.items():
            if own is not None:
                places[dot + name] = module._parameters, name, own, True
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                places[dot + name] = module._buffers, name, buffer, False
    if places.keys() != state.keys():
        return False
    for key, (_, _, own, _) in places.items():
        if own.shape != state[key].shape or own.is_floating_point() != state[key].is_floating_point():
            return False
    for key, (where, name, _, trainable) in places.items():
        where[name] = nn.Parameter(state[key], requires_grad=False) if trainable else state[key]
    return True
