"""Low-rank branch beside a quantized product: `y = Q(R) Q(x) + up · down x`, with `W = R + up · down`.

The method is SVDQuant (arXiv 2411.05007).

The branch reads the float input, as a LoRA does, so the large directions of the weight meet neither the rounding of weights
nor that of inputs. No engine rounds that input before the branch, so all engines add the same numbers to the same integers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from dqtool.core.dilation import broadcast_scale

__all__ = ["BRANCH", "LowRankBranch", "branch_shapes", "merge_branches"]

BRANCH = "low_rank"
"""Name of the branch in its layer: the file holds `X.low_rank.down` and `X.low_rank.up`."""


class LowRankBranch(nn.Module):
    """The linear map `up · down` of a layer's float input, with the geometry of the layer.

    `down` is `[r, C_in, kh, kw]` or `[r, C_in]`, `up` is `[C_out, r]`. Both are float16 in files; the branch computes in
    float32. The input's dilation is part of `down`.
    """

    down: Tensor
    up: Tensor

    def __init__(self, down: Tensor, up: Tensor, geometry: tuple[Any, ...] | None = None) -> None:
        """Make an empty branch; `geometry` is (stride, padding, dilation) of a convolution, None for a linear layer."""
        super().__init__()
        self.geometry = geometry
        self.register_buffer("down", down)
        self.register_buffer("up", up)

    def forward(self, x: Tensor) -> Tensor:
        """Return the branch's part of the layer's output for its input `[N, C, H, W]` or `[..., C]`, float32."""
        x, down, up = x.float(), self.down.float(), self.up.float()
        if self.geometry is None:
            return F.linear(F.linear(x, down), up)
        with full_float32() if x.is_cuda and not is_compiling() else nullcontext():
            return F.conv2d(F.conv2d(x, down, None, *self.geometry), up[:, :, None, None])

    def weight(self, dilation: Tensor | None = None) -> Tensor:
        """Return `up · down` in the shape of the layer's weight, times `dilation` `[C_in]` if there is one; float32."""
        down = self.down.float()
        if dilation is not None:
            down = down * broadcast_scale(dilation, down, 1)
        return (self.up.float() @ down.flatten(1)).view(-1, *down.shape[1:])

    def widened(self) -> LowRankBranch:
        """Return the branch with float32 tensors, for engines that compute often."""
        return LowRankBranch(self.down.float(), self.up.float(), self.geometry)

    def extra_repr(self) -> str:
        """Return the text that `print(model)` shows."""
        return f"rank={self.down.shape[0]}"


@contextmanager
def full_float32() -> Iterator[None]:
    """Let convolutions on CUDA devices keep all digits of float32 inside: PyTorch rounds them to TensorFloat-32 by default."""
    kept = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = kept


def branch_shapes(shape: tuple[int, ...], rank: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shape and dtype of the branch's tensors in the packed form, by name in the layer; none for rank 0."""
    if not rank:
        return {}
    return {f"{BRANCH}.down": ((rank, *shape[1:]), "float16"), f"{BRANCH}.up": ((shape[0], rank), "float16")}


def merge_branches(branches: Sequence[LowRankBranch | None], outputs: Sequence[int]) -> LowRankBranch | None:
    """Return the branch of linear layers merged side by side, with `outputs` channels each; None where none has one."""
    found = [branch for branch in branches if branch is not None]
    if not found:
        return None
    ups = [
        found[0].up.new_zeros((count, 0), dtype=torch.float32) if branch is None else branch.up.float()
        for branch, count in zip(branches, outputs, strict=True)
    ]
    return LowRankBranch(torch.cat([branch.down.float() for branch in found]), torch.block_diag(*ups))
