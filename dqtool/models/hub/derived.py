"""Networks of diffusers that start from a denoiser's weights, such as `ControlNetModel.from_unet`.

Their constructors copy the state of single modules, which a quantized network has in other forms. They get a float copy.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

__all__ = ["copy_float_weights"]

CONSTRUCTORS = ("from_unet", "from_unet2d", "from_transformer")


def copy_float_weights(module: ModuleType) -> None:
    """Make the constructors of the classes in `module` take quantized networks, as float copies. Idempotent."""
    for cls in list(vars(module).values()):
        if isinstance(cls, type) and cls.__module__ == module.__name__:
            for name in CONSTRUCTORS:
                found = vars(cls).get(name)
                if isinstance(found, classmethod) and not hasattr(found.__func__, "_dqtool"):
                    setattr(cls, name, classmethod(_on_float_copies(found.__func__)))


def _on_float_copies(make: Any) -> Any:
    @functools.wraps(make)
    def made(cls: type, *args: Any, **kwargs: Any) -> Any:
        return make(cls, *map(_float, args), **{name: _float(value) for name, value in kwargs.items()})

    made._dqtool = True  # type: ignore[attr-defined]
    return made


def _float(value: Any) -> Any:
    if "_dqtool_origin" not in getattr(value, "__dict__", {}):
        return value
    from dqtool.models.network_methods import float_copy

    return float_copy(value)
