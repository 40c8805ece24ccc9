"""Tensors of artifacts before the export, checked before a stage uses them.

A manifest's digests show that a file is what its maker wrote, and say nothing of the maker. `checked_tensors` therefore
compares every factor, statistic, timestep and trajectory point with the layers and the config that the manifest lists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dqtool.artifacts import Artifact, Manifest, check_finite
from dqtool.errors import ArtifactError
from dqtool.graph.trace import LayerInfo
from dqtool.models.networks.loading import network_of
from dqtool.models.networks.packed import empty_network, layer_infos, plans_of
from dqtool.models.networks.packed_checks import FIX, step_count, wrong_tensor
from dqtool.nn.attention import OPERANDS
from dqtool.nn.statistics import BINS

__all__ = ["check_tensors", "checked_tensors"]


def checked_tensors(artifact: Artifact) -> dict[str, Tensor]:
    """Return the tensors of an artifact before the export, as `Artifact.tensors` does, after `check_tensors`."""
    tensors = artifact.tensors()
    check_tensors(artifact.manifest, tensors, artifact.given)
    return tensors


def check_tensors(manifest: Manifest, tensors: Mapping[str, Tensor], where: str) -> None:
    """Check the tensors of a dilated, calibrated or distilled artifact against its manifest.

    The names of float weights are checked where the float network is built.

    Raises:
        NumericError: a tensor holds a NaN or an infinity.
        ArtifactError: a tensor is missing, or has a shape, type or value that the manifest rules out; the message names it.
    """
    check_finite(tensors, where)
    if manifest.stage == "distill":
        empty_network(manifest.network.class_name, manifest.network.config, plans_of(manifest), tensors)
        return
    infos = layer_infos(manifest.layers)
    _check_dilation(infos, tensors)
    if manifest.stage == "calibrate":
        steps = step_count(tensors)
        counts = manifest.metrics.samples_per_step or []
        if len(counts) != steps:
            raise wrong_tensor("timesteps", f"has {steps} steps, and the manifest counts samples of {len(counts)}")
        for info in infos:
            _check_statistics(info, tensors, steps)
        _check_trajectory(manifest, tensors, steps)


def _check_dilation(infos: Sequence[LayerInfo], tensors: Mapping[str, Tensor]) -> None:
    """Check factors `[C_in]` above 0, and the weights that they multiply."""
    by_name = {info.name: info for info in infos if info.kind != "attention"}
    for info in by_name.values():
        weight = _present(tensors, f"{info.name}.weight")
        if tuple(weight.shape) != tuple(info.shape) or not weight.is_floating_point():
            raise wrong_tensor(
                f"{info.name}.weight", f"is not the float weight of shape {list(info.shape)} it should be"
            )
    for name, scale in tensors.items():
        layer, _, leaf = name.rpartition(".")
        if leaf != "dilation":
            continue
        if layer not in by_name:
            raise wrong_tensor(name, "belongs to no layer of the manifest")
        _check_shape(name, scale, (by_name[layer].shape[1] * by_name[layer].groups,))
        _check_float(name, scale)
        if float(scale.amin()) <= 0:
            raise wrong_tensor(name, f"holds a factor of {float(scale.amin()):g}, and factors are above 0")


def _check_statistics(info: LayerInfo, tensors: Mapping[str, Tensor], steps: int) -> None:
    """Check the histograms and ranges of a layer's or attention's quantizers, as `dqtool.nn.statistics` describes them."""
    if info.kind == "attention":
        for operand in OPERANDS:
            _check_histogram(f"{info.name}.{operand}", tensors, (steps, info.heads))
    elif info.shares is None:
        _check_histogram(info.name, tensors, (steps,))
        name = f"{info.name}.channel_range"
        _check_range(name, _present(tensors, name), (2, info.shape[1] * info.groups), 0)


def _check_histogram(quantizer: str, tensors: Mapping[str, Tensor], rows: tuple[int, ...]) -> None:
    name = f"{quantizer}.histogram"
    counts = _present(tensors, name)
    _check_shape(name, counts, (*rows, BINS))
    if counts.dtype != torch.int32 or int(counts.amin()) < 0:
        raise wrong_tensor(name, "does not hold counts of 0 or more as int32")
    _check_range(f"{quantizer}.range", _present(tensors, f"{quantizer}.range"), (*rows, 2), -1)


def _check_range(name: str, span: Tensor, shape: tuple[int, ...], dim: int) -> None:
    """Check ranges whose lowest values come before the highest ones along `dim`."""
    _check_shape(name, span, shape)
    _check_float(name, span)
    if bool((span.select(dim, 0) > span.select(dim, 1)).any()):
        raise wrong_tensor(name, "holds a range whose end is below its start")


def _check_trajectory(manifest: Manifest, tensors: Mapping[str, Tensor], steps: int) -> None:
    """Check points `[N, ...]` of the network's sample shape, with rows of the step table and of the condition tables."""
    family, config = network_of(manifest.network)
    points = _present(tensors, "trajectory.x")
    expected = tuple(family.sample_shape(config))
    if points.dim() != 1 + len(expected) or not len(points):
        raise wrong_tensor("trajectory.x", f"has the shape {list(points.shape)}; samples are {list(expected)}")
    _check_shape("trajectory.x", points, (len(points), *expected))
    _check_float("trajectory.x", points)
    _check_rows("trajectory.rows", _present(tensors, "trajectory.rows"), len(points), steps)
    tables = {name: table for name, table in tensors.items() if name.startswith("condition.")}
    if not tables:
        return
    first = next(iter(tables))
    known = family.conditions(config, 1, torch.Generator().manual_seed(0))
    for name, table in tables.items():
        like = known.get(name.removeprefix("condition."))
        if like is None:
            raise wrong_tensor(name, "is no condition of this network")
        wide = like.dim() > 1 and not name.endswith("mask")
        if table.dim() != like.dim() or (wide and table.shape[-1] != like.shape[-1]):
            raise wrong_tensor(name, f"has the shape {list(table.shape)}; rows are like {list(like.shape[1:])}")
        if not len(table) or len(table) != len(tables[first]):
            raise wrong_tensor(name, f"has {len(table)} rows, and {first} has {len(tables[first])}")
    subjects = _present(tensors, "trajectory.subjects")
    _check_rows("trajectory.subjects", subjects, len(points), len(tables[first]))


def _check_rows(name: str, rows: Tensor, count: int, most: int) -> None:
    _check_shape(name, rows, (count,))
    if rows.dtype != torch.int64 or int(rows.amin()) < 0 or int(rows.amax()) >= most:
        raise wrong_tensor(name, f"does not hold row numbers from 0 to {most - 1} as int64")


def _present(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise ArtifactError(f"Tensor {name} is missing", where=f"tensor {name}", fix=FIX)
    return tensors[name]


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape or not tensor.numel():
        raise wrong_tensor(name, f"has the shape {list(tensor.shape)}, and should have {list(shape)}")


def _check_float(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.float32:
        raise wrong_tensor(name, f"holds {str(tensor.dtype).removeprefix('torch.')}, and should hold float32")
