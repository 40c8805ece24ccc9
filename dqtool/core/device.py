"""Choice of the device that networks compute on, made once for the process when a stage starts.

Files, trajectories, conditions and outputs of blocks stay in main memory. A stage places a network on the device when
it builds it (`place`), and inputs follow the network (`to_device_of`). Random numbers are drawn on the CPU, so that a
seed gives the same noise on every device.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TypeVar

from dqtool import distributed
from dqtool.errors import EnvironmentFault, UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = [
    "asked_teacher",
    "choose_device",
    "chosen_device",
    "device_of",
    "gpu_wanted",
    "peak_bytes",
    "pick",
    "place",
    "resolve_device",
    "restart_peak",
    "teacher_parameters",
    "to_cpu",
    "to_device",
    "to_device_of",
]

T = TypeVar("T")
Module = TypeVar("Module", bound="nn.Module")

TEACHER = "DQTOOL_TEACHER"
"""Environment variable with the precision in which the float network samples: auto (measured on a GPU, float32 on the CPU), float32,
float16 or bfloat16."""

TEACHERS = ("auto", "float32", "float16", "bfloat16")

_chosen: torch.device | None = None


def choose_device(text: str) -> torch.device:
    """Choose the device named by `text` (auto, cpu, cuda, cuda:N) for this process and return it.

    Raises:
        EnvironmentFault: this machine has no such device.
    """
    global _chosen
    _chosen = resolve_device(text)
    if _chosen.type == "cuda":
        import torch

        torch.cuda.set_device(_chosen)  # events, streams and graphs belong to the current device
    return _chosen


def resolve_device(text: str) -> torch.device:
    """Return the device named by `text` and make CUDA compute in full float32. `auto` is the first CUDA device, or else
    the CPU. Processes of one command take a device each.

    Raises:
        EnvironmentFault: this machine has no such device.
        UsageError: several processes share the command, and `text` names one device.
    """
    import torch

    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text == "cpu" or (text == "auto" and not there):
        return torch.device("cpu")
    mine = distributed.local_rank() % max(1, there)
    device = torch.device("cuda", mine) if text in ("auto", "cuda") else torch.device(text)
    if device.index is not None and text.startswith("cuda:") and distributed.world_size() > 1:
        raise UsageError(
            "Several processes take a GPU each, and one is named for all",
            where=f"--device {text}",
            fix="Give cuda or auto, and choose GPUs by CUDA_VISIBLE_DEVICES",
        )
    if not there or (device.index or 0) >= there:
        found = f"{there} CUDA device{'s' * (there != 1)}" if torch.backends.cuda.is_built() else "no build for CUDA"
        raise EnvironmentFault(
            f"There is no device {text} here: this PyTorch has {found}",
            where="--device",
            fix="Use --device cpu or auto, or install a PyTorch for CUDA",
        )
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS products differ from run to run
    # TensorFloat-32 keeps 10 bits of each factor, too few for a reference of quantized codes.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return device


def chosen_device() -> torch.device:
    """Return the device of this process: the CPU before any choice."""
    import torch

    return torch.device("cpu") if _chosen is None else _chosen


def gpu_wanted() -> bool:
    """Return whether a network whose device nobody named goes to a GPU: there is one, and the process has not chosen another."""
    import torch

    return (_chosen is None or _chosen.type == "cuda") and torch.cuda.is_available()


def asked_teacher() -> str:
    """Return the precision that `$DQTOOL_TEACHER` asks for, one of `TEACHERS`.

    Raises:
        UsageError: it is none of them.
    """
    asked = os.environ.get(TEACHER) or "auto"
    if asked not in TEACHERS:
        raise UsageError(f"'{asked}' is no precision", where=TEACHER, fix=f"Choose from {', '.join(TEACHERS)}")
    return asked


def teacher_parameters() -> dict[str, str]:
    """Return what a stage's parameters record of a precision that was asked for; empty for `auto`."""
    asked = asked_teacher()
    return {} if asked == "auto" else {"teacher": asked}


def place(module: Module) -> Module:
    """Move `module` to the chosen device (the CPU before any choice) and return it."""
    return module if _chosen is None or _chosen.type == "cpu" else module.to(_chosen)


def restart_peak(device: torch.device) -> None:
    """Start a new measurement of `peak_bytes`."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> dict[str, int]:
    """Return `{"peak_device_bytes": n}`, the most memory that tensors took on a CUDA device since `restart_peak`; empty
    on the CPU."""
    import torch

    return {"peak_device_bytes": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}


def device_of(module: nn.Module) -> torch.device:
    """Return the device of a network's weights; the CPU for a network without any."""
    import torch

    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on a device. A copy from main memory to a GPU takes its turn there, and nobody waits for it."""
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    if 0 in x.stride():  # an expanded tensor, which pinned memory can't take
        x = x.contiguous()
    return x.pin_memory().to(device, non_blocking=True)  # PyTorch keeps the pinned memory until the copy is done


def pick(values: torch.Tensor, rows: torch.Tensor | slice) -> torch.Tensor:
    """Return `values[rows]`. Indices in main memory move to the device of the values first, and nobody waits for them."""
    return values[rows if isinstance(rows, slice) else to_device(rows, values.device)]


def to_device_of(module: nn.Module, values: T) -> T:
    """Return `values` (a tensor, or lists, tuples and dicts of tensors) on the device of `module`."""
    return _moved(values, device_of(module))


def to_cpu(values: T) -> T:
    """Return `values` (a tensor, or lists, tuples and dicts of tensors) in main memory."""
    import torch

    return _moved(values, torch.device("cpu"))


def _moved(values: T, device: torch.device) -> T:
    """Return `values` with every tensor moved to `device`."""
    from torch import Tensor
    from torch.utils._pytree import tree_map

    moved: T = tree_map(lambda v: to_device(v, device) if isinstance(v, Tensor) else v, values)
    return moved
