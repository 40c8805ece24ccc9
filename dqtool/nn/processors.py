"""Quantizing processors of attention modules, kept when a pipeline or a user sets another processor.

A processor that only computes diffusers' default, such as `AttnProcessor()`, leaves the quantized products in place. A
processor that does more (perturbed attention, image prompts, a user's own class) runs unchanged: its products are float,
its projections stay quantized, and one warning per network reports it.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch

from dqtool.errors import DqtoolWarning
from dqtool.graph.attention import OWN, PRODUCTS
from dqtool.nn.products import intercept_products, release_products

__all__ = ["keep_quantized", "lend_processor", "runs_own", "set_own", "without_hook"]

EQUIVALENT = {
    "single": ("AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor", "SlicedAttnProcessor"),
    "joint": ("JointAttnProcessor2_0", "XFormersJointAttnProcessor"),
    "flux": ("FluxAttnProcessor",),
}
"""Classes of diffusers that compute in float what the quantizing processor computes, by layout."""

_warned: weakref.WeakSet[Any] = weakref.WeakSet()
"""Step indices of the networks that have warned; every network has one index."""


def set_own(attn: Any, processor: Any) -> None:
    """Install the quantizing processor of an attention module."""
    attn.__dict__[OWN] = processor
    if processor.layout == PRODUCTS:
        intercept_products(attn)
    else:
        attn.set_processor(processor)


def lend_processor(attn: Any, processor: Any) -> Callable[[], None]:
    """Install a processor in a module of a float network; return the function that restores the one before."""
    before = getattr(attn, "processor", None)
    set_own(attn, processor)

    def give_back() -> None:
        attn.__dict__.pop(OWN)
        if processor.layout == PRODUCTS:
            release_products(attn)
        else:
            attn.set_processor(before)

    return give_back


def without_hook(attn: Any) -> None:
    """Remove the hook `keep_quantized` from a module whose class calls `runs_own` itself."""
    for key in [key for key, hook in attn._forward_pre_hooks.items() if hook is keep_quantized]:
        del attn._forward_pre_hooks[key]


def keep_quantized(attn: Any, *_: object) -> None:
    """Reinstall a module's quantizing processor where diffusers' default replaced it. A forward pre-hook."""
    runs_own(attn)


def runs_own(attn: Any) -> bool:
    """Return whether `attn` runs its quantizing processor; reinstall that first if diffusers' default replaced it.

    Warn once for each network whose processor computes another attention.
    """
    own, processor = attn.__dict__.get(OWN), attn.processor
    if processor is own or own is None:
        return True
    if hasattr(processor, "layout") and getattr(processor, "steps", own.steps) is not None:
        return True  # a processor of dqtool, made for this module
    if not hasattr(processor, "layout") and not _is_equivalent(processor, own.layout):
        if not torch.compiler.is_compiling() and own.steps not in _warned:
            _warned.add(own.steps)
            warnings.warn(
                f"{type(processor).__name__} computes another attention than the one that was quantized: its products "
                "run in float, around quantized projections. `set_attn_processor(AttnProcessor())` restores quantized "
                "attention.",
                DqtoolWarning,
                stacklevel=2,
            )
        return False
    attn.set_processor(own)
    return True


def _is_equivalent(processor: Any, layout: str) -> bool:
    kind = type(processor)
    return kind.__name__ in EQUIVALENT.get(layout, ()) and kind.__module__.startswith("diffusers.")
