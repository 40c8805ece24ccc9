"""Training of the layers that turn the timestep into features (TFMQ's temporal information block, arXiv 2311.16503).

These layers are trained separately, since they see a finite set of inputs that does not depend on the sample.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dqtool.graph.leaves import is_quantizable
from dqtool.graph.roles import Roles
from dqtool.nn.layers import FakeQuantLayer
from dqtool.training.block_loop import Learner, block_state, device_mean_square, restore_block
from dqtool.training.data import DistillationTask, Reporter
from dqtool.training.losses import Losses
from dqtool.training.recovery import BlockStates, Recovery

__all__ = ["TemporalPath", "temporal_layers", "train_temporal"]


class TemporalPath:
    """Computation of the timestep's path of one network, and of nothing else.

    Every module whose layers are all outside the path returns zeros of the shape that it returned for a first sample.
    """

    def __init__(self, task: DistillationTask, model: nn.Module, roles: Roles) -> None:
        self.task, self.model, self.roles = task, model, roles
        self._answers = self._record()

    def outputs(self, rows: Tensor) -> dict[str, Tensor]:
        """Return the outputs of the path's last layers at the samples `rows`, by layer name."""
        found: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            def hook(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
                found[name] = output

            return hook

        handles = [self.model.get_submodule(n).register_forward_hook(keep(n)) for n in self.roles.temporal_ends]
        try:
            for module, answer in self._answers:
                module.forward = lambda *_a, _y=answer, **_k: tree_map(lambda t: _stretch(t, len(rows)), _y)
            self.task.predict(self.model, rows)
        finally:
            for module, _ in self._answers:
                module.__dict__.pop("forward", None)
            for handle in handles:
                handle.remove()
        return found

    def _record(self) -> list[tuple[nn.Module, Any]]:
        """Return the outermost modules to skip, each with the output that replaces its computation."""
        temporal = set(self.roles.temporal)
        candidates = {}
        for name, module in self.model.named_modules():
            inside = {f"{name}.{n}".strip(".") for n, m in module.named_modules() if _is_layer(m)}
            if name and inside and not inside & temporal:
                candidates[name] = module
        seen: dict[str, Any] = {}
        handles = [
            module.register_forward_hook(lambda _m, _a, y, name=name: seen.__setitem__(name, y))
            for name, module in candidates.items()
        ]
        try:
            with torch.no_grad():
                self.task.predict(self.model, torch.zeros(1, dtype=torch.long))
        finally:
            for handle in handles:
                handle.remove()
        outermost = [n for n in seen if not any(n.startswith(f"{other}.") for other in seen)]
        shapes = [
            tree_map(lambda t: t.new_zeros(()).expand(t.shape) if isinstance(t, Tensor) else t, seen[n])
            for n in outermost
        ]
        return [(candidates[name], shape) for name, shape in zip(outermost, shapes, strict=True)]


def temporal_layers(task: DistillationTask, roles: Roles) -> list[FakeQuantLayer]:
    """Return the student's quantized layers on the timestep's path."""
    modules = [task.student.get_submodule(name) for name in roles.temporal]
    return [module for module in modules if isinstance(module, FakeQuantLayer)]


def train_temporal(
    task: DistillationTask, roles: Roles, learner: Learner, progress: Reporter, key: str = "temporal"
) -> list[float]:
    """Train the layers of the path jointly to reproduce the float network's outputs of the path.

    Returns the losses relative to the mean square of these outputs. The store keeps the result under `key`.

    Raises:
        NumericError: training diverged and `task.strict` is set.
    """
    layers = nn.ModuleList(temporal_layers(task, roles))
    kept = task.store.load(key)
    if kept is not None:
        learner.finish()
        task.student.requires_grad_(False)
        restore_block(layers, {k: v for k, v in kept.items() if k != "history"})
        history: list[float] = kept["history"].tolist()
        progress.skip(len(history), key)
        return history
    teacher, student = (TemporalPath(task, net, roles) for net in (task.teacher, task.student))
    generator = torch.Generator().manual_seed(task.seed + 3)
    history = []
    recovery = Recovery(
        learner.optimizer,
        BlockStates(learner.optimizer),
        "the time embedding",
        1.0,  # losses are relative to the target's mean square
        strict=task.strict,
        warnings=task.warnings,
    )
    losses = Losses(history, recovery)
    for step in range(learner.iters):
        chosen = learner.draw_samples(step, generator)
        with torch.no_grad():
            wanted = teacher.outputs(chosen)
        got = student.outputs(chosen)
        errors = torch.stack([F.mse_loss(got[name], wanted[name]) for name in wanted])
        size = device_mean_square(list(wanted.values()))
        learner.observe_targets(list(wanted.values()), size)
        learner.optimizer.zero_grad()
        learner.objective(errors.mean(), step).backward()
        learner.optimizer.step(task.trajectory.step_mask(chosen), learner.rate_factor(step) * recovery.rate)
        if not (losses.add(errors.mean().double() / size) and (step + 1 < learner.iters or losses.read())):
            break
        progress.advance(1, key)
    learner.finish()
    task.student.requires_grad_(False)
    task.store.save(key, {**block_state(layers), "history": torch.tensor(history, dtype=torch.float64)})
    return history


def _is_layer(module: nn.Module) -> bool:
    """Return whether a module is a layer that is quantized or can be."""
    return isinstance(module, FakeQuantLayer) or is_quantizable(module)


def _stretch(answer: Any, count: int) -> Any:
    """Expand a one-sample answer to `count` samples."""
    return answer.expand(count, *answer.shape[1:]) if isinstance(answer, Tensor) else answer
