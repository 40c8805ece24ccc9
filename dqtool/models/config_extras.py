"""Settings of converted networks that diffusers' configs can't express, kept under the config key `original`.

| entry | effect |
| --- | --- |
| `attention_heads` | number of heads of every attention, whatever its width (LDM-8 church; `UNet2DModel` fixes the width of a head) |
| `time_freq_shift` | spacing of the timestep frequencies (facebookresearch/DiT divides by their number, diffusers' DiT by one less) |
| `attention_order`, `label_values` | reading of the original file (`models/sources/original/guided_diffusion.py`); no effect here |

diffusers keeps unknown keys of a config, so the entries survive `save_pretrained`.

One change needs no entry: diffusers' `DiTPipeline` passes the label 1000 for "no class", whatever number of classes the
network has. A network with fewer classes treats every label past its classes as "no class", so that the stock pipeline
can guide it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dqtool.artifacts.jsonvalues import ForeignConfig
from dqtool.errors import ArtifactError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["KEY", "apply_config_extras"]

KEY = "original"
_KNOWN = ("attention_heads", "time_freq_shift", "attention_order", "label_values")
_NO_CLASS = 1000


def apply_config_extras(network: nn.Module, config: ForeignConfig) -> nn.Module:
    """Apply the config's `original` entry to a network that diffusers built from the rest; return the network.

    Raises:
        ArtifactError: the entry has an unknown key, or a number of heads that doesn't divide the channels.
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
            inner: int = module.to_q.out_features
            if inner % heads:
                raise ArtifactError(
                    f"{inner} channels can't be split into {heads} heads", where=f"model config, key {KEY}; {name}"
                )
            module.heads = heads
            module.sliceable_head_dim = heads
            module.scale = (inner // heads) ** -0.5
        if shift is not None and hasattr(module, "downscale_freq_shift"):
            module.downscale_freq_shift = shift
        if hasattr(module, "embedding_table") and getattr(module, "num_classes", _NO_CLASS) < _NO_CLASS:
            module.register_forward_pre_hook(_clamp_labels)
    return network


def _clamp_labels(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Map labels past the classes to the row for "no class". A forward pre-hook of a label embedding."""
    return (args[0].clamp(max=module.num_classes), *args[1:])
