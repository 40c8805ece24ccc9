"""Replace a diffusers network's layers by quantized ones, and read their tensors back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dqtool.artifacts.checkpoints import Checkpoints
from dqtool.core.affine import search_weight
from dqtool.core.bits import AttentionBits
from dqtool.core.device import device_of, to_cpu
from dqtool.graph.attention import is_attention
from dqtool.nn.assignment import LayerPlan
from dqtool.nn.attention import OPERANDS, attach_operands, has_zero_point, operand_state, operands_shapes
from dqtool.nn.layers import FakeQuantLayer, QuantLayer
from dqtool.nn.packed_layer import PackedLayer, packed_shapes
from dqtool.nn.prediction import attach_prediction, prediction_shapes
from dqtool.nn.stand_ins import give_stand_ins
from dqtool.nn.steps import StepIndex, step_hook

__all__ = [
    "assign_tables",
    "initialise_weights",
    "insert_fake",
    "insert_packed",
    "missed_timesteps",
    "packed_state",
    "quant_layers",
    "refresh_steps",
    "state_shapes",
    "steps_of",
]


def insert_fake(
    model: nn.Module, plans: Sequence[LayerPlan], timesteps: Tensor, dilation: Mapping[str, Tensor]
) -> StepIndex:
    """Replace the planned layers by trainable ones, in place; weights must already be dilated.

    The quantizers' parameters are empty until they are initialised; an empty quantizer passes its operand in float. Layers
    that share an input (`LayerInfo.shares`) get one set of input tables from `assign_tables`.
    """
    steps = _attach_steps(model, timesteps)
    for plan in plans:
        module = model.get_submodule(plan.info.name)
        if isinstance(plan.bits, AttentionBits):
            attach_operands(module, plan.bits, steps)
            continue
        layer = FakeQuantLayer(module, plan.bits, steps)
        layer.rotation = plan.info.rotation
        if plan.info.name in dilation:
            layer.dilation = dilation[plan.info.name].detach().to(layer.weight.device, copy=True)
        _replace(model, plan.info.name, layer)
    return steps


def insert_packed(
    model: nn.Module,
    plans: Sequence[LayerPlan],
    timesteps: int,
    prediction: Mapping[str, Sequence[int]] | None = None,
) -> StepIndex:
    """Replace the planned layers by packed ones with empty buffers, in place, ready for `load_state_dict`.

    The table of timesteps is the root's buffer `timesteps`; call `refresh_steps` after loading. `prediction` gives the row
    shape of each table that corrects predictions, by name; None for a network without such tables.
    """
    device = next(model.parameters()).device
    steps = _attach_steps(model, torch.zeros(timesteps, device=device))
    for plan in plans:
        module = model.get_submodule(plan.info.name)
        shapes = _plan_shapes(plan, timesteps)
        if isinstance(plan.bits, AttentionBits):
            attach_operands(module, plan.bits, steps)
            for name, (shape, dtype) in shapes.items():
                module.register_buffer(name, torch.empty(shape, dtype=getattr(torch, dtype), device=device))
            continue
        layer = PackedLayer(module, plan.bits, steps, shapes)
        layer.rotation = plan.info.rotation
        _replace(model, plan.info.name, layer)
    if prediction is not None:
        attach_prediction(model, {k: torch.empty(timesteps, *row, device=device) for k, row in prediction.items()})
    give_stand_ins(model)
    return steps


def refresh_steps(model: nn.Module, static: bool = False) -> None:
    """Read the table of timesteps from the root's loaded buffer. With `static` its only row serves all timesteps."""
    steps = steps_of(model)
    steps.load(model.timesteps)  # type: ignore[arg-type]
    steps.static = static


def steps_of(model: nn.Module) -> StepIndex:
    """Return the step index that the quantized layers of `model` share."""
    steps = model.__dict__.get("_dqtool_steps")
    if not isinstance(steps, StepIndex):
        raise TypeError("not a model quantized by dqtool")
    return steps


def missed_timesteps(model: nn.Module) -> list[float] | None:
    """Return the timesteps that a network of any engine was called at without being calibrated for; None for a float network."""
    steps = model.__dict__.get("_dqtool_steps", model.__dict__.get("steps"))
    return sorted(steps.missed) if isinstance(steps, StepIndex) else None


