"""The scaling methods (Table 14 and App. H of arXiv 2409.14307), one file each.

Most divide the input's channels by `s` and multiply the weight's by it, `(W · s)(x / s) = W x` (Eq. 5), and differ in what
they look at. `rotation` rotates both instead. To add a method: write `methods/NAME.py` with a `METHOD`, and add it to the list below.
"""

from __future__ import annotations

from dqtool.errors import UsageError
from dqtool.scaling.methods import auto, awq, dgq, none, omniquant, osplus, rotation, smoothquant, wd
from dqtool.scaling.methods.base import Samples, ScalingInput, ScalingMethod, ScalingResult, scale_weight
from dqtool.scaling.methods.output_error import OutputError

__all__ = [
    "METHODS",
    "OutputError",
    "Samples",
    "ScalingInput",
    "ScalingMethod",
    "ScalingResult",
    "check_activation_method",
    "check_weight_method",
    "scale_weight",
    "scaling_method",
]

METHODS: dict[str, ScalingMethod] = {
    module.METHOD.name: module.METHOD for module in (wd, none, smoothquant, awq, dgq, osplus, omniquant, rotation, auto)
}
"""Every method by its name on the command line."""


def scaling_method(name: str) -> ScalingMethod:
    """Return the method of that name.

    Raises:
        UsageError: there is none; the message lists those there are.
    """
    if name not in METHODS:
        raise UsageError(f"There is no scaling '{name}'", where="--scaling", fix=f"Choose from {', '.join(METHODS)}")
    return METHODS[name]


def check_weight_method(name: str) -> None:
    """Raise `UsageError` unless `name` is a method that needs weights alone, so that `dilate` can run it."""
    offered = ", ".join(method.name for method in METHODS.values() if not method.needs_activations)
    if name in METHODS and METHODS[name].needs_activations:
        raise UsageError(
            f"The scaling {name} looks at activations, which dilate does not see",
            where=f"--scaling {name}",
            fix=f"Run `dqtool dilate`, then `dqtool calibrate --scaling {name}`",
        )
    if name not in METHODS:
        raise UsageError(f"There is no scaling '{name}'", where="--scaling", fix=f"Choose from {offered}")


def check_activation_method(name: str) -> None:
    """Raise `UsageError` unless `name` is a method for `calibrate`: one that needs activations, or `none`."""
    offered = ", ".join(["keep", *(m.name for m in METHODS.values() if m.needs_activations or m.name == "none")])
    if name in METHODS and not (METHODS[name].needs_activations or name == "none"):
        raise UsageError(
            f"The scaling {name} needs weights alone, so dilate applies it",
            where=f"--scaling {name}",
            fix=f"Run `dqtool dilate --scaling {name}`, then `dqtool calibrate --scaling keep`",
        )
    if name not in METHODS:
        raise UsageError(f"There is no scaling '{name}'", where="--scaling", fix=f"Choose from {offered}")
