"""Block-by-block training in execution order: each block learns the float network's output from the quantized prefix's.

Memory holds one block and the outputs that later blocks read (`replay.py`). A method defines how a block learns by its
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

from dqtool.artifacts.jsonvalues import Json
from dqtool.core.allocator import return_freed_memory
from dqtool.core.device import to_device
from dqtool.distributed import copy_main, gather
from dqtool.graph.recording import tensors_in
from dqtool.nn.attention import OPERANDS
from dqtool.nn.layers import FakeQuantLayer
from dqtool.training.curve import first_and_last, mean_curve
from dqtool.training.data import DistillationTask, Reporter
from dqtool.training.losses import Losses
from dqtool.training.optimizer import QuantAdam
from dqtool.training.recovery import BlockStates, Recovery
from dqtool.training.replay import BlockInputs, Replay
from dqtool.training.sharing import Share, add_gradients

__all__ = [
    "AT_HAND",
    "Learner",
    "MakeLearner",
    "block_state",
    "decode_lines",
    "device_mean_square",
    "encode_lines",
    "make_trainable",
    "mean_square",
    "own_layers",
    "restore_block",
    "train_block",
    "train_blocks",
]


AT_HAND = "block at hand"
"""Key of the state of a block between two iterations."""


class Learner:
    """Training of one block. This base class trains every parameter that requires gradients; methods override its
    hooks.

    Attributes:
        iters: number of iterations.
        batch_size: samples drawn at random for each iteration.
        unit: factor from the error per value to the sum over channels relative to the target's mean square; a tensor where
            reading it would wait for a device.
    """

    def __init__(self, task: DistillationTask, optimizer: QuantAdam, iters: int, batch_size: int) -> None:
        self.task, self.optimizer = task, optimizer
        self.iters, self.batch_size = iters, batch_size
        self.unit: float | Tensor = 1.0

    def observe_targets(self, outputs: Sequence[Tensor], size: Tensor | None = None) -> None:
        """Set `unit` from the outputs that the block should learn. `size` is their mean square where it is known."""
        channels = sum(y.shape[1] if y.dim() == 4 else y.shape[-1] for y in outputs) / len(outputs)
        self.unit = channels / mean_square(outputs) if size is None else torch.full_like(size, channels) / size

    def draw_samples(self, _step: int, generator: torch.Generator) -> Tensor:
        """Return the sample indices of this iteration."""
        return torch.randint(len(self.task.trajectory), (self.batch_size,), generator=generator)

    def rate_factor(self, _step: int) -> float:
        """Return the factor of the learning rates at this iteration."""
        return 1.0

    def objective(self, loss: Tensor, _step: int) -> Tensor:
        """Return the loss to minimise, given the error of the block's output."""
        return loss

    def finish(self) -> None:
        """Put the trained block into its final, quantized form."""
        self.optimizer.release()


MakeLearner = Callable[[nn.Module], Learner]
"""Function that returns the learner of a block."""


def own_layers(module: nn.Module, blocks: Iterable[nn.Module] = ()) -> list[FakeQuantLayer]:
    """Return the quantized layers of `module` that are not themselves one of `blocks`.

    A layer inside `module` can be a block of its own, for instance an embedder that several blocks share.
    """
    others = {id(block) for block in blocks if block is not module}
    return [m for m in module.modules() if isinstance(m, FakeQuantLayer) and id(m) not in others]


def make_trainable(module: nn.Module, blocks: Iterable[nn.Module] = ()) -> None:
    """Enable gradients of the quantized layers and attention tables of `module`, and disable all others.

    Norms stay frozen, since their affine parameters are part of the float network and PyTorch's CPU group norm can't
    compute gradients for them in every memory layout. Layers that are themselves one of `blocks` stay frozen, too.
    """
    module.requires_grad_(False)
    for layer in own_layers(module, blocks):
        layer.requires_grad_(True)
    for each in module.modules():
        for name in OPERANDS:
            for kind in ("scale", "zero_point"):
                table = getattr(each, f"{name}_{kind}", None)
                if isinstance(table, nn.Parameter):
                    table.requires_grad_(True)