def packed_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the packed state of a network of `FakeQuantLayer`s: all tensors of an artifact, by name."""
    state: dict[str, Tensor] = {"timesteps": model.timesteps}  # type: ignore[dict-item]
    replaced: set[str] = set()
    for name, module in model.named_modules():
        own: dict[str, Tensor] = {}
        if isinstance(module, FakeQuantLayer):
            own = module.packed_state()
            replaced.update(f"{name}.{key}" for key, _ in [*module.named_parameters(), *module.named_buffers()])
        elif is_attention(module):
            own = operand_state(module)
        state.update({f"{name}.{key}": value.contiguous() for key, value in own.items()})
    for name, value in model.state_dict().items():
        if name not in replaced and name not in state:
            state[name] = value.detach()
    return state


def state_shapes(
    float_shapes: Mapping[str, tuple[tuple[int, ...], str]],
    plans: Sequence[LayerPlan],
    timesteps: int,
    prediction: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shape and dtype of every tensor of the packed form, from those of the float network, for the cost model.

    `prediction` is the same as in `insert_packed`.
    """
    shapes = dict(float_shapes)
    shapes["timesteps"] = ((timesteps,), "float32")
    if prediction is not None:
        shapes |= prediction_shapes(timesteps, prediction)
    for plan in plans:
        if not isinstance(plan.bits, AttentionBits):
            for key in ("weight", "bias"):
                shapes.pop(f"{plan.info.name}.{key}", None)
        for key, value in _plan_shapes(plan, timesteps).items():
            shapes[f"{plan.info.name}.{key}"] = value
    return shapes


def quant_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """Return all quantized layers by name, in the order of registration."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLayer)}


def assign_tables(model: nn.Module, plans: Sequence[LayerPlan], tables: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Set the activation tables, keyed by layer name or `attention.operand`, as trainable parameters.

    Each value is (scale, zero point), `[T]` or `[T, H]`. Layers that share an input get the same parameters.
    """
    device = device_of(model)
    for plan in plans:
        module = model.get_submodule(plan.info.name)
        if isinstance(plan.bits, AttentionBits):
            for operand in OPERANDS:
                key = f"{plan.info.name}.{operand}"
                if key in tables:
                    scale, zero_point = tables[key]
                    setattr(module, f"{operand}_scale", nn.Parameter(scale.to(device, copy=True)))
                    if has_zero_point(operand, plan.bits.of(operand)):
                        setattr(module, f"{operand}_zero_point", nn.Parameter(zero_point.to(device, copy=True)))
        elif plan.bits.quantizes_input:
            if plan.info.shares is not None:
                owner = model.get_submodule(plan.info.shares)
                module.input_scale, module.input_zero_point = owner.input_scale, owner.input_zero_point
            else:
                scale, zero_point = tables[plan.info.name]
                module.input_scale = nn.Parameter(scale.to(device, copy=True))
                module.input_zero_point = nn.Parameter(zero_point.to(device, copy=True))


def initialise_weights(model: nn.Module, checkpoints: Checkpoints | None = None) -> None:
    """Set every layer's weight quantizer to the grid of least squared error.

    Large networks take minutes: `checkpoints` keeps the grids of layers, so that an interrupted run goes on from them.
    """
    known = {} if checkpoints is None else checkpoints.found
    layers = [x for x in quant_layers(model).values() if isinstance(x, FakeQuantLayer) and x.bits.quantizes_weight]
    for index, layer in enumerate(layers):
        grid = known.get(index)
        if grid is None:
            scale, zero_point = search_weight(layer.weight, layer.bits.weight, symmetric=layer.low == 1)
            grid = {"scale": scale, "zero_point": zero_point}
            if checkpoints is not None:
                checkpoints.add(index, to_cpu(grid))
        device = layer.weight.device
        layer.weight_scale = nn.Parameter(grid["scale"].to(device))
        layer.weight_zero_point = nn.Parameter(grid["zero_point"].to(device))


def _attach_steps(model: nn.Module, timesteps: Tensor) -> StepIndex:
    steps = StepIndex(timesteps if timesteps.device.type != "meta" else torch.zeros(len(timesteps)))
    model.register_buffer("timesteps", timesteps.detach().to(device_of(model), torch.float32, copy=True))
    model.__dict__["_dqtool_steps"] = steps  # plain attribute: shared with the layers, not a module's state
    model.register_forward_pre_hook(step_hook, with_kwargs=True)
    return steps


def _plan_shapes(plan: LayerPlan, timesteps: int) -> dict[str, tuple[tuple[int, ...], str]]:
    info = plan.info
    if isinstance(plan.bits, AttentionBits):
        return operands_shapes(plan.bits, timesteps, info.heads)
    return packed_shapes(
        info.shape,
        plan.bits,
        timesteps,
        info.shape[1] * info.groups if plan.dilated else 0,
        info.bias,
        plan.low_rank,
    )


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    holder = model.get_submodule(parent) if parent else model
    setattr(holder, leaf, layer)
