"""LoRA on quantized networks through peft, as diffusers loads it: a float branch beside each quantized product.

peft puts its own module around a layer that it knows by class. Every `LoraConfig` is told, when it is made, which one that is
for dqtool's layers: `load_lora_weights`, `set_adapters`, `unload_lora_weights` and hot swaps then work as on float networks.
The quantized weight is never changed, so that a network without its adapters is the one it was before. What would change it
is refused: `fuse_lora`, and adapters that are no branch (DoRA).
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from torch import nn

from dqtool.errors import UsageError
from dqtool.nn.adaptable import Adaptable, float_twin

__all__ = ["refuse_lokr", "register"]

WHERE = "LoRA on a quantized network"
MERGE = "Merge the LoRA before quantization: `dqtool dilate MODEL --lora FILE`"


def register(config: ModuleType) -> None:
    """Tell `peft.tuners.lora.config.LoraConfig` of dqtool's layers."""
    made = config.LoraConfig.__post_init__
    if getattr(made, "_dqtool", False):
        return

    @functools.wraps(made)
    def post_init(self: Any) -> None:
        made(self)
        self._register_custom_module({Adaptable: _wrap})

    post_init._dqtool = True  # type: ignore[attr-defined]
    config.LoraConfig.__post_init__ = post_init


def refuse_lokr(model: ModuleType) -> None:
    """Let `peft.tuners.lokr.model.LoKrModel` say of dqtool's layers why it can't change them."""
    made = model.LoKrModel._create_and_replace
    if getattr(made, "_dqtool", False):
        return

    @functools.wraps(made)
    def create(self: Any, config: Any, adapter_name: str, target: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(target, Adaptable):
            raise UsageError(
                "LoKr changes the weight, which is quantized", where=WHERE, fix="Use a LoRA of plain branches"
            )
        made(self, config, adapter_name, target, *args, **kwargs)

    create._dqtool = True  # type: ignore[attr-defined]
    model.LoKrModel._create_and_replace = create


def _wrap(layer: Any, adapter_name: str, **kwargs: Any) -> nn.Module:
    """peft's module around a quantized layer."""
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    kind = _wrappers()["kernel_size" in base.geometry_of_float()]
    wrapper: nn.Module = kind(layer, adapter_name, **kwargs)
    return wrapper


@functools.cache
def _wrappers() -> tuple[type[nn.Module], type[nn.Module]]:
    """peft's classes for linear layers and convolutions, for a base layer that is quantized."""
    from peft.tuners.lora.layer import Conv2d, Linear

    return _quantized(Linear), _quantized(Conv2d)


def _quantized(kind: Any) -> type[nn.Module]:
    class Branch(kind):  # type: ignore[misc]
        """A quantized layer and its float branches."""

        def __init__(self, layer: Any, adapter_name: str, **kwargs: Any) -> None:
            super().__init__(float_twin(layer), adapter_name, **kwargs)
            self.base_layer = layer

        def update_layer(self, *args: Any, **kwargs: Any) -> None:
            """Add a branch, whose shapes peft reads from a float layer."""
            layer = self.base_layer
            if isinstance(layer, Adaptable):
                self.base_layer = float_twin(layer)
            try:
                super().update_layer(*args, **kwargs)
            finally:
                self.base_layer = layer

        def resolve_lora_variant(self, *, config: Any, **kwargs: Any) -> None:
            """Refuse what is no branch."""
            if config.use_dora:
                raise UsageError("DoRA scales the weight, which is quantized", where=WHERE, fix=MERGE)
            found = super().resolve_lora_variant(config=config, **kwargs)
            if found is not None:
                raise UsageError(
                    f"{type(found).__name__} is no low-rank branch beside the layer", where=WHERE, fix="Use plain LoRA"
                )

        def merge(self, *_: Any, **__: Any) -> None:
            """Refuse."""
            raise UsageError(
                "A quantized weight can't take up a LoRA, which would not survive its rounding",
                where="fuse_lora",
                fix=f"Leave it unfused: it is computed beside the layers. {MERGE}",
            )

    Branch.__name__ = Branch.__qualname__ = f"Quantized{kind.__name__}"
    return Branch
