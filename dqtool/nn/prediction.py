"""Correction of a quantized network's predictions by a few numbers per step.

After training by squared error, predictions are slightly too small at each step, biased, and lose fine detail most; a
sampler accumulates these errors. The tables undo them inside the network. They extend the slope (Eq. 10) and the bias of
PTQD (arXiv 2305.10657) to the prediction's fine detail and to the network's input.

For each step the tables hold four numbers that all channels share (`scale`, `detail`, `input`, `input_detail`) and one
`bias` for each channel. Files store each number once for each channel. The numbers belong to the sampler, spacing, steps
and guidance that they were fitted with; `set_correcting` switches them off for another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
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
    "has_prediction",
    "is_correcting",
    "prediction_of",
    "prediction_shapes",
    "row_shapes",
    "same_channels",
    "set_correcting",
]

NAME = "prediction"
"""Attribute of the root module that holds the tables."""

SWITCH = "_dqtool_correcting"
"""Entry of the root's `__dict__` that is False while the tables are switched off. Files do not hold it."""

ALWAYS = ("scale", "bias")
OF_IMAGES = (*ALWAYS, "detail", "input", "input_detail")
"""Names of the tables of networks on images or latents `[C, H, W]`; other networks have the first two."""

SAMPLE_NAMES = ("sample", "hidden_states", "x")
"""Argument names under which networks take their first input, which has the shape of their prediction."""


def row_shapes(row: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Return the row shape of each table of a network, by name.

    `row` is the shape that holds one number per channel and broadcasts against the prediction for one sample.
    """
    return dict.fromkeys(OF_IMAGES if len(row) == 3 else ALWAYS, row)


def corrected(prediction: Tensor, sample: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
    """Return `scale * prediction + input * sample + detail(detail * prediction + input_detail * sample) + bias`.

    Terms without a table are left out. `prediction` is `[N, C, ...]`, `sample` the network's input with any number of
    channels, and `tables` holds the rows of the current steps, `[n, *row]`, by name.
    """
    result = prediction * tables["scale"] + tables["bias"]
    if "detail" not in tables:
        return result
    sample = same_channels(sample, prediction.shape[1])
    fine = prediction * tables["detail"] + sample * tables["input_detail"]
    return result + sample * tables["input"] + detail(fine)


def same_channels(sample: Tensor, channels: int) -> Tensor:
    """Return `sample` `[N, C, H, W]` with `channels` channels: cut off conditions, or pad with zeros for a learned variance."""
    missing = channels - sample.shape[1]
    return F.pad(sample, (0, 0, 0, 0, 0, missing)) if missing > 0 else sample[:, :channels]


class PredictionTables(nn.Module):
    """Buffers that hold the correction tables by name, `[T, *row]` each; row t corrects step t (see `corrected`)."""

    def __init__(self, tables: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = tuple(tables)
        for name, table in tables.items():
            self.register_buffer(name, table)

    def tables(self) -> dict[str, Tensor]:
        """Return all tables by name, `[T, *row]` each."""
        return {name: getattr(self, name) for name in self.names}

    def forward(self, prediction: Tensor, sample: Tensor, rows: Tensor) -> Tensor:
        """Return `prediction` `[N, ...]` corrected for the steps `rows`, computed in float32 and returned in its own dtype."""
        tables = {name: gather_rows(table, rows, len(prediction)) for name, table in self.tables().items()}
        dtype = tables["scale"].dtype
        return corrected(prediction.to(dtype), sample.to(prediction.device, dtype), tables).to(prediction.dtype)


def attach_prediction(model: nn.Module, tables: Mapping[str, Tensor]) -> None:
    """Attach correction tables to a quantized network, replacing any it has; it returns corrected predictions from then on."""
    if correct_hook not in model._forward_hooks.values():
        model.register_forward_hook(correct_hook, with_kwargs=True)
    device = device_of(model)
    setattr(model, NAME, PredictionTables({name: table.to(device) for name, table in tables.items()}))


def has_prediction(network: nn.Module) -> bool:
    """Return whether a network has correction tables, switched on or off."""
    return isinstance(getattr(network, NAME, None), PredictionTables)


def is_correcting(network: nn.Module) -> bool:
    """Return whether a network uses its correction tables."""
    return bool(network.__dict__.get(SWITCH, True))


def set_correcting(network: nn.Module, on: bool) -> None:
    """Switch the correction tables of a loaded network on or off. Nothing changes for a network without tables."""
    network.__dict__[SWITCH] = on


def correct_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Correct the root's output, or the first one in a tuple or a diffusers output. A forward hook (`with_kwargs=True`).

    The tables and the step are looked up on the module, not captured, so that a deep copy of the network keeps its own.
    """
    if not is_correcting(module):
        return output
    tables, steps = getattr(module, NAME), module.__dict__["_dqtool_steps"]
    sample = next((kwargs[name] for name in SAMPLE_NAMES if name in kwargs), None)
    sample = args[0] if sample is None else sample  # by position it comes first
    if isinstance(output, Tensor):
        return tables(output, sample, steps.rows_for(output))
    first = 0 if isinstance(output, tuple) else next(iter(output))
    prediction = output[first]
    if isinstance(prediction, Tensor):
        changed = tables(prediction, sample, steps.rows_for(prediction))
    else:  # one tensor for each sample
        together, inputs = torch.stack(prediction), sample if isinstance(sample, Tensor) else torch.stack(sample)
        changed = list(tables(together, inputs, steps.rows_for(together)).unbind())
    if isinstance(output, tuple):
        return (changed, *output[1:])
    output[first] = changed
    return output


def prediction_of(output: Any) -> Tensor:
    """Return the prediction in what a network returns with `return_dict=False`.

    Most classes return a tuple, some the tensor itself. A list of samples is stacked.
    """
    found = output if isinstance(output, Tensor) else output[0]
    return torch.stack(list(found)) if isinstance(found, list | tuple) else found


def prediction_shapes(timesteps: int, rows: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shape and dtype of a network's tables, by name; `rows` comes from `row_shapes`."""
    return {f"{NAME}.{name}": ((timesteps, *row), "float32") for name, row in rows.items()}
