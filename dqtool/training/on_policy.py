"""Training on the student's own trajectory, with the teacher's prediction as the target.

Block-wise training can't see how the error of one step affects the next: the quantized model drifts off the trajectory
that it was trained on. Here the student samples, the teacher predicts at the points that the student visits, and all
blocks learn this prediction together.
"""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqtool.artifacts.checkpoints import CallCheckpoints
from dqtool.core.allocator import return_freed_memory
from dqtool.core.device import pick, to_device
from dqtool.models.sampling.sampler import CALIBRATION, image_seeds, initial_noise
from dqtool.models.sampling.teacher_precision import precision_label
from dqtool.nn.layers import FakeQuantLayer
from dqtool.nn.steps import look_up
from dqtool.nn.surgery import steps_of
from dqtool.training.block_loop import make_trainable
from dqtool.training.data import DistillationTask, Reporter, Trajectory
from dqtool.training.held_weights import held_weights
from dqtool.training.losses import Losses
from dqtool.training.network_loop import accumulate_gradients
from dqtool.training.optimizer import QuantAdam, cosine
from dqtool.training.options import OnPolicyOptions
from dqtool.training.recompute import recomputed_blocks
from dqtool.training.recovery import Recovery, StoredStates
from dqtool.training.sharing import add_gradients
from dqtool.training.tensor_store import TensorStore

__all__ = ["Refinement", "centre_weights", "kept_trajectory", "refine", "student_trajectory"]

ITERATIONS_A_TRIM = 10
"""Iterations between two returns of freed memory to the system in low-memory mode. A return costs up to a tenth of an
iteration."""


@dataclass(frozen=True)
class Refinement:
    """Losses of a training on the network's own trajectory, and its seconds, those of sampling among them."""

    losses: list[float]
    seconds: float
    sampling_seconds: float


def refine(task: DistillationTask, options: OnPolicyOptions, progress: Reporter) -> Refinement:
    """Train all blocks (or those that `task.only` names) together on the student's own trajectory.

    The state is saved in the store from time to time, and every new trajectory at once; a later run continues from
    them.

    Raises:
        NumericError: training diverged and `task.strict` is set.
    """
    centre_weights(task.student)
    if task.only is None:
        make_trainable(task.student)
    else:
        task.student.requires_grad_(False)
        for name in task.only:
            make_trainable(task.student.get_submodule(name))
    optimizer = QuantAdam(task.student, options.rates)
    return_freed_memory()
    generator = torch.Generator().manual_seed(task.seed + 1)
    steps = steps_of(task.student)
    losses: list[float] = []
    start = saved = time.perf_counter()
    sampling_seconds = 0.0
    own: Trajectory | None = None
    targets = torch.empty(0)
    label = precision_label(task.teacher)
    kept = task.store.load("refine")
    if kept is not None:
        done = len(kept["losses"])
        found = _loaded(task, f"refine {(done - 1) // options.refresh * options.refresh}{label}")
        if found is not None:
            own, targets = found
            generator.set_state(kept["generator"])
            losses = kept["losses"].tolist()
            optimizer.load(kept)
            progress.skip(done)
    states = StoredStates(task.store, "refine", optimizer)
    if not losses:
        states.begin()
    recovery: Recovery | None = None
    for step in range(len(losses), options.iters):
        if own is None or step % options.refresh == 0:
            begin = time.perf_counter()
            images = images_for(options, step, len(task.trajectory.timesteps))
            own, targets = kept_trajectory(task, images, step, f"refine {step}{label}")
            if task.low_memory:
                store = TensorStore(0)
                own, targets = replace(own, x=store.keep(own.x)), store.keep(targets)
                if step + options.refresh >= options.iters:
                    task.drop_teacher()
            return_freed_memory()
            sampling_seconds += time.perf_counter() - begin
        chosen = torch.randint(len(own), (options.batch_size,), generator=generator)
        optimizer.zero_grad()
        together = held_weights(task.student) if task.low_memory else nullcontext()
        with together, recomputed_blocks(task.student, task.trace):
            error = partial(_error, task, own, targets)
            loss = add_gradients(optimizer, accumulate_gradients(error, chosen, task.network_batch))
        if recovery is None:
            size = float(targets.square().mean()) or 1.0
            recovery = Recovery(optimizer, states, "all blocks", size, strict=task.strict, warnings=task.warnings)
            reader = Losses(losses, recovery)
        optimizer.step(own.step_mask(chosen), cosine(step, options.iters) * recovery.rate)
        if task.low_memory and step % ITERATIONS_A_TRIM == 0:
            return_freed_memory()  # freed tensors fragment the memory, and the next batches do not fit into the holes
        if not (reader.add(loss) and (step + 1 < options.iters or reader.read())):
            break
        progress.advance(1, f"all blocks, loss {sum(losses[-50:]) / max(1, len(losses[-50:])):.3g}")
        if time.perf_counter() - saved >= task.checkpoint_seconds and reader.read() and optimizer.is_finite():
            state = {"generator": generator.get_state(), "losses": torch.tensor(losses, dtype=torch.float64)}
            task.store.save("refine", {**optimizer.state(), **state})
            saved = time.perf_counter()
    optimizer.zero_grad()
    optimizer.release()
    task.student.requires_grad_(False)
    steps.select(torch.zeros(1, dtype=torch.long))
    finite = [loss for loss in losses if math.isfinite(loss)]
    return Refinement(finite, time.perf_counter() - start, sampling_seconds)


