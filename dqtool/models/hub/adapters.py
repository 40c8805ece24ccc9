"""LoRA on quantized networks through peft and diffusers: a float branch is added to each quantized product.

peft wraps a layer by its class in a module of its own. `register` adds the wrappers of dqtool's layers to every
`LoraConfig`, so that `load_lora_weights`, `set_adapters`, `unload_lora_weights` and hot swaps work as on float networks.
Quantized weights never change, so unloading an adapter restores the network exactly. Operations that would change them are
refused: `fuse_lora`, and adapters that are no low-rank branch (DoRA).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from torch import nn

from dqtool.errors import UsageError
from dqtool.models.sources.adapter_kinds import MERGE_ELSEWHERE, other_kind
from dqtool.nn.adaptable import Adaptable, float_twin

__all__ = ["refuse_other_kinds", "register"]

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


_QUANTIZED: ContextVar[bool] = ContextVar("dqtool_quantized", default=False)
"""True while an adapter is loaded into a quantized network."""


def refuse_other_kinds(loaders: ModuleType) -> None:
    """Make the LoRA loaders of `diffusers.loaders.lora_pipeline` or `.peft` raise `UsageError` for a file of another kind of
    adapter, where the network is quantized. Idempotent."""
    fetch = loaders._fetch_state_dict
    if getattr(fetch, "_dqtool", False):
        return

    @functools.wraps(fetch)
    def fetched(*args: Any, **kwargs: Any) -> Any:
        found = fetch(*args, **kwargs)
        other = other_kind(found[0]) if _QUANTIZED.get() else None
        if other is not None:
            raise UsageError(
                f"This is a {other[0]}: it {other[1]}, which is quantized here", where=WHERE, fix=MERGE_ELSEWHERE
            )
        return found

    fetched._dqtool = True  # type: ignore[attr-defined]
    loaders._fetch_state_dict = fetched  # type: ignore[attr-defined]
    for cls in list(vars(loaders).values()):
        for name in ("load_lora_weights", "load_lora_adapter"):
            if isinstance(cls, type) and name in vars(cls) and cls.__module__ == loaders.__name__:
                setattr(cls, name, _noting(vars(cls)[name]))


def _noting(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _loading_into(self):
            return load(self, *args, **kwargs)

    return noted


@contextlib.contextmanager
def _loading_into(target: Any) -> Iterator[None]:
    """Note whether `target` is a quantized network or a pipeline with one."""
    parts = target.components.values() if hasattr(target, "components") else [target]
    token = _QUANTIZED.set(_QUANTIZED.get() or any("_dqtool_steps" in getattr(part, "__dict__", {}) for part in parts))
    try:
        yield
    finally:
        _QUANTIZED.reset(token)


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
                raise UsageError("DoRA scales the weight, which is quantized", where=WHERE, fix=MERGE_ELSEWHERE)
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
