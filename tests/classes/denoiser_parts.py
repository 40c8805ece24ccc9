"""Parts of the tiny networks: a network's description, and tensors whose values matter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

TEXT = 6
"""Tokens of every text."""


@dataclass(frozen=True)
class Denoiser:
    """A tiny network of one class.

    Attributes:
        config: arguments of the class.
        inputs: arguments of the forward, batch 1, the timestep excepted: a shape or a tensor each.
        structure: contents of the example's JSON file, for arguments of another kind.
        scheduler: class of the scheduler; a flow-matching class where the pipelines use one.
        time_scale: `dilate --time-scale`, where the class does not determine the time.
    """

    config: Mapping[str, Any]
    inputs: Mapping[str, tuple[int, ...] | Tensor]
    structure: Mapping[str, Any] = field(default_factory=dict)
    scheduler: str = "DDIMScheduler"
    time_scale: float | None = None


FLOW = "FlowMatchEulerDiscreteScheduler"


def mask(*shape: int) -> Tensor:
    """A mask of ones, `[1, *shape]`."""
    return torch.ones(1, *shape, dtype=torch.bool)


def padded(tokens: int) -> Tensor:
    """A mask whose last token is padding, `[1, tokens]`."""
    return (torch.arange(tokens) < tokens - 1)[None]


def sizes(*values: float) -> Tensor:
    """Numbers of one sample, `[1, n]`."""
    return torch.tensor([values], dtype=torch.float32)


def grid(side: int, first: int = 0, axes: int = 3) -> Tensor:
    """Positions `[1, side * side, axes]` of a square of image tokens; the last two axes are row and column."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    ids = torch.full((side * side, axes), float(first))
    ids[:, -2], ids[:, -1] = rows.flatten(), columns.flatten()
    return ids[None]


def line(tokens: int, axes: int = 3, axis: int = 0) -> Tensor:
    """Positions `[1, tokens, axes]` of text tokens along one axis."""
    ids = torch.zeros(tokens, axes)
    ids[:, axis] = torch.arange(tokens)
    return ids[None]


UNET3D = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
    "attention_head_dim": 4,
    "layers_per_block": 1,
}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
TEXT_12 = {"encoder_hidden_states": (1, TEXT, 12)}
PACKED = {"hidden_states": (1, 16, 8)}
POSITIONS = {"img_ids": {"$shared": "img_ids"}, "txt_ids": {"$shared": "txt_ids"}}
POSITION_TENSORS = {"img_ids": grid(4), "txt_ids": line(TEXT)}
