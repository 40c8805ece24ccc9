"""Compilation of the kernels for a GPU, on a machine without one: what the interpreter can't check.

Launches inside of `compiled_for` compile and do not run. Triton's own compiler and assembler do the work; only the driver, which
needs a GPU, is a stand-in.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["Compiled", "compiled_for"]


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel: its name, bytes of shared memory, matrix instructions in its source, registers of a thread, and bytes
    of registers that went to memory."""

    name: str
    shared: int
    instructions: str
    registers: int
    spilled: int


class _Driver:
    """Answers the questions that Triton asks a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return int(self.target.arch)  # kernels are cached for each device

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextlib.contextmanager
def compiled_for(capability: int) -> Iterator[list[Compiled]]:
    """Compile every launch for GPUs of this compute capability (90 for 9.0); yields the list that gains the compiled kernels.

    `TRITON_INTERPRET` must not be set: kernels would be functions of the interpreter.
    """
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    made: list[Compiled] = []

    def getitem(kernel: Any, grid: Any) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            made.append(_described(kernel.__name__, kernel.run(*arguments, grid=grid, warmup=True, **options)))

        return launch

    before: Any = JITFunction.__getitem__
    # None before the first use: asking for `active` would look for a GPU. Triton 3.4 has no `_active`, and does not look.
    before_driver: Any = driver._active if hasattr(driver, "_active") else driver.active
    JITFunction.__getitem__ = getitem
    driver.set_active(_Driver(capability))
    try:
        yield made
    finally:
        JITFunction.__getitem__ = before
        driver.set_active(before_driver)


def _described(name: str, kernel: Any) -> Compiled:
    text: str = kernel.asm["ptx"]
    kinds = {"wgmma": text.count("wgmma.mma_async"), "mma": len(re.findall(r"\bmma\.sync", text))}
    found = next((f"{count} {kind}" for kind, count in kinds.items() if count), "none")
    registers, spilled = _resources(kernel.asm["cubin"])
    return Compiled(name, int(kernel.metadata.shared), found, registers, spilled)


def _resources(binary: bytes) -> tuple[int, int]:
    """Return registers and bytes of stack and local memory of a thread, as NVIDIA's tool reads them; (0, 0) without it."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.is_file():
        return 0, 0
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=False).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", said)
    return (int(match[1]), int(match[2]) + int(match[3])) if match else (0, 0)
