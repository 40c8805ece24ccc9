"""Recomputed blocks keep less for the backward pass, and their gradients are equal up to the order of sums."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from dqtool.training.block_loop import make_trainable
from dqtool.training.data import DistillationTask
from dqtool.training.recompute import recomputed_blocks


def test_gradients_are_the_same_and_less_is_kept(task: DistillationTask) -> None:
    def gradients(again: bool) -> tuple[dict[str, Tensor], int]:
        student = copy.deepcopy(task.student)
        make_trainable(student)
        kept = 0

        def pack(x: Tensor) -> Tensor:
            nonlocal kept
            kept += x.numel() * x.element_size()
            return x

        samples = slice(0, 4)
        if again:
            with recomputed_blocks(student, task.trace):
                with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                    loss = task.predict(student, samples).square().mean()
                loss.backward()
        else:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                loss = task.predict(student, samples).square().mean()
            loss.backward()
        return {n: p.grad for n, p in student.named_parameters() if p.grad is not None}, kept

    plain, much = gradients(False)
    recomputed, little = gradients(True)
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        # Gradients of a tensor that several blocks read are added in another order.
        limit = 1e-3 * float(gradient.norm()) + 1e-8
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-4, atol=limit, msg=name)
    assert little < much / 2


def test_blocks_are_themselves_again_afterwards(task: DistillationTask) -> None:
    with recomputed_blocks(task.student, task.trace):
        pass
    for block in task.trace.blocks:
        assert "forward" not in task.student.get_submodule(block.name).__dict__
