"""A device of its own to test placement with, where there is no GPU: its tensors live in main memory, but whatever mixes
them with the CPU's raises, as a GPU would. PyTorch's hooks for devices written in Python carry it.

Imported only in a process of its own: a device can't be taken back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

__all__ = ["DEVICE", "Fenced"]

_setup_privateuseone_for_python_backend("fenced")
DEVICE = torch.device("fenced", 0)


class Fenced(Tensor):
    """A tensor of the device; `held` is where its numbers are."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, requires_grad: bool = False) -> Fenced:
        return Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
            requires_grad=requires_grad,
        )

    def __init__(self, held: Tensor, requires_grad: bool = False) -> None:
        self.held = held

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """Data of a parameter. An assignment replaces it, as in optimizers with one flat buffer."""
        return self.detach()

    @data.setter
    def data(self, value: Fenced) -> None:
        self.held = value.held

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Fenced({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation on the numbers, after a look at where its operands are."""
    name = func._schema.name
    here = any(isinstance(x, Fenced) for x in tree_leaves((args, kwargs)))
    target = kwargs.get("device")
    if name == "aten::_to_copy":
        out = func(unwrapped(args[0]), **{k: v for k, v in kwargs.items() if k != "device"})
        if out is unwrapped(args[0]):
            out = out.clone()
        away = target is not None and torch.device(target).type != DEVICE.type
        return out if away else Fenced(out)
    if name in ("aten::copy_", "aten::_foreach_copy_"):
        func(unwrapped(args[0]), unwrapped(args[1]), *args[2:])
        return args[0]
    if name in ("aten::_local_scalar_dense", "aten::equal", "aten::is_same_size"):
        return func(*unwrapped(args), **unwrapped(kwargs))
    # CUDA accepts numbers from anywhere and indices from the CPU, nothing else.
    indices = args[1] if name in ("aten::index.Tensor", "aten::index", "aten::index_put_", "aten::index_put") else ()
    free = {id(x) for x in tree_leaves(indices)}
    for x in tree_leaves((args, kwargs)):
        if isinstance(x, Tensor) and not isinstance(x, Fenced) and x.dim() and here and id(x) not in free:
            raise RuntimeError(
                f"{name}: expected all tensors to be on {DEVICE}, found one {tuple(x.shape)} on {x.device}"
            )
    rest = {k: v for k, v in kwargs.items() if k != "device"}
    out = func(*unwrapped(args), **unwrapped(rest))
    if func._schema.is_mutable:
        return in_place(func, args, kwargs, out)
    fence = (here and target is None) or (target is not None and torch.device(target).type == DEVICE.type)
    return tree_map_only(Tensor, Fenced, out) if fence else out


def in_place(func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> Any:
    """Return the operands that an operation writes into, as the operation itself does."""
    written = [
        kwargs.get(a.name, args[i] if i < len(args) else None)
        for i, a in enumerate(func._schema.arguments)
        if a.alias_info is not None and a.alias_info.is_write
    ]
    if len(func._schema.returns) == 0:
        return None
    if len(func._schema.returns) == 1:
        return written[0] if isinstance(out, Tensor) else out
    return tuple(written) if len(written) == len(out) else tree_map_only(Tensor, Fenced, out)


def unwrapped(values: Any) -> Any:
    """The numbers of the device's tensors."""
    return tree_map(lambda x: x.held if isinstance(x, Fenced) else x, values)


_library = torch.library.Library("_", "IMPL")
_library.fallback(lambda func, *args, **kwargs: run(func, args, kwargs), "PrivateUse1")
