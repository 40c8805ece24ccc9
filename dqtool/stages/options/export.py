"""Options of `dqtool export`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from dqtool.errors import UsageError
from dqtool.stages.options.declared import INPUT, Option
from dqtool.stages.options.shared import ARTIFACT, OUTPUT_DIRECTORY

__all__ = ["ExportOptions"]


@dataclass(frozen=True)
class ExportOptions:
    """Options of `dqtool export`."""

    artifact: Annotated[str | None, ARTIFACT] = None
    output: Annotated[str, OUTPUT_DIRECTORY] = "exported"
    format: Annotated[
        str,
        Option(
            "Format of the network: {dqtool.formats:FORMATS}. dq holds packed bits, for diffusers and every runtime of "
            "dqtool. dense holds float weights with quantized values; choose it for diffusers without dqtool. openvino holds "
            "an int8 graph for dqtool's openvino runtime. Choose onnx or compressed-tensors for other programs.",
            "NAME",
            panel=INPUT,
        ),
    ] = "dq"

    def __post_init__(self) -> None:
        """Raise `UsageError` for an unknown format."""
        from dqtool.formats import FORMATS

        if self.format not in FORMATS:
            raise UsageError(
                f"unknown format '{self.format}'", where="--format", fix=f"Choose from {', '.join(FORMATS)}"
            )
