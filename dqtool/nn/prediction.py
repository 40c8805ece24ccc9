"""What training leaves in a quantized network's prediction, taken out of it: one gain and one offset a channel for every step.

A network that learned by squared error gives predictions that are, at each step, a little too small and off by a constant; a
sampler adds that up. The tables undo it (PTQD's Eq. 10 and its bias, arXiv 2305.10657, as a part of the network).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dqtool.core.device import device_of
from dqtool.nn.quantizers import gather_rows

__all__ = ["NAME", "PredictionTables", "attach_prediction", "correct_hook", "prediction_shapes"]

NAME = "prediction"
"""Under which the root has the tables."""


class PredictionTables(nn.Module):
    """`scale` and `bias`, `[T, *row]`: row t makes `scale_t * prediction + bias_t` of a prediction at step t. `row` broadcasts
    against what the network returns for one sample."""

    def __init__(self, scale: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.scale, self.bias = nn.Buffer(scale), nn.Buffer(bias)

    def forward(self, prediction: Tensor, rows: Tensor) -> Tensor:
        """`prediction` `[N, ...]` of samples at the steps `rows`; computed in float32, returned as it came."""
        scale, bias = (gather_rows(table, rows, len(prediction)) for table in (self.scale, self.bias))
        return (prediction.to(scale.dtype) * scale + bias).to(prediction.dtype)


def attach_prediction(model: nn.Module, scale: Tensor, bias: Tensor) -> None:
    """Give a quantized network these tables, in place of any it has; from now on it returns corrected predictions."""
    if correct_hook not in model._forward_hooks.values():
        model.register_forward_hook(correct_hook)
    device = device_of(model)
    setattr(model, NAME, PredictionTables(scale.to(device), bias.to(device)))


def correct_hook(module: nn.Module, _args: tuple, output: Any) -> Any:
    """A forward hook for the root: corrects the first of its outputs, a tuple's or a diffusers output's.

    The tables and the step are looked up on the module, not captured, so that a deep copy of the network keeps its own.
    """
    tables, steps = getattr(module, NAME), module.__dict__["_dqtool_steps"]
    if isinstance(output, tuple):
        return (tables(output[0], steps.rows_beside(output[0])), *output[1:])
    first = next(iter(output))
    output[first] = tables(output[first], steps.rows_beside(output[first]))
    return output


def prediction_shapes(timesteps: int, row: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of the tables of a network, by name."""
    return {f"{NAME}.{key}": ((timesteps, *row), "float32") for key in ("scale", "bias")}
