"""Parameters that parts of a quantized network show where quantization left none.

Some classes of diffusers look up the dtype of a part's first parameter, `next(part.parameters()).dtype`. Quantized layers hold
buffers, so a part that consists of them has no parameter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dqtool.nn.call_lock import give
from dqtool.nn.packed_layer import PackedLayer

__all__ = ["give_stand_ins"]

STAND_IN = "_dqtool_stand_in"


def give_stand_ins(network: nn.Module) -> None:
    """Let every part of `network` that has quantized layers and no parameter show an empty one, in float32.

    It is part of no state and of no count of parameters.
    """
    for name, part in network.named_modules():
        if not name or isinstance(part, PackedLayer) or next(part.parameters(), None) is not None:
            continue
        if any(isinstance(inner, PackedLayer) for inner in part.modules()):
            part.__dict__[STAND_IN] = nn.Parameter(torch.empty(0), requires_grad=False)
            give(part, "parameters", _parameters)


def _parameters(part: Any, recurse: bool = True) -> Iterator[nn.Parameter]:
    """Return the part's parameters, or the empty one where it has none."""
    found = list(type(part).parameters(part, recurse))
    return iter(found or [part.__dict__[STAND_IN]])
