"""Where networks compute: one choice for the process, made by a stage as it starts.

Files, trajectories, conditions and what is kept between blocks stay in main memory. A network goes to the device when a
stage builds it (`place`), and whatever it is given follows it there (`to_device_of`). Random numbers are drawn on the CPU, so
that a seed means the same noise on every device.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, TypeVar

from dqtool.errors import EnvironmentFault

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = [
    "choose_device",
    "device_of",
    "peak_bytes",
    "place",
    "resolve_device",
    "restart_peak",
    "to_cpu",
    "to_device_of",
]

T = TypeVar("T")
Module = TypeVar("Module", bound="nn.Module")

_chosen: torch.device | None = None


def choose_device(text: str) -> torch.device:
    """Compute on the device that `text` (auto, cpu, cuda, cuda:N) names, from here on.

    Raises:
        EnvironmentFault: this machine has no such device.
    """
    global _chosen
    _chosen = resolve_device(text)
    return _chosen


def resolve_device(text: str) -> torch.device:
    """The device meant; `auto` is the first CUDA device where there is one. Makes CUDA compute in full float32.

    Raises:
        EnvironmentFault: this machine has no such device.
    """
    import torch

    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text == "cpu" or (text == "auto" and not there):
        return torch.device("cpu")
    device = torch.device("cuda", 0) if text in ("auto", "cuda") else torch.device(text)
    if not there or (device.index or 0) >= there:
        found = f"{there} CUDA device{'s' * (there != 1)}" if torch.backends.cuda.is_built() else "no build for CUDA"
        raise EnvironmentFault(
            f"There is no device {text} here: this PyTorch has {found}",
            where="--device",
            fix="Use --device cpu or auto, or install a PyTorch for CUDA",
        )
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or products differ from run to run
    # TensorFloat-32 keeps 10 bits of each factor: no reference for quantized codes.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return device


def place(module: Module) -> Module:
    """`module`, moved to the device that was chosen (the CPU before any choice)."""
    return module if _chosen is None or _chosen.type == "cpu" else module.to(_chosen)


def restart_peak(device: torch.device) -> None:
    """Measure `peak_bytes` from here on."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> dict[str, int]:
    """`peak_device_bytes`, the most that tensors took on a CUDA device since `restart_peak`; nothing elsewhere."""
    import torch

    return {"peak_device_bytes": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}


def device_of(module: nn.Module) -> torch.device:
    """Where a network's weights are; the CPU for one that shows none."""
    import torch

    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def to_device_of(module: nn.Module, values: T) -> T:
    """`values` (a tensor, or lists, tuples and dicts of them) where the network is."""
    return _moved(values, device_of(module))


def to_cpu(values: T) -> T:
    """`values` in main memory."""
    import torch

    return _moved(values, torch.device("cpu"))


def _moved(values: Any, device: torch.device) -> Any:
    from torch import Tensor
    from torch.utils._pytree import tree_map

    return tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, values)
