"""Learner of a block with separate quantizers for each step: first the rounding, then the scales of one step at a time."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from dqtool.nn.layers import FakeQuantLayer
from dqtool.training.block_loop import own_layers
from dqtool.training.data import DistillationTask
from dqtool.training.network_loop import rows_by_step
from dqtool.training.optimizer import QuantAdam, cosine
from dqtool.training.options import PerStepOptions, Rates
from dqtool.training.reconstruction import RoundingLearner, activation_scales, learn_scales
from dqtool.training.rounding import float_activations, merge_adapters

__all__ = ["PerStepLearner", "untrained_layers"]


class PerStepLearner(RoundingLearner):
    """Learns the rounding of `layers` with all activations of `module` in float, and then the activation scales step by
    step."""

    def __init__(
        self, task: DistillationTask, module: nn.Module, layers: Sequence[FakeQuantLayer], options: PerStepOptions
    ) -> None:
        super().__init__(task, module, layers, options, scales=False)
        self.layers, self.groups = layers, rows_by_step(task)
        share = round(options.iters * options.rounding)
        self.rounding_iters = share if self.roundings else 0
        steps = bool(options.iters and layers and activation_scales(layers, module))
        self.each = max(1, (options.iters - share) // len(self.groups)) if steps else 0
        self.iters = self.rounding_iters + self.each * len(self.groups)
        self._float, self._rounds = ExitStack(), True
        if self.rounding_iters:
            self._float.enter_context(float_activations(module))

    def draw_samples(self, step: int, generator: torch.Generator) -> Tensor:
        """Return random samples while the rounding learns, then samples of the step whose scales learn."""
        if step < self.rounding_iters:
            return super().draw_samples(step, generator)
        if step == self.rounding_iters:
            self._end_rounding()
        pool = self.groups[(step - self.rounding_iters) // self.each]
        return pool[torch.randint(len(pool), (self.batch_size,), generator=generator)]

    def rate_factor(self, step: int) -> float:
        """Return the rate factor: a cosine over the rounding, then a cosine over the iterations of each step."""
        if step < self.rounding_iters:
            return cosine(step, self.rounding_iters, floor=0.1)
        return cosine((step - self.rounding_iters) % self.each, self.each)

    def finish(self) -> None:
        """Round the weights and quantize the activations again."""
        if self._rounds:
            self._end_rounding()
        self.optimizer.release()

    def _end_rounding(self) -> None:
        """Round the weights to their codes, quantize the activations again and start to train the activation scales."""
        self.optimizer.release()
        merge_adapters(self.block)
        self.roundings, self._rounds = [], False
        self._float.close()
        self.block.requires_grad_(False)
        learn_scales(self.layers, self.block)
        self.optimizer = QuantAdam(self.block, Rates(table_scale=self.options.table_scale))


def untrained_layers(task: DistillationTask, block: nn.Module, done: Sequence[FakeQuantLayer]) -> list[FakeQuantLayer]:
    """Return the quantized layers of a block that are not in `done` and do not form a block of their own."""
    finished = {id(layer) for layer in done}
    blocks = [task.student.get_submodule(info.name) for info in task.trace.blocks]
    return [layer for layer in own_layers(block, blocks) if id(layer) not in finished]