def _error(task: DistillationTask, points: Trajectory, targets: Tensor, rows: Tensor) -> Tensor:
    """Return the student's mean squared error at the points `rows`."""
    predictions = task.predict(task.student, rows, points)
    return F.mse_loss(predictions, to_device(pick(targets, rows), predictions.device))


def centre_weights(module: nn.Module) -> None:
    """Move every weight to the centre of its code. The network's function stays equal bit for bit.

    Training leaves many weights close to a rounding threshold, which they kept crossing. From there, the first steps of
    another optimizer would flip thousands of codes at once (one step of a thousandth of the scale tripled the loss).
    From the centre, only weights with a consistent gradient change their code.
    """
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, FakeQuantLayer):
                layer.weight.copy_(layer.quantized_weight())


def images_for(options: OnPolicyOptions, step: int, steps: int) -> int:
    """Return how many images to sample before iteration `step`: no more points than the iterations until the next sampling draw.

    `steps` is the number of points that an image gives.
    """
    drawn = min(options.refresh, options.iters - step) * options.batch_size
    return min(options.images, math.ceil(drawn / steps))


def kept_trajectory(task: DistillationTask, images: int, salt: int, key: str) -> tuple[Trajectory, Tensor]:
    """Return `student_trajectory`, which the store keeps under `key`."""
    found = _loaded(task, key)
    if found is not None:
        return found
    own, targets = student_trajectory(task, images, salt)
    subjects = {} if own.subjects is None else {"subjects": own.subjects}
    task.store.save(key, {"x": own.x, "rows": own.rows, "targets": targets} | subjects)
    return own, targets


def _loaded(task: DistillationTask, key: str) -> tuple[Trajectory, Tensor] | None:
    """Return the student's trajectory and the teacher's predictions that the store holds under `key`."""
    points = task.store.load(key)
    if points is None:
        return None
    own = replace(task.trajectory, x=points["x"], rows=points["rows"], subjects=points.get("subjects"))
    return own, points["targets"]


def student_trajectory(task: DistillationTask, images: int, salt: int) -> tuple[Trajectory, Tensor]:
    """Return the points that the student visits when it samples `images` images, and the teacher's predictions there.

    With guidance half as many images are sampled, since each step evaluates the network twice. Conditions are drawn
    from those of the calibration set. `salt` selects the noise. The predictions of both networks are kept from time to time
    for an interrupted run.

    The points `[N]` are ordered by step, then by condition (null first), then by image.
    """
    sampler, trajectory = task.sampler_in_parts, task.trajectory
    seed = task.seed * 7919 + salt + 1_000_000
    guided = sampler.guidance > 1 and trajectory.null_conditions is not None
    images = -(-images // sampler.inputs_per_image(guided))
    subjects = trajectory.draw_subjects(images, torch.Generator().manual_seed(seed), guided)
    given = trajectory.condition_rows(subjects)
    if guided:
        null_subjects = [torch.full_like(subjects, trajectory.null_subject)] * (sampler.inputs_per_image() - 1)
        subjects = torch.cat([*null_subjects, subjects])
    everything = trajectory.condition_rows(subjects)
    calls = CallCheckpoints(
        task.store, f"the student's trajectory by {sampler.together}{precision_label(task.teacher)}"
    )
    calls.begin(salt)
    seen: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def see(x: Tensor, timestep: Tensor, _prediction: Tensor) -> None:
        answer = sampler.predict(task.teacher, x, timestep, everything, calls)
        row, _ = look_up(timestep.reshape(1).cpu(), trajectory.timesteps)
        seen.append((x.clone(), answer, row.expand(len(x)), subjects))

    noise = initial_noise(tuple(trajectory.x.shape[1:]), range(images), seed, CALIBRATION)
    null = trajectory.null_conditions if guided else None
    seeds = image_seeds(range(images), seed, CALIBRATION)
    sampler.run(task.student, noise, given, seeds, see, null, calls)
    x, answers, rows, asked = (torch.cat(each) for each in zip(*seen, strict=True))
    return Trajectory(x, rows, trajectory.timesteps, trajectory.conditions, asked), answers
