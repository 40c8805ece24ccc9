"""Temporal Parallel Quantizer (Eq. 22-24): one (scale, zero point) per denoising step, gathered per sample.

The step is passed explicitly: `nn/steps.py` maps the timestep that the sampler gives the model to a row of the tables.
Quantizers do not count calls.
"""

from __future__ import annotations

from torch import Tensor

from dqtool.core.affine import fake_quantize

__all__ = ["gather_rows", "quantize_operand"]


def gather_rows(table: Tensor, rows: Tensor, batch: int) -> Tensor:
    """Return `table[rows]`, `[n, ...]` with `n` 1 or `batch`.

    Rows are repeated where a layer sees each sample several times (classifier-free guidance, video frames). A table of
    one row is a static quantizer.
    """
    if table.shape[0] == 1:
        return table
    if len(rows) not in (1, batch):
        rows = rows.repeat_interleave(batch // len(rows))
    return table[rows.to(table.device)]


def quantize_operand(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    rows: Tensor,
    bits: int,
    low: int = 0,
    divisor: Tensor | None = None,
) -> Tensor:
    """Fake-quantize `x` `[N, ...]` with the tables `scale`, `zero_point` (`[T]`, or `[T, H]` for `[N, H, ...]`)."""
    shape = (-1, *scale.shape[1:], *(1,) * (x.dim() - scale.dim()))
    s = gather_rows(scale, rows, x.shape[0]).view(shape)
    z = gather_rows(zero_point, rows, x.shape[0]).to(s.dtype).view(shape)
    return fake_quantize(x, s, z, bits, low, divisor)
