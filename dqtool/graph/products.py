"""Calls of `scaled_dot_product_attention`, counted by module while a network is recorded.

Attention modules whose processors dqtool does not know are quantized by intercepting these calls (`nn/products.py`).

A call belongs to the innermost module that was running. A module whose every run makes exactly one such call, and none in
the modules that it runs, can have the operands of its two products quantized whatever surrounds them: rotary embeddings, norms,
several streams, gates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["Calls", "ProductWatch"]


@dataclass
class Calls:
    """Calls of attention products in one forward pass, counted by module.

    `own` counts those of the module itself, `within` also those of the modules that it runs, `runs` the module's runs. `odd` are
    modules with a call whose operands are not `[N, H, S, D]` or that draws dropout.
    """

    own: Counter[str] = field(default_factory=Counter)
    within: Counter[str] = field(default_factory=Counter)
    runs: Counter[str] = field(default_factory=Counter)
    odd: set[str] = field(default_factory=set)

    def single(self, name: str) -> bool:
        """Return whether every run of a module makes one call whose operands can be quantized."""
        count = self.own[name]
        return count > 0 and name not in self.odd and count == self.within[name] == self.runs[name]


class ProductWatch(TorchFunctionMode):
    """Context manager that counts a network's attention calls in `calls`, and calls `see(module, (q, k, v))` each time."""

    def __init__(self, network: nn.Module, see: Callable[[str, tuple[Tensor, Tensor, Tensor]], None]) -> None:
        super().__init__()
        self.calls, self.see = Calls(), see
        self.running: list[str] = []
        for name, module in network.named_modules():
            self._watch(name, module)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Count the call if it is an attention product, then run it."""
        if func is F.scaled_dot_product_attention:
            self._count(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _count(self, query: Tensor, key: Tensor, value: Tensor, *mask: Any, dropout_p: float = 0.0, **_: Any) -> None:
        owner = self.running[-1] if self.running else ""
        self.calls.own[owner] += 1
        self.calls.within.update(set(self.running))
        known = query.dim() == key.dim() == value.dim() == 4 and query.shape[1] % key.shape[1] == 0
        if not known or dropout_p > 0 or any(isinstance(each, float) and each > 0 for each in mask[1:2]):
            self.calls.odd.add(owner)
        self.see(owner, (query, key, value))

    def _watch(self, name: str, module: nn.Module) -> None:
        def enter(_module: nn.Module, _args: Any) -> None:
            self.running.append(name)
            self.calls.runs[name] += 1

        def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
            self.running.pop()

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
