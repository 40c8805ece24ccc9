"""What training leaves in a quantized network's prediction, taken out of it: a few numbers for every step.

A network that learned by squared error gives predictions that are, at each step, a little too small and off by a constant,
and their fine detail is lost more than the rest; a sampler adds that up. The tables undo it: PTQD's Eq. 10 and its bias
(arXiv 2305.10657) as a part of the network, for detail and for the network's input as well as for the prediction as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dqtool.core.detail import detail
from dqtool.core.device import device_of
from dqtool.nn.quantizers import gather_rows

__all__ = [
    "ALWAYS",
    "NAME",
    "OF_IMAGES",
    "SAMPLE_NAMES",
    "PredictionTables",
    "attach_prediction",
    "correct_hook",
    "corrected",
    "prediction_shapes",
    "row_shapes",
    "same_channels",
]

NAME = "prediction"
"""Under which the root has the tables."""

ALWAYS = ("scale", "bias")
OF_IMAGES = (*ALWAYS, "detail", "input", "input_detail")
"""The tables of networks whose samples are images or latents, `[C, H, W]`; others have the first two."""

SAMPLE_NAMES = ("sample", "hidden_states", "x")
"""What networks call the input that is shaped like their prediction, their first argument."""


def row_shapes(row: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The tables that a network has, and the shape of a row of each, where `row` holds one number for every channel and
    broadcasts against the prediction for one sample."""
    return dict.fromkeys(OF_IMAGES if len(row) == 3 else ALWAYS, row)


def corrected(prediction: Tensor, sample: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
    """`scale * prediction + input * sample + detail(detail * prediction + input_detail * sample) + bias`, of as many terms
    as there are tables. `prediction` `[N, C, ...]`, `sample` the network's input, with any number of channels, and the rows at
    hand of each table `[n, *row]`."""
    result = prediction * tables["scale"] + tables["bias"]
    if "detail" not in tables:
        return result
    sample = same_channels(sample, prediction.shape[1])
    fine = prediction * tables["detail"] + sample * tables["input_detail"]
    return result + sample * tables["input"] + detail(fine)


def same_channels(sample: Tensor, channels: int) -> Tensor:
    """`sample` `[N, C, H, W]` with that many channels: conditions behind the noisy image are cut off, and zeros stand beside a
    learned variance."""
    missing = channels - sample.shape[1]
    return F.pad(sample, (0, 0, 0, 0, 0, missing)) if missing > 0 else sample[:, :channels]


class PredictionTables(nn.Module):
    """The tables by name, `[T, *row]` each, as buffers: row t is for a prediction at step t, see `corrected`."""

    def __init__(self, tables: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = tuple(tables)
        for name, table in tables.items():
            self.register_buffer(name, table)

    def tables(self) -> dict[str, Tensor]:
        """All of them, `[T, *row]`."""
        return {name: getattr(self, name) for name in self.names}

    def forward(self, prediction: Tensor, sample: Tensor, rows: Tensor) -> Tensor:
        """`prediction` `[N, ...]` of samples at the steps `rows`; computed in float32, returned as it came."""
        tables = {name: gather_rows(table, rows, len(prediction)) for name, table in self.tables().items()}
        dtype = tables["scale"].dtype
        return corrected(prediction.to(dtype), sample.to(prediction.device, dtype), tables).to(prediction.dtype)


def attach_prediction(model: nn.Module, tables: Mapping[str, Tensor]) -> None:
    """Give a quantized network these tables, in place of any it has; from now on it returns corrected predictions."""
    if correct_hook not in model._forward_hooks.values():
        model.register_forward_hook(correct_hook, with_kwargs=True)
    device = device_of(model)
    setattr(model, NAME, PredictionTables({name: table.to(device) for name, table in tables.items()}))


def correct_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """A forward hook (`with_kwargs=True`) for the root: corrects the first of its outputs, a tuple's or a diffusers output's.

    The tables and the step are looked up on the module, not captured, so that a deep copy of the network keeps its own.
    """
    tables, steps = getattr(module, NAME), module.__dict__["_dqtool_steps"]
    sample = next((kwargs[name] for name in SAMPLE_NAMES if name in kwargs), None)
    sample = args[0] if sample is None else sample  # by position it comes first
    if isinstance(output, tuple):
        return (tables(output[0], sample, steps.rows_beside(output[0])), *output[1:])
    first = next(iter(output))
    output[first] = tables(output[first], sample, steps.rows_beside(output[first]))
    return output


def prediction_shapes(timesteps: int, rows: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of the tables of a network, by name; `rows` as `row_shapes` gives them."""
    return {f"{NAME}.{name}": ((timesteps, *row), "float32") for name, row in rows.items()}
