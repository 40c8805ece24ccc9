"""`qat-partial`: QuEST (arXiv 2402.03666), fine-tuning of the most sensitive layers only.

The authors found these layers by lowering the bits of one kind of layer at a time: the layers that carry the timestep,
the projections to q, k and v, and the feed-forward layers. Here their role in the graph selects them. First the layers
on the timestep's path learn the float network's outputs of that path. Then the weights and biases of all sensitive
layers, and the activation scales of every layer, learn the network's prediction, one step at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dqtool.artifacts.jsonvalues import Json, JsonObject
from dqtool.training.methods import Method

if TYPE_CHECKING:
    from dqtool.training.data import Bars, DistillationTask


@dataclass(frozen=True)
class QatPartialOptions:
    """Options of `qat-partial`; rates are those of `Rates`.

    `temporal_iters` train the timestep's path and `iters` the network. A given `iters` scales `temporal_iters` in
    proportion.
    """

    iters: int = 3000
    temporal_iters: int = 500
    batch_size: int = 32
    weight: float = 0.02
    bias: float = 0.01
    table_scale: float = 3e-3


def train(task: DistillationTask, options: QatPartialOptions, bars: Bars) -> dict[str, Json]:
    """Train the timestep's path, then the sensitive layers end to end; return metrics."""
    from dqtool.training.block_loop import Learner, own_layers
    from dqtool.training.curve import curve
    from dqtool.training.network_loop import one_step_at_a_time, train_network
    from dqtool.training.optimizer import QuantAdam
    from dqtool.training.options import Rates
    from dqtool.training.reconstruction import learn_scales
    from dqtool.training.sensitive import learn_weights, sensitive_layers
    from dqtool.training.temporal import temporal_layers, train_temporal

    task.merge_scaling()
    roles = task.roles()
    rates = Rates(weight=options.weight, bias=options.bias, table_scale=options.table_scale)
    student = task.student
    metrics: dict[str, Json] = {}
    temporal = temporal_layers(task, roles)
    student.requires_grad_(False)
    if temporal and options.temporal_iters:
        learn_weights(temporal)
        learn_scales(temporal)
        learner = Learner(task, QuantAdam(student, rates), options.temporal_iters, options.batch_size)
        with bars("time embedding", options.temporal_iters) as progress:
            metrics["temporal_curve"] = curve(train_temporal(task, roles, learner, progress))
    student.requires_grad_(False)
    chosen = sensitive_layers(task, roles)
    learn_weights(chosen.values())
    learn_scales(own_layers(student), student)
    optimizer = QuantAdam(student, rates)
    choose = one_step_at_a_time(task, options.batch_size)
    with bars("network", options.iters) as progress:
        metrics |= train_network(task, optimizer, choose, options.iters, options.batch_size, progress)
    return metrics | {"trained_layers": list(chosen)}


def derive_options(options: QatPartialOptions, given: JsonObject) -> QatPartialOptions:
    """Return options whose `temporal_iters` are scaled with a given `iters`; 0 means plain PTQ."""
    if given.get("iters") is None:
        return options
    share = options.iters / QatPartialOptions.iters
    return replace(options, temporal_iters=round(QatPartialOptions.temporal_iters * share))


METHOD = Method(
    "qat-partial",
    "end to end, sensitive layers",
    QatPartialOptions,
    train,
    lambda options, _: f"{options.temporal_iters} for the time embedding + {options.iters}",
    derive=derive_options,
)
