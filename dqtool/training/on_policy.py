"""Training on the student's own trajectory, with the teacher's answer there as the target.

What no block can see is where the errors of one step lead at the next: the quantized model drifts off the trajectory it
was trained on. Here it samples, the teacher is asked at the points it visits, and all blocks learn that answer.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqtool.models.sampling import CALIBRATION, image_seeds, initial_noise
from dqtool.nn.layers import FakeQuantLayer
from dqtool.nn.surgery import steps_of
from dqtool.training.block_loop import trainable
from dqtool.training.curve import check_loss
from dqtool.training.data import Problem, Reporter, Trajectory
from dqtool.training.optimizer import QuantAdam, cosine
from dqtool.training.options import OnPolicyOptions
from dqtool.training.recompute import recomputed_blocks

__all__ = ["own_trajectories", "own_trajectory", "refine", "settle"]


def refine(problem: Problem, options: OnPolicyOptions, progress: Reporter) -> dict[str, Any]:
    """Train all blocks together on the student's own trajectory, with the teacher's answer there as the target. The state
    is kept in the store from time to time, and the trajectory when it is new; a later run goes on from them.

    Returns `losses`, of every iteration, `seconds`, and how many of them went to sampling, `sampling_seconds`.
    """
    settle(problem.student)
    trainable(problem.student)
    optimizer = QuantAdam(problem.student, options.rates)
    generator = torch.Generator().manual_seed(problem.seed + 1)
    steps = steps_of(problem.student)
    losses: list[float] = []
    start = saved = time.perf_counter()
    sampling_seconds = 0.0
    own: Trajectory | None = None
    targets = torch.empty(0)
    kept = problem.store.load("refine")
    if kept is not None:
        done = len(kept["losses"])
        points = problem.store.load(f"refine {(done - 1) // options.refresh * options.refresh}")
        if points is not None:
            generator.set_state(kept["generator"])
            losses = kept["losses"].tolist()
            optimizer.load(kept)
            progress.skip(done)
            own = replace(problem.trajectory, x=points["x"], rows=points["rows"], subjects=points.get("subjects"))
            targets = points["targets"]
    for step in range(len(losses), options.iters):
        if own is None or step % options.refresh == 0:
            begin = time.perf_counter()
            own, targets = own_trajectory(problem, options.images, step)
            points = {"x": own.x, "rows": own.rows, "targets": targets}
            subjects = {} if own.subjects is None else {"subjects": own.subjects}
            problem.store.save(f"refine {step}", points | subjects)
            sampling_seconds += time.perf_counter() - begin
        chosen = torch.randint(len(own), (options.batch_size,), generator=generator)
        optimizer.zero_grad()
        x, timestep, conditions = own.arguments(chosen)
        with recomputed_blocks(problem.student, problem.trace):
            loss = F.mse_loss(problem.family.predict(problem.student, x, timestep, conditions), targets[chosen])
            loss.backward()
        optimizer.step(own.present(chosen), cosine(step, options.iters))
        losses.append(loss.item())
        check_loss(losses[-1], "refine", step)
        progress.advance(1, f"all blocks, loss {sum(losses[-50:]) / len(losses[-50:]):.3g}")
        if time.perf_counter() - saved >= problem.checkpoint_seconds:
            state = {"generator": generator.get_state(), "losses": torch.tensor(losses, dtype=torch.float64)}
            problem.store.save("refine", {**optimizer.state(), **state})
            saved = time.perf_counter()
    optimizer.zero_grad()
    optimizer.release()
    problem.student.requires_grad_(False)
    steps.select(torch.zeros(1, dtype=torch.long))
    return {
        "losses": losses,
        "seconds": time.perf_counter() - start,
        "sampling_seconds": sampling_seconds,
    }


def settle(module: nn.Module) -> None:
    """Move every weight to the centre of its code. The function stays what it is, bit for bit.

    Training leaves many weights beside a rounding threshold, where they have been going back and forth. With all of
    them there, the first steps of another optimizer flip thousands of codes at once (one step of a thousandth of the
    scale tripled the loss); from the centres only weights that are pushed consistently get to change.
    """
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, FakeQuantLayer):
                layer.weight.copy_(layer.quantized_weight())


def own_trajectory(problem: Problem, images: int, salt: int) -> tuple[Trajectory, Tensor]:
    """Points that the student visits when it samples `images` new images (half as many with guidance, whose steps ask
    twice), and the teacher's predictions there. Conditions are drawn from those of the calibration set."""
    sampler, trajectory = problem.sampler, problem.trajectory
    seed = problem.seed * 7919 + salt + 1_000_000
    points: list[Tensor] = []
    answers: list[Tensor] = []
    rows: list[Tensor] = []
    asked: list[Tensor] = []
    null = trajectory.null if sampler.guidance > 1 else None
    if null is not None:
        images = -(-images // 2)
    with torch.no_grad():
        subjects = trajectory.draw_subjects(images, torch.Generator().manual_seed(seed), guided=null is not None)
        given = {k: v[subjects] for k, v in trajectory.conditions.items()}
        if null is not None:
            subjects = torch.cat([torch.full_like(subjects, trajectory.last_subject), subjects])
        everything = {k: v[subjects] for k, v in trajectory.conditions.items()}

        def see(x: Tensor, timestep: Tensor, _prediction: Tensor) -> None:
            points.append(x.clone())
            answers.append(problem.family.predict(problem.teacher, x, timestep, everything))
            rows.append(((trajectory.timesteps - timestep).abs().argmin()).expand(len(x)).clone())
            asked.append(subjects)

        noise = initial_noise(tuple(trajectory.x.shape[1:]), range(images), seed, CALIBRATION)
        seeds = image_seeds(range(images), seed, CALIBRATION)
        sampler.run(problem.student, noise, given, seeds, see, null)
    own = Trajectory(torch.cat(points), torch.cat(rows), trajectory.timesteps, trajectory.conditions, torch.cat(asked))
    return own, torch.cat(answers)


def own_trajectories(problem: Problem, images: int, together: int) -> Trajectory:
    """Points that the student visits when it samples `images` new images, so many of them `together`."""
    parts = [own_trajectory(problem, min(together, images - i), i)[0] for i in range(0, images, together)]
    subjects = torch.cat([part.subjects for part in parts if part.subjects is not None])
    return replace(
        problem.trajectory,
        x=torch.cat([part.x for part in parts]),
        rows=torch.cat([part.rows for part in parts]),
        subjects=subjects,
    )
