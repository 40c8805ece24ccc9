"""Layers that QuEST (arXiv 2402.03666) finds sensitive to few bits, selected by their role in the network."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from dqtool.graph.roles import Roles
from dqtool.nn.layers import FakeQuantLayer
from dqtool.training.data import DistillationTask

__all__ = ["learn_weights", "sensitive_layers"]

PROJECTIONS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
"""Names of the projections to q, k and v in diffusers' attention modules."""


def sensitive_layers(task: DistillationTask, roles: Roles) -> dict[str, FakeQuantLayer]:
    """Return the sensitive layers by name, in execution order.

    These are the layers on the timestep's path, the projections to q, k and v, and the linear layers next to attention
    in transformer blocks (the feed-forward part).
    """
    attention = [info.name for info in task.trace.layers if info.kind == "attention"]
    chosen = set(roles.temporal)
    for name in attention:
        chosen.update(f"{name}.{projection}" for projection in PROJECTIONS)
        home = name.rpartition(".")[0]
        block = task.student.get_submodule(home) if home else task.student
        if any(isinstance(child, nn.LayerNorm) or "Norm" in type(child).__name__ for child in block.children()):
            inside = {part for part in attention if part.startswith(f"{home}.")}
            for each, module in block.named_modules():
                full = f"{home}.{each}"
                if isinstance(module, FakeQuantLayer) and not any(full.startswith(f"{part}.") for part in inside):
                    chosen.add(full)
    found = {}
    for info in task.trace.layers:
        if info.kind != "attention" and info.name in chosen:
            module = task.student.get_submodule(info.name)
            if isinstance(module, FakeQuantLayer):
                found[info.name] = module
    return found


def learn_weights(layers: Iterable[FakeQuantLayer]) -> None:
    """Enable gradients of the weights and biases of these layers."""
    for layer in layers:
        layer.weight.requires_grad_(True)
        if isinstance(layer.bias, nn.Parameter):
            layer.bias.requires_grad_(True)
