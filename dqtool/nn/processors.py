"""The processor of a quantized attention module when a pipeline or a user sets another one.

A processor that merely repeats diffusers' default, such as `AttnProcessor()`, leaves the quantized products in place. One
that does more (perturbed attention, image prompts, a user's own class) runs as it is: its products are float, around
projections that stay quantized. One warning per network says so.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch

from dqtool.errors import DqtoolWarning

__all__ = ["OWN", "keep_quantized", "runs_own", "set_own", "without_hook"]

OWN = "_dqtool_processor"
"""Key of an attention module's `__dict__` under which its quantizing processor is kept."""

REPEATS = {
    "single": ("AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor", "SlicedAttnProcessor"),
    "joint": ("JointAttnProcessor2_0", "XFormersJointAttnProcessor"),
    "flux": ("FluxAttnProcessor",),
}
"""By layout, diffusers' classes that compute what the quantizing processor computes, in float."""

_warned: weakref.WeakSet[Any] = weakref.WeakSet()
"""Step indices of the networks that have warned: every network has one."""


def set_own(attn: Any, processor: Any) -> None:
    """Give an attention module its quantizing processor."""
    attn.set_processor(processor)
    attn.__dict__[OWN] = processor


def without_hook(attn: Any) -> None:
    """Take `keep_quantized` off a module whose class asks `runs_own` itself."""
    for key in [key for key, hook in attn._forward_pre_hooks.items() if hook is keep_quantized]:
        del attn._forward_pre_hooks[key]


def keep_quantized(attn: Any, *_: object) -> None:
    """Put a module's quantizing processor back in the place of one that repeats diffusers' default. A forward pre-hook."""
    runs_own(attn)


def runs_own(attn: Any) -> bool:
    """Return whether `attn` runs its quantizing processor, after that has been put back where it should be."""
    own, processor = attn.__dict__.get(OWN), attn.processor
    if processor is own or own is None:
        return True
    if hasattr(processor, "layout") and getattr(processor, "steps", own.steps) is not None:
        return True  # of dqtool, made for this module
    if not hasattr(processor, "layout") and not _repeats(processor, own.layout):
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


def _repeats(processor: Any, layout: str) -> bool:
    kind = type(processor)
    return kind.__name__ in REPEATS.get(layout, ()) and kind.__module__.startswith("diffusers.")
