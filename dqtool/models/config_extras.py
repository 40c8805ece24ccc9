"""What diffusers' configs can't say of networks that were trained elsewhere, kept under one key of the config, `original`.

`{"original": {"attention_heads": 8}}` gives every attention that many heads whatever its width (LDM-8 church; a
`UNet2DModel` knows heads of one width only). `{"original": {"time_freq_shift": 0}}` sets the spacing of the timestep
frequencies (facebookresearch/DiT divides by the number of frequencies, diffusers' DiT by one less). `attention_order` and `label_values` tell how the original
file is read (`models/sources/original/guided_diffusion.py`) and change nothing here. diffusers carries
unknown keys of a config along, so they survive `save_pretrained`.

One amendment needs no entry: diffusers' `DiTPipeline` asks for no class by the number 1000, whatever the network's
classes are. A network of fewer takes any label past its classes for none, so that the stock pipeline can guide it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dqtool.errors import ArtifactError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["KEY", "apply_config_extras"]

KEY = "original"
_KNOWN = ("attention_heads", "time_freq_shift", "attention_order", "label_values")
_NO_CLASS = 1000


def apply_config_extras(network: nn.Module, config: Mapping[str, Any]) -> nn.Module:
    """Apply the config's `original` entry to a network that diffusers built from the rest; returns the network.

    Raises:
        ArtifactError: the entry asks for something unknown, or for heads that don't divide the channels.
    """
    changes = config.get(KEY) or {}
    for key in changes:
        if key not in _KNOWN:
            raise ArtifactError(
                f"The config asks for '{key}', which this dqtool does not know",
                where=f"model config, key {KEY}",
                fix="Upgrade dqtool",
            )
    heads, shift = changes.get("attention_heads"), changes.get("time_freq_shift")
    for name, module in network.named_modules():
        if heads is not None and hasattr(module, "to_q") and hasattr(module, "heads"):
            inner: int = module.to_q.out_features  # type: ignore[union-attr,assignment]
            if inner % heads:
                raise ArtifactError(
                    f"{inner} channels can't be split into {heads} heads", where=f"model config, key {KEY}; {name}"
                )
            module.heads = heads
            module.sliceable_head_dim = heads  # type: ignore[assignment]
            module.scale = (inner // heads) ** -0.5  # type: ignore[assignment]
        if shift is not None and hasattr(module, "downscale_freq_shift"):
            module.downscale_freq_shift = shift
        if hasattr(module, "embedding_table") and getattr(module, "num_classes", _NO_CLASS) < _NO_CLASS:
            module.register_forward_pre_hook(_past_the_classes_is_none)
    return network


def _past_the_classes_is_none(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A forward pre-hook of a label embedding, whose row after the classes stands for none."""
    return (args[0].clamp(max=module.num_classes), *args[1:])
