"""Block-wise Knowledge Distillation (Eq. 25-27), then one pass over all blocks on the student's own trajectory.

First each block, in execution order, learns to give the float network's output from the *quantized* prefix's: later
blocks repair what earlier ones left. Weights, biases, weight scales and step tables learn at once. What no block can
see is where the errors of one step lead at the next: the quantized model drifts off the trajectory it was trained on.
`refine` closes that gap: it samples with the student, asks the teacher at the points it visits, and trains all blocks
on that answer.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dqtool.errors import NumericError
from dqtool.models.sampling import CALIBRATION, image_seeds, initial_noise
from dqtool.nn.attention import OPERANDS
from dqtool.nn.layers import FakeQuantLayer
from dqtool.nn.surgery import steps_of
from dqtool.training.data import Problem, Reporter, Trajectory
from dqtool.training.optimizer import QuantAdam, cosine
from dqtool.training.options import BkdOptions
from dqtool.training.replay import BlockInputs, Replay

__all__ = ["distill_blocks", "refine"]


def trainable(module: nn.Module, blocks: Iterable[nn.Module] = ()) -> None:
    """Let gradients reach the quantized layers of `module` and nothing else. Norms stay frozen: their affine belongs to
    the float glue, and PyTorch's CPU group norm can't take gradients for it on every memory layout. So do layers inside
    that are `blocks` of their own (an embedder that several blocks share)."""
    module.requires_grad_(False)
    others = {id(block) for block in blocks if block is not module}
    for layer in module.modules():
        if id(layer) in others:
            continue
        if isinstance(layer, FakeQuantLayer):
            layer.requires_grad_(True)
        for name in OPERANDS:
            for kind in ("scale", "zero_point"):
                table = getattr(layer, f"{name}_{kind}", None)
                if isinstance(table, nn.Parameter):
                    table.requires_grad_(True)


def distill_blocks(
    problem: Problem, options: BkdOptions, progress: Reporter, only: Collection[str] | None = None
) -> dict:
    """Train every block of `problem.student` in place, or those named in `only`. `progress` is told of finished iterations.

    Returns metrics: the loss of each block before and after, seconds in training steps and in all.
    """
    start = time.perf_counter()
    training_seconds = 0.0
    trajectory, trace = problem.trajectory, problem.trace
    samples = len(trajectory)
    generator = torch.Generator().manual_seed(problem.seed)

    def run(model: nn.Module, rows: slice) -> None:
        problem.predict(model, rows)

    teacher = Replay(problem.teacher, trace, samples, run)
    student = Replay(problem.student, trace, samples, run)
    losses: dict[str, list[float]] = {}
    problem.student.requires_grad_(False)
    last = max((index for index, info in enumerate(trace.blocks) if only is None or info.name in only), default=-1)
    for index, info in enumerate(trace.blocks[: last + 1]):
        block = problem.student.get_submodule(info.name)
        wanted = teacher.inputs(index)
        target = teacher.outputs(index, wanted)
        given = student.inputs(index)
        kept = problem.store.load(info.name)
        if only is not None and info.name not in only:
            pass
        elif kept is not None:
            generator.set_state(kept["generator"])
            losses[info.name] = kept["loss"].tolist()
            restore_block(block, {k: v for k, v in kept.items() if k not in ("generator", "loss")})
            progress.skip(options.iters, info.name)
        else:
            begin = time.perf_counter()
            losses[info.name] = train_block(problem, block, given, target, options, generator, progress, info.name)
            training_seconds += time.perf_counter() - begin
            extra = {"generator": generator.get_state(), "loss": torch.tensor(losses[info.name], dtype=torch.float64)}
            problem.store.save(info.name, {**block_state(block), **extra})
        teacher.advance(index, target, wanted)
        student.advance(index, student.outputs(index, given, problem.select_rows), given)
    total = time.perf_counter() - start
    return {
        "block_loss": losses,
        "block_seconds": total,
        "outside_training_share": 1 - training_seconds / total if total else 0.0,
    }


def train_block(
    problem: Problem,
    block: nn.Module,
    given: BlockInputs,
    target: Any,
    options: BkdOptions,
    generator: torch.Generator,
    progress: Reporter,
    name: str,
) -> list[float]:
    """Minimise Eq. 27 for one block; returns [first, last] loss (means over up to 20 batches)."""
    trainable(block, [problem.student.get_submodule(info.name) for info in problem.trace.blocks])
    optimizer = QuantAdam(block, options.rates)
    history: list[float] = []
    for step in range(options.iters):
        chosen = torch.randint(len(problem.trajectory), (options.batch_size,), generator=generator)
        problem.select_rows(chosen)
        args, kwargs = given.batch(chosen)
        loss = output_loss(block(*args, **kwargs), target, chosen)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(problem.trajectory.present(chosen), cosine(step, options.iters))
        history.append(loss.item())
        check_loss(history[-1], name, step)
        progress.advance(1, name)
    optimizer.release()
    block.requires_grad_(False)
    window = max(1, min(20, len(history) // 4))
    return [sum(history[:window]) / window, sum(history[-window:]) / window] if history else []


def output_loss(output: Any, target: Any, rows: Tensor) -> Tensor:
    """Mean squared error of a block's output against `target[rows]`; of one with several outputs (text and image
    streams) the mean over them."""
    losses = [
        F.mse_loss(y, wanted[rows])
        for y, wanted in zip(tree_leaves(output), tree_leaves(target), strict=True)
        if isinstance(y, Tensor)
    ]
    return losses[0] if len(losses) == 1 else torch.stack(losses).mean()


def refine(problem: Problem, options: BkdOptions, progress: Reporter) -> dict:
    """Train all blocks together on the student's own trajectory, with the teacher's answer there as the target."""
    settle(problem.student)
    trainable(problem.student)
    optimizer = QuantAdam(problem.student, options.refine_rates)
    generator = torch.Generator().manual_seed(problem.seed + 1)
    steps = steps_of(problem.student)
    losses: list[float] = []
    start = time.perf_counter()
    sampling_seconds = 0.0
    own: Trajectory | None = None
    targets = torch.empty(0)
    for step in range(options.refine_iters):
        if step % options.refine_refresh == 0:
            begin = time.perf_counter()
            own, targets = own_trajectory(problem, options.refine_images, step)
            sampling_seconds += time.perf_counter() - begin
        assert own is not None
        chosen = torch.randint(len(own), (options.refine_batch_size,), generator=generator)
        x, timestep, conditions = own.arguments(chosen)
        loss = F.mse_loss(problem.family.predict(problem.student, x, timestep, conditions), targets[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(own.present(chosen), cosine(step, options.refine_iters))
        losses.append(loss.item())
        check_loss(losses[-1], "refine", step)
        progress.advance(1, f"all blocks, loss {sum(losses[-50:]) / len(losses[-50:]):.3g}")
    optimizer.release()
    problem.student.requires_grad_(False)
    steps.select(torch.zeros(1, dtype=torch.long))
    window = max(1, min(100, len(losses) // 4))
    return {
        "refine_loss": [sum(losses[:window]) / window, sum(losses[-window:]) / window] if losses else [],
        "refine_seconds": time.perf_counter() - start,
        "refine_sampling_seconds": sampling_seconds,
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


def block_state(block: nn.Module) -> dict[str, Tensor]:
    """The trained tensors of a block (shared tables appear under each name that holds them)."""
    named = block.named_parameters(remove_duplicate=False)
    return {name or "self": p.detach().clone() for name, p in named}


def restore_block(block: nn.Module, state: dict[str, Tensor]) -> None:
    """Put back what `block_state` gave, keeping shared tables shared."""
    with torch.no_grad():
        for name, p in block.named_parameters(remove_duplicate=False):
            p.copy_(state[name or "self"])


def check_loss(loss: float, where: str, step: int) -> None:
    """Raise `NumericError` for a loss that is no number."""
    if not loss < float("inf"):
        raise NumericError(
            "The distillation loss is no longer finite.",
            where=f"{where}, iteration {step}",
            fix="Check the calibration with `dqtool inspect`; more --samples or another --seed may help",
        )
