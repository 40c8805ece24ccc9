"""LoRA files as the command line names them: `FILE[:WEIGHT]`. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from dqtool.artifacts import sha256_file
from dqtool.errors import EnvironmentFault, UsageError

__all__ = ["LoraFile", "lora_file"]


@dataclass(frozen=True)
class LoraFile:
    """A LoRA's file, and the factor its change of the weights is multiplied with."""

    path: Path
    weight: float = 1.0

    def sha256(self) -> str:
        """Hex digest of the file."""
        return sha256_file(self.path)


def lora_file(text: str) -> LoraFile:
    """The LoRA that `FILE` or `FILE:WEIGHT` names.

    Raises:
        UsageError: the weight is no finite number.
        EnvironmentFault: there is no such file.
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
