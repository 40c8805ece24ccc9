"""Checks of packed tensors before a network uses them: finite numbers, ranges, types, and shapes of the config."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dqtool.core.rotation import fitting_sizes
from dqtool.errors import ArtifactError, NumericError
from dqtool.graph.attention import is_attention
from dqtool.nn.assignment import largest_rank

if TYPE_CHECKING:
    from dqtool.graph.trace import LayerInfo
    from dqtool.nn.assignment import LayerPlan

__all__ = ["FIX", "check_layers", "check_plans", "check_state", "step_count", "wrong_tensor"]

FIX = "Make the artifact again with the dqtool stage that wrote it"
_ZERO, _SCALE, _WIDEST = "zero_point", "_scale", 8


def step_count(state: Mapping[str, Tensor]) -> int:
    """Return the number of timesteps of an artifact's step tables.

    Raises:
        ArtifactError: the artifact has no table of distinct timesteps.
        NumericError: a timestep is NaN or infinite.
    """
    timesteps = state.get("timesteps")
    if timesteps is None or timesteps.dim() != 1 or not len(timesteps) or not timesteps.is_floating_point():
        raise ArtifactError("The artifact holds no table of timesteps", where="tensor timesteps", fix=FIX)
    if not bool(torch.isfinite(timesteps).all()):
        raise NumericError("A timestep is NaN or infinite", where="tensor timesteps", fix=FIX)
    if len(timesteps.unique()) != len(timesteps):
        raise ArtifactError("A timestep stands twice in the table", where="tensor timesteps", fix=FIX)
    return len(timesteps)


def check_layers(network: nn.Module, layers: Sequence[LayerInfo], blocks: Iterable[str] = ()) -> None:
    """Check the layers and blocks that a manifest lists against the network that its config describes.

    Raises:
        ArtifactError: the network lacks a layer or block, or has it in another shape; the message names it.
    """
    modules = dict(network.named_modules())
    by_name = {info.name: info for info in layers}
    for name in (*by_name, *blocks):
        if name not in modules:
            raise _unlike(f"The manifest lists '{name}', which the config's network does not have")
    for info in layers:
        module = modules[info.name]
        weight = getattr(module, "weight", None)
        shape = tuple(weight.shape) if isinstance(weight, Tensor) else None
        kind = {"conv2d": nn.Conv2d, "linear": nn.Linear}.get(info.kind)
        fits = (
            not isinstance(module, nn.Conv2d | nn.Linear)
            if kind is None
            else isinstance(module, kind) and shape == tuple(info.shape)
        )
        if not fits:
            raise _unlike(
                f"The manifest says that '{info.name}' is a {info.kind} of shape {list(info.shape)}, and it is a "
                f"{type(module).__name__}" + (f" of {list(shape)}" if shape else "")
            )
        own: dict[str, Any] = {}
        if kind is not None:
            own["groups"] = getattr(module, "groups", 1)
        elif is_attention(module):  # a module of another kind does not say
            own["heads"] = getattr(module, "heads", 0)
        own |= {} if kind is None else {"bias": getattr(module, "bias", None) is not None}
        for key, value in own.items():
            if getattr(info, key) != value:
                raise _unlike(f"The manifest says {key} {getattr(info, key)} of '{info.name}', and it has {value}")
        owner = None if info.shares is None else by_name[info.shares]
        if owner is not None and (
            owner.shares is not None or (owner.kind, owner.shape[1:]) != (info.kind, info.shape[1:])
        ):
            raise _unlike(
                f"The manifest says that '{info.name}' reads the input of '{owner.name}', which reads another"
            )
        if info.rotation and (kind is None or info.rotation not in fitting_sizes(info.shape[1], info.groups)):
            raise _unlike(
                f"The manifest rotates the input of '{info.name}' in groups of {info.rotation} channels, which does not fit"
            )


def check_plans(network: nn.Module, plans: Sequence[LayerPlan]) -> None:
    """Check the layers of plans, as `check_layers` does, and the ranks of their low-rank branches."""
    check_layers(network, [plan.info for plan in plans])
    for plan in plans:
        if plan.low_rank and not plan.low_rank < largest_rank(plan):
            raise _unlike(
                f"The manifest gives '{plan.info.name}' a low-rank branch of rank {plan.low_rank}, which this layer can't "
                "have"
            )


def _unlike(what: str) -> ArtifactError:
    return ArtifactError(what, where="manifest, key layers", fix=FIX)


def check_state(state: Mapping[str, Tensor], plans: Sequence[LayerPlan], expected: Mapping[str, Tensor]) -> None:
    """Check scales (finite, above 0), zero points (integers within their grid), recorded shapes, and types.

    `expected` are the tensors that the network loads.

    Raises:
        NumericError: a scale is NaN or infinite.
        ArtifactError: a tensor is invalid in another way; the message names it.
    """
    bits = {plan.info.name: plan.bits for plan in plans}
    shapes = {plan.info.name: tuple(plan.info.shape) for plan in plans}
    for name, tensor in state.items():
        layer, _, leaf = name.rpartition(".")
        like = expected.get(name)
        if like is not None and not like.is_floating_point() and like.dtype != tensor.dtype:
            raise wrong_tensor(name, f"should hold {_type(like)}, and holds {_type(tensor)}")
        if tensor.is_complex() or (like is not None and like.is_floating_point() != tensor.is_floating_point()):
            raise wrong_tensor(name, f"holds {_type(tensor)}")
        if not tensor.numel():
            raise wrong_tensor(name, "is empty")
        if leaf.endswith(_SCALE) and layer in bits:
            low, high = float(tensor.amin()), float(tensor.amax())
            if not (low > -torch.inf and high < torch.inf):  # a NaN fails both
                raise NumericError(f"Tensor {name} holds NaN or infinite scales", where=f"tensor {name}", fix=FIX)
            if low <= 0:
                raise wrong_tensor(name, f"holds a scale of {low:g}, and scales are above 0")
        elif leaf.endswith(_ZERO) and layer in bits:
            width = getattr(bits[layer], leaf.removesuffix(f"_{_ZERO}"), None)
            most = 2 ** min(width if isinstance(width, int) else _WIDEST, _WIDEST) - 1
            if int(tensor.max()) > most or int(tensor.min()) < 0:
                raise wrong_tensor(name, f"holds a zero point that is not within 0 to {most}")
        elif leaf == "weight_shape" and layer in shapes and tuple(tensor.flatten().tolist()) != shapes[layer]:
            raise wrong_tensor(name, f"says {tensor.flatten().tolist()}, and the manifest {list(shapes[layer])}")


def wrong_tensor(name: str, what: str) -> ArtifactError:
    """Return the error that says what is wrong with a tensor, such as `is empty`."""
    return ArtifactError(f"Tensor {name} {what}", where=f"tensor {name}", fix=FIX)


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
