"""The equivalent scalings Weight Dilation is compared with (Table 14 and App. H of arXiv 2409.14307), as a registry.

All of them divide the input's channels by `s` and multiply the weight's by it, `(W · s)(x / s) = W x` (Eq. 5); they
differ in what they look at. A method is one registered function in a module that is imported here:

    @register("mine", needs_statistics=True)
    def mine(inputs: ScalingInput) -> ScalingResult: ...
"""

from dqtool.scaling.methods.base import (
    SCALINGS,
    Samples,
    ScalingInput,
    ScalingMethod,
    ScalingResult,
    register,
    scale_weight,
    scaling_method,
)
from dqtool.scaling.methods.closed_form import awq, dgq, none, smoothquant, wd
from dqtool.scaling.methods.omniquant import omniquant
from dqtool.scaling.methods.output_error import OutputError
from dqtool.scaling.methods.searched import auto, osplus

__all__ = [
    "SCALINGS",
    "OutputError",
    "Samples",
    "ScalingInput",
    "ScalingMethod",
    "ScalingResult",
    "auto",
    "awq",
    "dgq",
    "none",
    "omniquant",
    "osplus",
    "register",
    "scale_weight",
    "scaling_method",
    "smoothquant",
    "wd",
]
