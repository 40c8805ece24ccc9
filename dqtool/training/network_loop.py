"""Training of the whole network on the recorded trajectory, by the error of its prediction against the float network's.

Memory holds the activations of every layer for one batch, and the optimizer's moments of all trained parameters.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dqtool.artifacts.jsonvalues import Json
from dqtool.core.device import pick
from dqtool.distributed import by_rows
from dqtool.nn.surgery import steps_of
from dqtool.training.curve import curve, first_and_last
from dqtool.training.data import DistillationTask, Reporter
from dqtool.training.losses import Losses
from dqtool.training.optimizer import QuantAdam, cosine
from dqtool.training.recovery import Recovery, StoredStates
from dqtool.training.sharing import add_gradients, part_of

__all__ = ["accumulate_gradients", "mixed_steps", "one_step_at_a_time", "rows_by_step", "train_network"]

Choose = Callable[[int, torch.Generator], Tensor]
"""Function (iteration, generator) -> indices of the iteration's samples."""


def mixed_steps(task: DistillationTask, batch_size: int) -> Choose:
    """Return a `Choose` that draws samples of all steps."""
    return lambda _step, generator: torch.randint(len(task.trajectory), (batch_size,), generator=generator)


def one_step_at_a_time(task: DistillationTask, batch_size: int) -> Choose:
    """Return a `Choose` that draws samples of one step only and cycles through the steps in sampling order.

    Quantizers with parameters for each step are trained this way.
    """
    groups = rows_by_step(task)

    def choose(step: int, generator: torch.Generator) -> Tensor:
        pool = groups[step % len(groups)]
        return pool[torch.randint(len(pool), (batch_size,), generator=generator)]

    return choose


def rows_by_step(task: DistillationTask) -> list[Tensor]:
    """Return the sample indices of each row of the step tables; a single group if the quantizers are static."""
    rows = task.trajectory.rows
    if len(steps_of(task.student).timesteps) == 1:
        return [torch.arange(len(rows))]
    groups = [(rows == row).nonzero()[:, 0] for row in range(len(task.trajectory.timesteps))]
    return [group for group in groups if len(group)]


def train_network(
    task: DistillationTask,
    optimizer: QuantAdam,
    choose: Choose,
    iters: int,
    batch_size: int,
    progress: Reporter,
    key: str = "network",
) -> dict[str, Json]:
    """Train the parameters of `task.student` that require gradients, in place, with a cosine schedule.

    The state is saved in the store under `key` from time to time. A run that finds it there continues from it and ends
    with the same bits.

    Returns metrics: `network_loss` (mean of the first and of the last losses), `loss_curve` (relative to the mean
    square of the float network's predictions) and `network_seconds`.

    Raises:
        NumericError: training diverged and `task.strict` is set.
    """
    start = time.perf_counter()
    trajectory = task.trajectory
    with torch.no_grad():
        parts = torch.arange(len(trajectory)).split(batch_size)
        exact = partial(task.predict, task.teacher)
        targets = torch.cat([by_rows(exact, part, rows=len(part)) for part in parts])
    size = float(targets.square().mean()) or 1.0
    generator = torch.Generator().manual_seed(task.seed + 2)
    losses: list[float] = []
    kept = task.store.load(key)
    if kept is not None:
        generator.set_state(kept["generator"])
        losses = kept["losses"].tolist()
        optimizer.load(kept)
        progress.skip(len(losses))
    states = StoredStates(task.store, key, optimizer)
    if kept is None:
        states.begin()
    recovery = Recovery(optimizer, states, "the network", size, strict=task.strict, warnings=task.warnings)
    saved, reader = time.perf_counter(), Losses(losses, recovery)

    def error(part: Tensor) -> Tensor:
        return F.mse_loss(task.predict(task.student, part), pick(targets, part))

    for step in range(len(losses), iters):
        chosen = choose(step, generator)
        optimizer.zero_grad()
        loss = add_gradients(optimizer, accumulate_gradients(error, chosen, task.network_batch))
        optimizer.step(trajectory.step_mask(chosen), cosine(step, iters) * recovery.rate)
        if not (reader.add(loss) and (step + 1 < iters or reader.read())):
            break
        progress.advance(1, f"loss {sum(losses[-50:]) / max(1, len(losses[-50:])):.3g}")
        if time.perf_counter() - saved >= task.checkpoint_seconds and reader.read() and optimizer.is_finite():
            state = {"generator": generator.get_state(), "losses": torch.tensor(losses, dtype=torch.float64)}
            task.store.save(key, {**optimizer.state(), **state})
            saved = time.perf_counter()
    losses = [loss for loss in losses if math.isfinite(loss)]
    optimizer.zero_grad()
    optimizer.release()
    task.student.requires_grad_(False)
    steps_of(task.student).select(torch.zeros(1, dtype=torch.long))
    return {
        "network_loss": first_and_last(losses, 100),
        "loss_curve": curve([loss / size for loss in losses]),
        "network_seconds": time.perf_counter() - start,
    }


def accumulate_gradients(loss: Callable[[Tensor], Tensor], rows: Tensor, together: int | None = None) -> Tensor:
    """Add the gradients of the mean `loss` over the samples `rows` `[N]` and return that mean, float64, on the loss's device. Where
    several processes share a command, each adds its part; the sum of the parts is that mean.

    The loss is called on `together` samples at a time (None: all), so that the memory is that of a part. The order of
    sums depends on `together`, so results agree up to rounding.
    """
    total = torch.zeros((), dtype=torch.float64)
    mine = part_of(rows)
    for part in mine.split(together or len(rows)) if len(mine) else ():
        share = loss(part) * (len(part) / len(rows))
        share.backward()
        total = share.detach().double() + total
    return total
