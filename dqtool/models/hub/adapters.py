"""LoRA on quantized networks through peft and diffusers: a float branch is added to each quantized product.

peft wraps a layer by its class in a module of its own. `register` adds the wrappers of dqtool's layers to every
`LoraConfig`, so that `load_lora_weights`, `set_adapters`, `unload_lora_weights` and hot swaps work as on float networks.
Quantized weights never change, so unloading an adapter restores the network exactly. Operations that would change them are
refused: `fuse_lora`, and adapters that are no low-rank branch (DoRA).
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
    """Register dqtool's layers with every new `LoraConfig` of `peft.tuners.lora.config`."""
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
    """Make `LoKrModel` of `peft.tuners.lokr.model` raise `UsageError` on dqtool's layers, whose weights it can't change."""
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
    """Return peft's wrapper of a quantized layer."""
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    kind = _wrappers()["kernel_size" in base.geometry_of_float()]
    wrapper: nn.Module = kind(layer, adapter_name, **kwargs)
    return wrapper


@functools.cache
def _wrappers() -> tuple[type[nn.Module], type[nn.Module]]:
    """Return peft's wrapper classes for quantized linear layers and convolutions."""
    from peft.tuners.lora.layer import Conv2d, Linear

    return _quantized(Linear), _quantized(Conv2d)


def _quantized(kind: Any) -> type[nn.Module]:
    class Branch(kind):  # type: ignore[misc]
        """A quantized layer and its float branches."""

        def __init__(self, layer: Any, adapter_name: str, **kwargs: Any) -> None:
            super().__init__(float_twin(layer), adapter_name, **kwargs)
            self.base_layer = layer

        def update_layer(self, *args: Any, **kwargs: Any) -> None:
            """Add a branch; peft reads its shapes from a float layer, so the base layer is one meanwhile."""
            layer = self.base_layer
            if isinstance(layer, Adaptable):
                self.base_layer = float_twin(layer)
            try:
                super().update_layer(*args, **kwargs)
            finally:
                self.base_layer = layer

        def resolve_lora_variant(self, *, config: Any, **kwargs: Any) -> None:
            """Refuse variants that are no plain low-rank branch."""
            if config.use_dora:
                raise UsageError("DoRA scales the weight, which is quantized", where=WHERE, fix=MERGE)
            found = super().resolve_lora_variant(config=config, **kwargs)
            if found is not None:
                raise UsageError(
                    f"{type(found).__name__} is no plain low-rank branch", where=WHERE, fix="Use plain LoRA"
                )

        def merge(self, *_: Any, **__: Any) -> None:
            """Refuse to merge the branch into a quantized weight."""
            raise UsageError(
                "A LoRA can't be fused into a quantized weight: rounding would destroy it",
                where="fuse_lora",
                fix=f"Leave the LoRA unfused: it runs as a float branch. {MERGE}",
            )

    Branch.__name__ = Branch.__qualname__ = f"Quantized{kind.__name__}"
    return Branch
