"""Attention of a network on a GPU: both products on int8 codes, with per-step, per-head tables on the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dqtool.nn.attention import OPERANDS, QuantAttnProcessor
from dqtool.nn.integer import IntegerAttention
from dqtool.runtimes.cpu.attention import IntegerAttnProcessor
from dqtool.runtimes.cuda import ops
from dqtool.runtimes.cuda.products import Glue, KeepsDtype

__all__ = ["AttentionTables", "CudaAttnProcessor"]

TABLES = "dqtool_tables"
"""Name of the tables' module in the attention module."""


WIDEST = 512
"""Channels of the widest heads that fit a GPU's registers."""


class AttentionTables(KeepsDtype):
    """The quantizers of an attention module's operands as its kernel reads them.

    `tables` `[T, 4, 3, H]` are multiplier, smallest and largest code of q, k, v and probabilities; `scores` and `results`
    `[T, H]` are the scales of both products. T is 1 if no operand has steps.
    """

    tables: Tensor
    scores: Tensor
    results: Tensor

    def __init__(self, products: IntegerAttention) -> None:
        super().__init__()
        operands = [products.operands[name] for name in OPERANDS]
        steps = max(operand.steps for operand in operands)
        each = [
            torch.stack([o.multipliers(), o.low.float(), o.high.float()], 1).expand(steps, -1, -1) for o in operands
        ]
        q, k, v, probs = (operand.scale for operand in operands)
        self.register_buffer("tables", torch.stack(each, 1).contiguous(), persistent=False)
        self.register_buffer("scores", (q * k).expand(steps, -1).contiguous(), persistent=False)
        self.register_buffer("results", (probs * v).expand(steps, -1).contiguous(), persistent=False)
        self.largest = 2 ** products.operands["probs"].bits - 1

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tensors. Where they are offloaded, a hook fetches them for this call."""
        return self.tables, self.scores, self.results


class CudaAttnProcessor(IntegerAttnProcessor):
    """`IntegerAttnProcessor` on a GPU. Without `products` the two attention products stay float."""

    current_step: Glue

    def __init__(
        self,
        like: QuantAttnProcessor | None = None,
        products: IntegerAttention | None = None,
        glue: Glue | None = None,
    ) -> None:
        if like is None or glue is None:
            super().__init__()
            return
        QuantAttnProcessor.__init__(self, like.bits, like.steps, like.layout)
        self.products, self.current_step = products, glue

    def attend(
        self,
        attn: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """See `QuantAttnProcessor.attend`."""
        scale = self.scale_of(attn) if scale is None else scale
        held = getattr(attn, TABLES, None)
        if held is None or value.shape[3] != query.shape[3] or query.shape[3] > WIDEST:
            return QuantAttnProcessor.attend(self, attn, query, key, value, mask, scale)
        factor = query.shape[3] ** -0.5 if scale is None else float(scale)
        rows = self.current_step.rows_on(query.device)
        return ops.attention(query, key, value, mask, *held(), rows, factor, held.largest)
