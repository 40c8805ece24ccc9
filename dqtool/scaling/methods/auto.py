"""The best of several methods, layer by layer, by the error of the layer's output."""

from __future__ import annotations

from dataclasses import replace

import torch

from dqtool.scaling.methods.base import ScalingInput, ScalingMethod, ScalingResult
from dqtool.scaling.methods.none import none
from dqtool.scaling.methods.output_error import OutputError
from dqtool.scaling.methods.smoothquant import smoothquant
from dqtool.scaling.methods.wd import wd

__all__ = ["METHOD", "auto"]

STRENGTHS = (0.25, 0.5, 0.75, 1.0)
"""Values of SmoothQuant's α that are tried: 1 gives all channels of the input the same range, 0 those of the weight."""

LEARNING_RATE = 3e-3
"""Learning rate of the log scales in `distill`."""


def auto(inputs: ScalingInput) -> ScalingResult:
    """Return the candidate with the least output error at the layer's bits; the first of equals.

    Candidates are no scaling, the factors that the layer has now, Weight Dilation and SmoothQuant at several strengths;
    if the input can be shifted, also no scaling and SmoothQuant around the channels' midpoints. `distill` learns the
    factors further.
    """
    results = [replace(none(inputs), method="none")]
    if inputs.present is not None:
        results.append(inputs.present)
    if inputs.present is None or inputs.present.method != "wd":
        results.append(replace(wd(inputs), method="wd"))
    results += [replace(smoothquant(inputs, alpha), method="smoothquant") for alpha in STRENGTHS]
    if inputs.shiftable:
        shift = inputs.midpoint()
        centred = inputs.shifted(shift)
        results.append(replace(none(centred), shift=shift, method="none"))
        results += [replace(smoothquant(centred, alpha), shift=shift, method="smoothquant") for alpha in STRENGTHS]
    wrong = [result for result in results if not bool(torch.isfinite(result.scale).all())]
    return wrong[0] if wrong else min(results, key=OutputError(inputs))  # the caller's check finds it


METHOD = ScalingMethod(
    "auto", auto, needs_statistics=True, needs_samples=True, shifts=True, learning_rate=LEARNING_RATE
)
