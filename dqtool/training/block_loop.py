"""Training block by block, in execution order: each block learns the float network's output from the quantized prefix's.

Memory is that of one block and of what later blocks still read (`replay.py`). How a block learns is the method's part: a
`Learner`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dqtool.core.allocator import return_freed_memory
from dqtool.nn.attention import OPERANDS
from dqtool.nn.layers import FakeQuantLayer
from dqtool.training.curve import first_and_last, mean_curve
from dqtool.training.data import DistillationTask, Reporter
from dqtool.training.optimizer import QuantAdam
from dqtool.training.recovery import BlockStates, Recovery
from dqtool.training.replay import BlockInputs, Replay

__all__ = ["Learner", "block_state", "make_trainable", "mean_square", "own_layers", "restore_block", "train_blocks"]


class Learner:
    """How one block learns. This one trains what requires gradients with `optimizer`; methods override the rest.

    `iters` iterations of `batch_size` samples drawn at random; `rate_factor(step)` is what the rates are multiplied with.
    """

    def __init__(self, task: DistillationTask, optimizer: QuantAdam, iters: int, batch_size: int) -> None:
        self.task, self.optimizer = task, optimizer
        self.iters, self.batch_size = iters, batch_size
        self.unit = 1.0

    def observe_targets(self, outputs: Sequence[Tensor]) -> None:
        """See what the block's outputs should be: `unit` turns their error per value into a sum over channels, relative
        to their mean square."""
        channels = sum(y.shape[1] if y.dim() == 4 else y.shape[-1] for y in outputs) / len(outputs)
        self.unit = channels / mean_square(outputs)

    def draw_samples(self, _step: int, generator: torch.Generator) -> Tensor:
        """Indices of the samples of this iteration."""
        return torch.randint(len(self.task.trajectory), (self.batch_size,), generator=generator)

    def rate_factor(self, _step: int) -> float:
        """The schedule of the rates."""
        return 1.0

    def objective(self, loss: Tensor, _step: int) -> Tensor:
        """What is minimised, given the error of the block's output."""
        return loss

    def finish(self) -> None:
        """The block is trained: leave it in its final, quantized form."""
        self.optimizer.release()


MakeLearner = Callable[[nn.Module], Learner]


def own_layers(module: nn.Module, blocks: Iterable[nn.Module] = ()) -> list[FakeQuantLayer]:
    """The quantized layers of `module`, without those that are `blocks` of their own (an embedder that several blocks
    share)."""
    others = {id(block) for block in blocks if block is not module}
    return [m for m in module.modules() if isinstance(m, FakeQuantLayer) and id(m) not in others]


def make_trainable(module: nn.Module, blocks: Iterable[nn.Module] = ()) -> None:
    """Let gradients reach the quantized layers of `module` and nothing else. Norms stay frozen: their affine belongs to
    the float glue, and PyTorch's CPU group norm can't take gradients for it on every memory layout. So do layers inside
    that are `blocks` of their own."""
    module.requires_grad_(False)
    for layer in own_layers(module, blocks):
        layer.requires_grad_(True)
    for each in module.modules():
        for name in OPERANDS:
            for kind in ("scale", "zero_point"):
                table = getattr(each, f"{name}_{kind}", None)
                if isinstance(table, nn.Parameter):
                    table.requires_grad_(True)


def train_blocks(task: DistillationTask, make: MakeLearner, progress: Reporter, salt: str = "") -> dict[str, Any]:
    """Train the blocks of `task.student` in place, or those that `task.only` names. `progress` is told of finished
    iterations; finished blocks are kept in the store, their keys prefixed with `salt`.

    Returns metrics: `block_loss` (each block's before and after), `loss_curve` (the mean over the blocks of their loss,
    each in units of the mean square of the float block's output), `block_seconds`, `outside_training_share`.
    """
    start = time.perf_counter()
    training_seconds = 0.0
    trace, only = task.trace, task.only
    samples = len(task.trajectory)
    generator = torch.Generator().manual_seed(task.seed)

    def run(model: nn.Module, rows: slice) -> None:
        task.predict(model, rows)

    budget = task.cache_bytes // 2
    teacher = Replay(task.teacher, trace, samples, run, task.replay_batch, budget)
    student = Replay(task.student, trace, samples, run, task.replay_batch, budget)
    losses: dict[str, list[float]] = {}
    relative: list[list[float]] = []
    task.student.requires_grad_(False)
    last = max((index for index, info in enumerate(trace.blocks) if only is None or info.name in only), default=-1)
    for index, info in enumerate(trace.blocks[: last + 1]):
        block = task.student.get_submodule(info.name)
        wanted = teacher.inputs(index)
        target = teacher.outputs(index, wanted)
        given = student.inputs(index)
        kept = task.store.load(salt + info.name)
        if only is not None and info.name not in only:
            pass
        elif kept is not None:
            generator.set_state(kept["generator"])
            history = kept["history"].tolist()
            restore_block(block, {k: v for k, v in kept.items() if k not in ("generator", "history", "warnings")})
            progress.skip(len(history), info.name)
            task.warnings += decode_lines(kept.get("warnings"))
            losses[info.name] = first_and_last(history, 20)
            relative.append(relative_losses(history, target))
        else:
            return_freed_memory()  # what was cut for whole replays does not fit what one batch wants
            begin = time.perf_counter()
            known = len(task.warnings)
            history = train_block(task, block, given, target, make, generator, progress, info.name)
            training_seconds += time.perf_counter() - begin
            losses[info.name] = first_and_last(history, 20)
            relative.append(relative_losses(history, target))
            extra = {
                "generator": generator.get_state(),
                "history": torch.tensor(history, dtype=torch.float64),
                "warnings": encode_lines(task.warnings[known:]),
            }
            task.store.save(salt + info.name, {**block_state(block), **extra})
        return_freed_memory()
        teacher.advance(index, target, wanted)
        student.advance(index, student.outputs(index, given, task.select_rows), given)
        return_freed_memory()
    total = time.perf_counter() - start
    return {
        "block_loss": losses,
        "loss_curve": mean_curve([each for each in relative if each]),
        "block_seconds": total,
        "outside_training_share": 1 - training_seconds / total if total else 0.0,
    }


