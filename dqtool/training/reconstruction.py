"""Learner of a block's rounding together with the scales of its activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from dqtool.nn.attention import OPERANDS
from dqtool.nn.layers import FakeQuantLayer
from dqtool.training.block_loop import Learner
from dqtool.training.data import DistillationTask
from dqtool.training.optimizer import QuantAdam, cosine
from dqtool.training.options import Rates
from dqtool.training.rounding import Annealing, learn_rounding, merge_adapters, rounding_penalty

if TYPE_CHECKING:
    from dqtool.training.options import RoundingOptions

__all__ = ["RoundingLearner", "activation_scales", "learn_scales"]


class RoundingLearner(Learner):
    """Trains the rounding of `layers` and, with `scales`, the scales of all activations in `block` at the same time."""

    def __init__(
        self,
        task: DistillationTask,
        block: nn.Module,
        layers: Sequence[FakeQuantLayer],
        options: RoundingOptions,
        scales: bool = True,
    ) -> None:
        block.requires_grad_(False)
        self.block, self.options = block, options
        self.roundings = learn_rounding(layers)
        self.annealing = Annealing(options.warm_up, options.beta_start, options.beta_end)
        self.rounding_iters = options.iters
        if scales:
            learn_scales(layers, block)
        rates = Rates(table_scale=options.table_scale)
        optimizer = QuantAdam(block, rates, [(each.v, options.round_rate) for each in self.roundings])
        super().__init__(task, optimizer, options.iters if optimizer.parameters else 0, options.batch_size)

    def rate_factor(self, step: int) -> float:
        """Return the cosine factor, which falls to 0.1 only, since the end of the annealing decides the rounding."""
        return cosine(step, self.iters, floor=0.1)

    def objective(self, loss: Tensor, step: int) -> Tensor:
        """Return the relative error summed over channels plus, after the warm-up, the regulariser summed over weights."""
        beta = self.annealing.beta(step, self.rounding_iters) if self.roundings else None
        error = loss * (self.unit.to(loss.dtype) if isinstance(self.unit, Tensor) else self.unit)
        return error if beta is None else error + self.options.penalty * rounding_penalty(self.roundings, beta)

    def finish(self) -> None:
        """Round every weight to one of its two codes."""
        super().finish()
        merge_adapters(self.block)


def learn_scales(layers: Sequence[FakeQuantLayer], operands_of: nn.Module | None = None) -> None:
    """Enable gradients of the activation scales of these layers and of the attention operands in `operands_of`."""
    for scale in activation_scales(layers, operands_of):
        scale.requires_grad_(True)


def activation_scales(layers: Sequence[FakeQuantLayer], operands_of: nn.Module | None = None) -> list[nn.Parameter]:
    """Return the activation scales of these layers and of the attention operands in `operands_of`; float activations
    have none."""
    found = [layer.input_scale for layer in layers]
    for module in () if operands_of is None else operands_of.modules():
        found += [getattr(module, f"{name}_scale", None) for name in OPERANDS]
    return [scale for scale in found if isinstance(scale, nn.Parameter)]
