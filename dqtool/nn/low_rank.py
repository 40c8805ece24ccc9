"""Fit of low-rank branches to weights (SVDQuant, arXiv 2411.05007)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dqtool.artifacts.checkpoints import Checkpoints
from dqtool.core.affine import fake_quantize, search_weight
from dqtool.core.device import to_cpu
from dqtool.nn.assignment import LayerPlan
from dqtool.nn.branch import LowRankBranch
from dqtool.nn.layers import FakeQuantLayer

__all__ = ["attach_low_rank", "split_weight"]

ROUNDS = 4
"""Times that the branch is fitted to what rounding leaves; the best fit is kept."""

CANDIDATES = 20
"""Shrink factors tried for the range of a residual: fewer than its quantizer gets, the same in every round."""


def attach_low_rank(network: nn.Module, plans: Iterable[LayerPlan], checkpoints: Checkpoints | None = None) -> None:
    """Give the planned layers their branches, in place: their weights become the residuals that are quantized.

    Large networks take minutes: `checkpoints` keeps the branches of layers, so that an interrupted run goes on from them.
    """
    known = {} if checkpoints is None else checkpoints.found
    for index, plan in enumerate(plan for plan in plans if plan.low_rank):
        layer = network.get_submodule(plan.info.name)
        assert isinstance(layer, FakeQuantLayer)
        found = known.get(index)
        if found is None:
            down, up = split_weight(layer.weight.detach(), layer.dilation, plan.low_rank, layer.bits.weight)
            if checkpoints is not None:
                checkpoints.add(index, to_cpu({"down": down, "up": up}))
        else:
            down, up = (found[name].to(layer.weight.device) for name in ("down", "up"))
        layer.low_rank = LowRankBranch(down, up, layer.geometry)
        with torch.no_grad():
            layer.weight.sub_(layer.low_rank.weight(layer.dilation))


def split_weight(weight: Tensor, dilation: Tensor | None, rank: int, bits: int) -> tuple[Tensor, Tensor]:
    """Return `down` and `up`, float16, of the branch that leaves the residual of least rounding error.

    Starts from the truncated SVD of the dilated weight (section 4.2 of the paper). Further rounds fit the branch to the
    weight minus the rounded residual, as LoftQ (arXiv 2310.08659) does.
    """
    rows, target = weight.flatten(1), weight.float().flatten(1)
    best: tuple[float, Tensor, Tensor] | None = None
    for _round in range(ROUNDS):
        down, up = _truncated(target, rank)
        if dilation is not None:
            down = down / _per_entry(dilation, weight)
        size = (down.abs().amax(1).clamp(min=1e-30) / up.abs().amax(0).clamp(min=1e-30)).sqrt()  # equal ranges
        down, up = (down / size[:, None]).half(), (up * size).half()
        kept = down.float() if dilation is None else down.float() * _per_entry(dilation, weight)
        residual = rows - up.float() @ kept
        rounded = _rounded(residual, bits)
        error = float((residual - rounded).square().sum())
        if best is None or error < best[0]:
            best = error, down, up
        target = rows - rounded
    assert best is not None
    return best[1].view(rank, *weight.shape[1:]), best[2]


def _truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return `(down, up)` with `up · down` the nearest matrix of this rank, from the eigenvectors of the smaller Gram matrix."""
    exact = matrix.double()
    tall = exact.shape[0] > exact.shape[1]
    exact = exact.T if tall else exact
    vectors = torch.linalg.eigh(exact @ exact.T).eigenvectors[:, -rank:]
    left, right = vectors.float(), (vectors.T @ exact).float()
    return (left.T, right.T) if tall else (right, left)


def _rounded(residual: Tensor, bits: int) -> Tensor:
    scale, zero_point = search_weight(residual, bits, symmetric=False, candidates=CANDIDATES)
    return fake_quantize(residual, scale[:, None], zero_point[:, None], bits, 0)


def _per_entry(dilation: Tensor, weight: Tensor) -> Tensor:
    """Return the dilation `[C_in]` of each column of a flattened weight, `[C_in · taps]`."""
    return dilation.repeat_interleave(weight[0, 0].numel())
