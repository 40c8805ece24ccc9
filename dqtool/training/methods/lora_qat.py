"""`lora-qat`: EfficientDM (arXiv 2310.03270), frozen weights with low-rank updates that are quantized together.

The update is added to the weight before quantization and merged at the end, so the exported model has no extra product.
Rates of the updates follow the scale of their layer (the paper's scale-aware optimisation). Activation scales and zero
points belong to one step each and are trained one step at a time, in sampling order (TALSQ). Biases stay fixed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dqtool.artifacts.jsonvalues import Json
from dqtool.training.methods import Method

if TYPE_CHECKING:
    from dqtool.training.data import Bars, DistillationTask


@dataclass(frozen=True)
class LoraQatOptions:
    """Options of `lora-qat`. The paper uses an update rate of 1/2500 of the scale over at least 16 000 iterations.

    Attributes:
        update: rate of both factors, as a fraction of the layer's mean weight scale.
        weight_scale: relative rate, as is `table_scale`.
        zero_point: rate of activation zero points, as a fraction of a code.
    """

    iters: int = 3000
    batch_size: int = 32
    rank: int = 32
    update: float = 0.02
    weight_scale: float = 1e-4
    table_scale: float = 3e-3
    zero_point: float = 5e-3


def train(task: DistillationTask, options: LoraQatOptions, bars: Bars) -> dict[str, Json]:
    """Attach low-rank updates, train them end to end and merge them; return metrics."""
    from torch import nn

    from dqtool.training.block_loop import make_trainable
    from dqtool.training.low_rank import attach_low_rank
    from dqtool.training.network_loop import one_step_at_a_time, train_network
    from dqtool.training.optimizer import QuantAdam, weight_unit
    from dqtool.training.options import Rates
    from dqtool.training.rounding import merge_adapters

    task.merge_scaling()
    make_trainable(task.student)
    extra: list[tuple[nn.Parameter, float]] = []
    for layer, update in attach_low_rank(task.student, options.rank, task.seed):
        layer.weight.requires_grad_(False)
        for frozen in (layer.bias, layer.weight_zero_point):
            if isinstance(frozen, nn.Parameter):
                frozen.requires_grad_(False)
        rate = options.update * weight_unit(layer)
        extra += [(update.down, rate), (update.up, rate)]
    rates = Rates(weight_scale=options.weight_scale, table_scale=options.table_scale, zero_point=options.zero_point)
    optimizer = QuantAdam(task.student, rates, extra)
    choose = one_step_at_a_time(task, options.batch_size)
    with bars("network", options.iters) as progress:
        metrics = train_network(task, optimizer, choose, options.iters, options.batch_size, progress)
    merge_adapters(task.student)
    return metrics


METHOD = Method(
    "lora-qat", "end to end, low-rank updates", LoraQatOptions, train, lambda options, _: f"{options.iters}"
)
