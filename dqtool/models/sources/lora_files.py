"""LoRA files as given on the command line, `FILE[:WEIGHT]`. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from dqtool.artifacts import sha256_file
from dqtool.errors import EnvironmentFault, UsageError

__all__ = ["LoraFile", "lora_file"]


@dataclass(frozen=True)
class LoraFile:
    """Path of a LoRA's file, and the factor of its change to the weights."""

    path: Path
    weight: float = 1.0

    def sha256(self) -> str:
        """Return the hex digest of the file."""
        return sha256_file(self.path)


def lora_file(text: str) -> LoraFile:
    """Parse `FILE` or `FILE:WEIGHT`.

    Raises:
        UsageError: the weight is no finite number.
        EnvironmentFault: the file does not exist.
    """
    name, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        name, weight = text, "1"
    try:
        factor = float(weight)
    except ValueError:
        factor = math.nan
    if not math.isfinite(factor):
        raise UsageError(f"'{weight}' is no weight of a LoRA", where=f"--lora {text}", fix="Write --lora FILE:0.8")
    if not Path(name).is_file():
        raise EnvironmentFault("There is no such LoRA file", where=name, fix="Give a .safetensors file with --lora")
    return LoraFile(Path(name), factor)