def train_blocks(task: DistillationTask, make: MakeLearner, progress: Reporter, salt: str = "") -> dict[str, Json]:
    """Train the blocks of `task.student` in place, or those that `task.only` names.

    `progress` counts finished iterations. Finished blocks are saved in the store under their name, prefixed with
    `salt`.

    Returns metrics: `block_loss` (mean of the first and of the last losses of each block), `loss_curve` (mean over the
    blocks of their losses relative to the mean square of the float block's output), `block_seconds` and
    `outside_training_share`.

    Raises:
        NumericError: a block diverged and `task.strict` is set.
    """
    start = time.perf_counter()
    training_seconds = 0.0
    trace, only = task.trace, task.only
    share = Share(len(task.trajectory))
    generator = torch.Generator().manual_seed(task.seed)

    def run(model: nn.Module, rows: slice) -> None:
        task.predict(model, share.indices(rows))

    budget = task.cache_bytes // 2
    teacher = Replay(task.teacher, trace, len(share), run, task.replay_batch, budget)
    student = Replay(task.student, trace, len(share), run, task.replay_batch, budget)
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
            return_freed_memory()  # memory that was split up for a whole replay does not suit the sizes of one batch
            begin = time.perf_counter()
            known = len(task.warnings)
            history = train_block(task, share, block, given, target, make, generator, progress, info.name, salt)
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
        copy_main(block.parameters())  # processors differ in their last bits
        student.advance(index, student.outputs(index, given, lambda rows: task.select_rows(share.indices(rows))), given)
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
    share: Share,
    block: nn.Module,
    given: BlockInputs,
    target: Any,
    make: MakeLearner,
    generator: torch.Generator,
    progress: Reporter,
    name: str,
    salt: str = "",
) -> list[float]:
    """Minimise Eq. 27 for one block and return the finite losses of its iterations. `given` and `target` are those of the
    samples in `share`.

    A block that diverges returns to its best state, see `recovery.py`. Large blocks take hours: the state of the block at
    hand is saved every `task.checkpoint_seconds`, and an interrupted run goes on from it to the same bits.
    """
    learner = make(block)
    learner.observe_targets(tensors_in(target))
    states = BlockStates(learner.optimizer)
    recovery = Recovery(
        learner.optimizer,
        states,
        f"block '{name}'",
        mean_square(tensors_in(target)),
        strict=task.strict,
        warnings=task.warnings,
    )
    history: list[float] = []
    key = f"{salt}{AT_HAND}"
    kept = task.store.load(key)
    if kept is not None and decode_lines(kept.get("name")) == [name]:
        generator.set_state(kept["generator"])
        history = kept["history"].tolist()
        learner.optimizer.load(kept)
        states.load(kept)
        recovery.load(kept)
        progress.skip(len(history), name)
    saved, cost = time.perf_counter(), 0.0
    losses = Losses(history, recovery)
    for step in range(len(history), learner.iters):
        chosen = learner.draw_samples(step, generator)
        mine, rows = share.among(chosen)
        learner.optimizer.zero_grad()
        loss = torch.zeros((), dtype=torch.float64)
        if len(mine):
            task.select_rows(mine)
            args, kwargs = given.batch(rows)
            error = output_loss(block(*args, **kwargs), target, rows)
            part = len(mine) / len(chosen)
            (learner.objective(error, step) * part).backward()
            loss = error.detach().double() * part
        loss = add_gradients(learner.optimizer, loss)
        learner.optimizer.step(task.trajectory.step_mask(chosen), learner.rate_factor(step) * recovery.rate)
        going = losses.add(loss) and (step + 1 < learner.iters or losses.read())
        if not going:
            progress.skip(learner.iters - step - 1, name)
            break
        progress.advance(1, name)
        begin = time.perf_counter()
        if begin - saved >= max(task.checkpoint_seconds, 10 * cost) and losses.read() and learner.optimizer.is_finite():
            state = {
                "name": encode_lines([name]),
                "generator": generator.get_state(),
                "history": torch.tensor(history, dtype=torch.float64),
            }
            task.store.save(key, {**learner.optimizer.state(), **states.state(), **recovery.state(), **state})
            saved = time.perf_counter()
            cost = saved - begin
    learner.finish()
    block.requires_grad_(False)
    return [loss for loss in history if math.isfinite(loss)]


def relative_losses(history: list[float], target: Any) -> list[float]:
    """Return losses divided by the mean square of the target."""
    size = mean_square(tensors_in(target))
    return [loss / size for loss in history]


def mean_square(outputs: Sequence[Tensor]) -> float:
    """Return the average of the mean squares of several tensors, over the samples of all processes; 1 if it is 0."""
    # In parts, since the square of all samples would be the largest tensor in memory.
    sums = [(sum(float(part.square().sum()) for part in y.split(32)), y.numel()) for y in outputs]
    totals = [
        sum(square for square, _ in each) / max(1, sum(count for _, count in each))
        for each in zip(*gather(sums), strict=True)
    ]
    return sum(totals) / len(totals) or 1.0


def device_mean_square(outputs: Sequence[Tensor]) -> Tensor:
    """Return `mean_square` of the samples of this process, float64 on their device. Nobody waits for it."""
    zero = torch.zeros((), dtype=torch.float64, device=outputs[0].device)
    means = [sum((part.square().sum() for part in y.split(32)), zero) / max(1, y.numel()) for y in outputs]
    mean = sum(means, zero) / len(means)
    return torch.where(mean == 0, 1.0, mean)


def output_loss(output: Any, target: Any, rows: Tensor) -> Tensor:
    """Return the mean squared error of a block's output against `target[rows]`.

    A block with several outputs (text and image streams) has the mean of their errors.
    """
    losses = [
        F.mse_loss(y, to_device(wanted[rows], y.device))
        for y, wanted in zip(tree_leaves(output), tree_leaves(target), strict=True)
        if isinstance(y, Tensor)
    ]
    return losses[0] if len(losses) == 1 else torch.stack(losses).mean()


def encode_lines(lines: Sequence[str]) -> Tensor:
    """Return lines of text as a uint8 tensor, so that a store can hold them."""
    return torch.tensor(list("\n".join(lines).encode()), dtype=torch.uint8)


def decode_lines(data: Tensor | None) -> list[str]:
    """Return the lines that `encode_lines` encoded."""
    return [] if data is None or not data.numel() else bytes(data.tolist()).decode().split("\n")


def block_state(block: nn.Module) -> dict[str, Tensor]:
    """Return copies of a block's parameters; a shared table appears under each of its names."""
    named = block.named_parameters(remove_duplicate=False)
    return {name or "self": p.detach().clone() for name, p in named}


def restore_block(block: nn.Module, state: dict[str, Tensor]) -> None:
    """Restore parameters saved by `block_state`; shared tables stay shared."""
    with torch.no_grad():
        for name, p in block.named_parameters(remove_duplicate=False):
            p.copy_(state[name or "self"])
