"""Grouped Hadamard rotation of the input (QuaRot, arXiv 2404.00456), where it lowers the error of the layer's output.

The channels of a linear layer or a convolution are rotated in groups of 16, 32 or 64 before their quantizer, and the weight is
rotated along. Outliers of a channel spread over its group. The rotation runs with the network, so it costs time.
"""

from __future__ import annotations

from dataclasses import replace

from dqtool.core.rotation import fitting_sizes
from dqtool.scaling.methods.base import ScalingInput, ScalingMethod, ScalingResult
from dqtool.scaling.methods.none import none
from dqtool.scaling.methods.output_error import OutputError

__all__ = ["METHOD", "rotation"]


def rotation(inputs: ScalingInput) -> ScalingResult:
    """Return the group size of least output error at the layer's bits, or no rotation where none is better."""
    plain = none(inputs)
    sizes = fitting_sizes(inputs.channels, inputs.groups)
    return min([plain, *(replace(plain, rotation=size) for size in sizes)], key=OutputError(inputs))


METHOD = ScalingMethod("rotation", rotation, needs_samples=True)
