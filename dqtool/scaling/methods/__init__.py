"""The scaling methods (Table 14 and App. H of arXiv 2409.14307), one file each.

All of them divide the input's channels by `s` and multiply the weight's by it, `(W · s)(x / s) = W x` (Eq. 5); they
differ in what they look at. To add a method: write `methods/NAME.py` with a `METHOD`, and add it to the list below.
"""

from __future__ import annotations

from dqtool.errors import UsageError
from dqtool.scaling.methods import auto, awq, dgq, none, omniquant, osplus, smoothquant, wd
from dqtool.scaling.methods.base import Samples, ScalingInput, ScalingMethod, ScalingResult, scale_weight
from dqtool.scaling.methods.output_error import OutputError

__all__ = [
    "SCALINGS",
    "OutputError",
    "Samples",
    "ScalingInput",
    "ScalingMethod",
    "ScalingResult",
    "scale_weight",
    "scaling_method",
]

SCALINGS: dict[str, ScalingMethod] = {
    module.METHOD.name: module.METHOD for module in (wd, none, smoothquant, awq, dgq, osplus, omniquant, auto)
}
"""Every method by its name on the command line."""


def scaling_method(name: str) -> ScalingMethod:
    """Return the method of that name.

    Raises:
        UsageError: there is none; the message lists those there are.
    """
    if name not in SCALINGS:
        raise UsageError(f"There is no scaling {name!r}.", where="--scaling", fix=f"Choose from {', '.join(SCALINGS)}.")
    return SCALINGS[name]
