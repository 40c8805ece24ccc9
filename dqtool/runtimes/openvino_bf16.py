"""OpenVINO with bf16 around the int8 products, for CPUs with bf16 instructions (AMX, AVX512-BF16).

It is faster, and some codes differ: a bf16 number has 8 bits of precision, and rounding to it before quantization moves some
values across a threshold, more of them at more bits. `auto` therefore never selects it. `dqtool eval DIR --runtime
openvino-bf16 --reference DIR` reports the error.
"""

from __future__ import annotations

from torch import nn

from dqtool.artifacts import Artifact
from dqtool.runtimes import openvino
from dqtool.runtimes.openvino import integer_report

__all__ = ["available", "integer_report", "load"]


def available() -> str | None:
    """Return the reason why this runtime can't run here, or None."""
    reason = openvino.available()
    if reason is not None:
        return reason
    from openvino import Core

    if "BF16" not in Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return "the processor has no bf16 instructions (AVX512-BF16 or AMX)"
    return None


def load(artifact: Artifact) -> nn.Module:
    """Load the network of an exported directory, of format `dq` or `openvino`.

    Raises:
        EnvironmentFault: OpenVINO is not installed.
    """
    return openvino.load(artifact, "bf16")
