"""Training the whole network at once on the recorded trajectory: the error of its prediction against the float network's.

Memory is that of every layer's activations for one batch, and of the optimizer's moments for all that learns.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dqtool.nn.surgery import steps_of
from dqtool.training.accumulation import backward
from dqtool.training.curve import curve, ends
from dqtool.training.data import Problem, Reporter
from dqtool.training.optimizer import QuantAdam, cosine
from dqtool.training.recovery import Recovery, StoredStates

__all__ = ["mixed_steps", "one_step_at_a_time", "rows_by_step", "train_network"]

Choose = Callable[[int, torch.Generator], Tensor]
"""Of the iteration and a generator: the indices of its samples."""


def mixed_steps(problem: Problem, batch_size: int) -> Choose:
    """Samples of all steps."""
    return lambda _step, generator: torch.randint(len(problem.trajectory), (batch_size,), generator=generator)


def one_step_at_a_time(problem: Problem, batch_size: int) -> Choose:
    """Samples of one step, the steps in the order of sampling, again and again: how quantizers that know one step train."""
    groups = rows_by_step(problem)

    def choose(step: int, generator: torch.Generator) -> Tensor:
        pool = groups[step % len(groups)]
        return pool[torch.randint(len(pool), (batch_size,), generator=generator)]

    return choose


def rows_by_step(problem: Problem) -> list[Tensor]:
    """Indices of the samples that each row of the step tables is for: one group where the quantizers are static."""
    rows = problem.trajectory.rows
    if len(steps_of(problem.student).timesteps) == 1:
        return [torch.arange(len(rows))]
    groups = [(rows == row).nonzero()[:, 0] for row in range(len(problem.trajectory.timesteps))]
    return [group for group in groups if len(group)]


def train_network(
    problem: Problem,
    optimizer: QuantAdam,
    choose: Choose,
    iters: int,
    batch_size: int,
    progress: Reporter,
    key: str = "network",
) -> dict[str, Any]:
    """Train what requires gradients in `problem.student`, in place, at rates that fall as a cosine. The state is kept in
    the store under `key` from time to time; a run that finds it there goes on from it, to the same bits.

    Returns metrics: `network_loss` (before and after), `loss_curve` (in units of the mean square of the float network's
    predictions), `network_seconds`.
    """
    start = time.perf_counter()
    trajectory = problem.trajectory
    with torch.no_grad():
        rows = [slice(i, i + batch_size) for i in range(0, len(trajectory), batch_size)]
        targets = torch.cat([problem.predict(problem.teacher, part) for part in rows])
    size = float(targets.square().mean()) or 1.0
    generator = torch.Generator().manual_seed(problem.seed + 2)
    losses: list[float] = []
    kept = problem.store.load(key)
    if kept is not None:
        generator.set_state(kept["generator"])
        losses = kept["losses"].tolist()
        optimizer.load(kept)
        progress.skip(len(losses))
    states = StoredStates(problem.store, key, optimizer)
    if kept is None:
        states.begin()
    recovery = Recovery(optimizer, states, "the network", size, strict=problem.strict, warnings=problem.warnings)
    saved = time.perf_counter()

    def error(part: Tensor) -> Tensor:
        return F.mse_loss(problem.predict(problem.student, part), targets[part])

    for step in range(len(losses), iters):
        chosen = choose(step, generator)
        optimizer.zero_grad()
        losses.append(backward(error, chosen, problem.network_batch))
        optimizer.step(trajectory.present(chosen), cosine(step, iters) * recovery.rate)
        if not recovery.goes_on(losses[-1], step):
            break
        progress.advance(1, f"loss {sum(losses[-50:]) / len(losses[-50:]):.3g}")
        if time.perf_counter() - saved >= problem.checkpoint_seconds and optimizer.is_finite():
            state = {"generator": generator.get_state(), "losses": torch.tensor(losses, dtype=torch.float64)}
            problem.store.save(key, {**optimizer.state(), **state})
            saved = time.perf_counter()
    losses = [loss for loss in losses if math.isfinite(loss)]
    optimizer.zero_grad()
    optimizer.release()
    problem.student.requires_grad_(False)
    steps_of(problem.student).select(torch.zeros(1, dtype=torch.long))
    return {
        "network_loss": ends(losses, 100),
        "loss_curve": curve([loss / size for loss in losses]),
        "network_seconds": time.perf_counter() - start,
    }