def train_block(
    task: DistillationTask,
    block: nn.Module,
    given: BlockInputs,
    target: Any,
    make: MakeLearner,
    generator: torch.Generator,
    progress: Reporter,
    name: str,
) -> list[float]:
    """Minimise Eq. 27 for one block; return the finite loss of every iteration. A block that diverges goes back to its best
    state, see `recovery.py`."""
    learner = make(block)
    learner.observe_targets(tensors_of(target))
    recovery = Recovery(
        learner.optimizer,
        BlockStates(learner.optimizer),
        f"block '{name}'",
        mean_square(tensors_of(target)),
        strict=task.strict,
        warnings=task.warnings,
    )
    history: list[float] = []
    for step in range(learner.iters):
        chosen = learner.draw_samples(step, generator)
        task.select_rows(chosen)
        args, kwargs = given.batch(chosen)
        loss = output_loss(block(*args, **kwargs), target, chosen)
        learner.optimizer.zero_grad()
        learner.objective(loss, step).backward()
        learner.optimizer.step(task.trajectory.step_mask(chosen), learner.rate_factor(step) * recovery.rate)
        history.append(loss.item())
        if not recovery.should_continue(history[-1], step):
            progress.skip(learner.iters - step - 1, name)
            break
        progress.advance(1, name)
    learner.finish()
    block.requires_grad_(False)
    return [loss for loss in history if math.isfinite(loss)]


def relative_losses(history: list[float], target: Any) -> list[float]:
    """Losses over the mean square of what they are the error of."""
    size = mean_square(tensors_of(target))
    return [loss / size for loss in history]


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors that a block gave."""
    return [y for y in tree_leaves(output) if isinstance(y, Tensor)]


def mean_square(outputs: Sequence[Tensor]) -> float:
    """The mean over several tensors of their mean squares; 1 where that is 0."""
    # Part by part: a square of all samples at once would be the largest tensor around.
    totals = [sum(float(part.square().sum()) for part in y.split(32)) / max(1, y.numel()) for y in outputs]
    return sum(totals) / len(totals) or 1.0


def output_loss(output: Any, target: Any, rows: Tensor) -> Tensor:
    """Mean squared error of a block's output against `target[rows]`; of one with several outputs (text and image
    streams) the mean over them."""
    losses = [
        F.mse_loss(y, wanted[rows].to(y.device))
        for y, wanted in zip(tree_leaves(output), tree_leaves(target), strict=True)
        if isinstance(y, Tensor)
    ]
    return losses[0] if len(losses) == 1 else torch.stack(losses).mean()


def encode_lines(lines: Sequence[str]) -> Tensor:
    """Return lines of text as bytes, uint8, so that a store keeps them beside tensors."""
    return torch.tensor(list("\n".join(lines).encode()), dtype=torch.uint8)


def decode_lines(data: Tensor | None) -> list[str]:
    """Return the lines that `encode_lines` was given."""
    return [] if data is None or not data.numel() else bytes(data.tolist()).decode().split("\n")


def block_state(block: nn.Module) -> dict[str, Tensor]:
    """The trained tensors of a block (shared tables appear under each name that holds them)."""
    named = block.named_parameters(remove_duplicate=False)
    return {name or "self": p.detach().clone() for name, p in named}


def restore_block(block: nn.Module, state: dict[str, Tensor]) -> None:
    """Put back what `block_state` gave, keeping shared tables shared."""
    with torch.no_grad():
        for name, p in block.named_parameters(remove_duplicate=False):
            p.copy_(state[name or "self"])
