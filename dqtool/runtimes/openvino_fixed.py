"""Refusals of what pipelines ask of a network to change its layers: a compiled graph has none."""

from __future__ import annotations

from typing import Any, NoReturn

from dqtool.errors import UsageError

__all__ = ["Fixed"]

REFUSED = {
    "set_attn_processor": "take another attention processor",
    "set_default_attn_processor": "take another attention processor",
    "_load_ip_adapter_weights": "take image prompts (IP-Adapter)",
    "load_lora_adapter": "take LoRA weights",
    "load_attn_procs": "take LoRA weights",
    "add_adapter": "take LoRA weights",
    "enable_freeu": "apply FreeU",
    "enable_cache": "keep a part of a step for the next one",
    "fuse_qkv_projections": "fuse its projections, which it has done as far as they have one input",
    "enable_gradient_checkpointing": "give gradients",
}
"""Methods of diffusers' networks that OpenVINO graphs lack, and the feature that each stands for."""


def _refusal(what: str) -> Any:
    def refuse(self: Any, *_: object, **__: object) -> NoReturn:
        raise UsageError(
            f"A network compiled by OpenVINO can't {what}",
            where="openvino runtime",
            fix='Load it with dqtool.load(..., runtime="cpu") or runtime="simulate"',
        )

    return refuse


class Fixed:
    """Base of a network that is a compiled graph.

    Its methods `enable_freeu`, `set_attn_processor` and the like raise `UsageError`; to switch off what can't be on does
    nothing.
    """

    def disable_freeu(self) -> None:
        """Do nothing."""

    def disable_cache(self) -> None:
        """Do nothing."""

    def unfuse_qkv_projections(self) -> None:
        """Do nothing."""


for _name, _what in REFUSED.items():
    setattr(Fixed, _name, _refusal(_what))
