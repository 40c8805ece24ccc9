"""First sweep of `distill --parallel-blocks`: each block is trained by one process alone, and all processes train at once.

A block learns the float network's output from the float network's input. Nothing then depends on the training of another
block, so the result is the same for any number of processes. The errors of the blocks before it are left to a second sweep,
which goes in order (`block_loop.py`).

Every process runs the float network over all samples as far as its last block needs it. Blocks that share parameters, such as
an embedder of all blocks, stay with one process and are trained in order.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor, nn

from dqtool import report
from dqtool.artifacts.checkpoints import PieceStore
from dqtool.artifacts.jsonvalues import Json
from dqtool.core.allocator import return_freed_memory
from dqtool.distributed import broadcast, copy_main, gather, is_main, rank, solo, world_size
from dqtool.graph.recording import tensors_in
from dqtool.training.assignment import assign, block_macs
from dqtool.training.block_loop import (
    AT_HAND,
    MakeLearner,
    block_state,
    decode_lines,
    encode_lines,
    mean_square,
    restore_block,
    train_block,
)
from dqtool.training.curve import first_and_last, mean_curve
from dqtool.training.data import Bars, DistillationTask, Reporter
from dqtool.training.replay import Replay
from dqtool.training.sharing import Share

__all__ = ["train_at_once"]

SWEEP = "at once "
"""Beginning of the keys of this sweep. The piece of a block holds the state of its training, and then what it became."""

FIGURES = "figures"
"""Tensor of a piece whose block is trained."""


@dataclass(frozen=True)
class Trained:
    """Losses of a trained block, the mean square of its target, and the warnings of its training."""

    history: list[float]
    size: float
    warnings: list[str]

    def tensors(self) -> dict[str, Tensor]:
        """Return these values as tensors to save."""
        figures = torch.tensor([self.size, *self.history], dtype=torch.float64)
        return {FIGURES: figures, "warnings": encode_lines(self.warnings)}

    @classmethod
    def of(cls, kept: dict[str, Tensor]) -> Trained:
        """Take the values that `tensors` returned out of `kept`."""
        size, *history = kept.pop(FIGURES).tolist()
        return cls(history, size, decode_lines(kept.pop("warnings")))


def train_at_once(task: DistillationTask, make: MakeLearner, iters: int, bars: Bars) -> dict[str, Json]:
    """Train the blocks of `task.student` in place, or those that `task.only` names, each for `iters` iterations at most.

    Each process saves its blocks by itself, with the state of the block at hand. A run that goes on, with any number of
    processes, trains the missing ones. Returns the metrics of `train_blocks`.

    Raises:
        NumericError: a block diverged and `task.strict` is set.
        UsageError: there are fewer samples than processes, which the second sweep can't share.
    """
    start = time.perf_counter()
    Share(len(task.trajectory))
    store = task.store.alone()
    names = [info.name for info in task.trace.blocks]
    wanted = [index for index, name in enumerate(names) if task.only is None or name in task.only]
    blocks = {index: task.student.get_submodule(names[index]) for index in wanted}
    task.student.requires_grad_(False)
    units = _units(blocks)
    trained = _restored(store, names, blocks, units)
    for index in trained:
        copy_main(blocks[index].parameters())
    left = [[index for index in unit if index not in trained] for unit in units]
    owner = dict(_owners(task, blocks, left))
    mine = [index for index in wanted if owner.get(index) == rank()]
    done = {index: trained[index] for index in trained if is_main()}
    seconds = 0.0
    with bars("blocks at once", iters * (len(mine) + len(done))) as progress:
        for index, piece in done.items():
            progress.skip(len(piece.history), names[index])
        with solo():
            new, seconds = _train(replace(task, store=store, warnings=[]), mine, make, progress)
            done |= new
    for index in sorted(owner):
        copy_main(blocks[index].parameters(), owner[index])
    everything = {index: piece for each in gather(done) for index, piece in each.items()}
    found = [everything[index] for index in wanted]
    task.warnings += chain.from_iterable(piece.warnings for piece in found)
    for index in sorted(owner):
        for line in everything[index].warnings if owner[index] else ():  # other processes than the main one are mute
            report.warn(line)
    total = time.perf_counter() - start
    return {
        "block_loss": {names[index]: first_and_last(everything[index].history, 20) for index in wanted},
        "loss_curve": mean_curve([[loss / piece.size for loss in piece.history] for piece in found if piece.history]),
        "block_seconds": total,
        "outside_training_share": 1 - seconds / total if total else 0.0,
    }


def _train(
    task: DistillationTask, mine: list[int], make: MakeLearner, progress: Reporter
) -> tuple[dict[int, Trained], float]:
    """Train the blocks of this process in order, and save each. Return their figures and the seconds of training alone."""

    def run(model: nn.Module, rows: slice) -> None:
        task.predict(model, rows)

    samples = len(task.trajectory)
    teacher = Replay(task.teacher, task.trace, samples, run, task.replay_batch, task.cache_bytes)
    found: dict[int, Trained] = {}
    seconds = 0.0
    for index in range(max(mine, default=-1) + 1):
        name = task.trace.blocks[index].name
        given = teacher.inputs(index)
        target = teacher.outputs(index, given)
        if index in mine:
            return_freed_memory()
            block = task.student.get_submodule(name)
            known, salt = len(task.warnings), f"{SWEEP}{name} "
            generator = torch.Generator().manual_seed(task.seed * 7919 + index)
            share, begin = Share(samples), time.perf_counter()
            losses = train_block(task, share, block, given, target, make, generator, progress, name, salt)
            seconds += time.perf_counter() - begin
            found[index] = Trained(losses, mean_square(tensors_in(target)), task.warnings[known:])
            task.store.save(f"{salt}{AT_HAND}", {**block_state(block), **found[index].tensors()})
        return_freed_memory()
        teacher.advance(index, target, given)
    return found, seconds


def _restored(
    store: PieceStore, names: list[str], blocks: dict[int, nn.Module], units: list[list[int]]
) -> dict[int, Trained]:
    """Restore the blocks that earlier runs had trained, in the main process; return their figures in every process.

    A block that shares parameters counts if all before it that it shares them with do.
    """
    found: dict[int, Trained] = {}
    for unit in units if is_main() else ():
        for index in unit:
            kept = dict(store.load(f"{SWEEP}{names[index]} {AT_HAND}") or {})
            if FIGURES not in kept:
                break
            found[index] = Trained.of(kept)
            restore_block(blocks[index], kept)
    return broadcast(dict(sorted(found.items())))


def _units(blocks: dict[int, nn.Module]) -> list[list[int]]:
    """Return the blocks by index, in order, together where they share parameters."""
    units: list[tuple[set[int], list[int]]] = []
    for index, block in blocks.items():
        parameters, members = {id(p) for p in block.parameters()}, [index]
        apart = []
        for unit in units:
            if unit[0] & parameters:
                parameters |= unit[0]
                members += unit[1]
            else:
                apart.append(unit)
        units = [*apart, (parameters, sorted(members))]
    return sorted(members for _, members in units)


def _owners(task: DistillationTask, blocks: dict[int, nn.Module], units: list[list[int]]) -> list[tuple[int, int]]:
    """Return the process of each block that is left, by multiply-accumulates and weights."""
    units = [unit for unit in units if unit]
    macs = [(layer.name, layer.macs) for layer in task.trace.layers]
    names = {index: task.trace.blocks[index].name for index in blocks}
    each = dict(zip(blocks, block_macs([names[index] for index in blocks], macs), strict=True))
    costs = [sum(each[i] + sum(p.numel() for p in blocks[i].parameters()) for i in unit) for unit in units]
    shares = assign(costs, world_size())
    return [(index, process) for unit, process in zip(units, shares, strict=True) for index in unit]
