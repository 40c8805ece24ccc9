"""Layout of openai/guided-diffusion (ADM) and openai/consistency_models: UNets on pixels.

Shapes identify the published models. Settings of other models that shapes don't determine (heads, order of q, k and v,
noise schedule) come from a YAML file of the authors' flags, such as `num_head_channels: 64` and `noise_schedule: cosine`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dqtool.artifacts.jsonvalues import ForeignConfig
from dqtool.errors import ArtifactError
from dqtool.models.config_extras import KEY
from dqtool.models.sources.original.attention_unet import LATENT_MODELS, convert_attention, describe_attention
from dqtool.models.sources.original.layout import Description, Known, Shapes, register
from dqtool.models.sources.original.openai_unet import (
    CompVisLayout,
    Structure,
    network_shapes,
    network_tensors,
    unet_parameters,
    unet_structure,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["GuidedDiffusion"]

NEW, LEGACY = "new", "legacy"
"""Orders of the fused projection's rows: all of q first (`QKVAttention`, `QKVFlashAttention`), or q, k, v of each head."""

_CONSISTENCY = {
    "_class_name": "CMStochasticIterativeScheduler",
    "num_train_timesteps": 40,
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "sigma_data": 0.5,
    "rho": 7.0,
    "clip_denoised": True,
}
_ASKS = (
    "the schedule of a network of openai/consistency_models can't be derived from its checkpoint: consistency models "
    "(CMStochasticIterativeScheduler) and the diffusion models they are distilled from have the same tensors"
)


@dataclass(frozen=True)
class KnownModel:
    """A published model: the properties that identify it, and the authors' flags that shapes don't determine.

    The identifying properties are channels, residual blocks, labels, and whether q, k and v come from a 2-d convolution.
    """

    title: str
    channels: tuple[int, ...]
    blocks: int
    classes: tuple[int | None, ...]
    flat: bool
    flags: ForeignConfig = field(default_factory=dict)
    in_channels: int = 3


_64 = (192, 384, 576, 768)
_256 = (256, 256, 512, 512, 1024, 1024)
PUBLISHED = (
    KnownModel(
        "ADM, ImageNet 64x64",
        _64,
        3,
        (1000,),
        False,
        {"image_size": 64, "num_head_channels": 64, "use_new_attention_order": True, "noise_schedule": "cosine"},
    ),
    KnownModel(
        "ADM, ImageNet 128x128",
        (256, 256, 512, 768, 1024),
        2,
        (1000,),
        False,
        {"image_size": 128, "num_heads": 4, "noise_schedule": "linear"},
    ),
    KnownModel(
        "ADM, ImageNet and LSUN 256x256",
        _256,
        2,
        (1000, None),
        False,
        {"image_size": 256, "num_head_channels": 64, "noise_schedule": "linear"},
    ),
    KnownModel(
        "Consistency models, ImageNet 64x64", _64, 3, (1000,), True, {"image_size": 64, "num_head_channels": 64}
    ),
    KnownModel(
        "Consistency models, LSUN 256x256", _256, 2, (None,), True, {"image_size": 256, "num_head_channels": 64}
    ),
    KnownModel(
        "adaptive-terrain-diffusion",
        (32, 32, 64, 96, 128),
        4,
        (None,),
        True,
        {
            "image_size": 128,
            "num_head_channels": 32,
            "training_mode": "consistency_distillation",
            "label_values": [0, 1, 100],
        },
        in_channels=1,
    ),
)


@register
class GuidedDiffusion(CompVisLayout):
    """`UNetModel` of guided_diffusion/unet.py and cm/unet.py."""

    name = "guided-diffusion"
    title = "openai/guided-diffusion"

    def matches(self, shapes: Shapes) -> bool:
        """Return whether q, k and v have a fused projection and no latent diffusion model matches.

        The names are bare, or the network has a 2-d convolution for q, k, v, an MLP for labels, or a learned variance.
        """
        network = network_shapes(shapes)
        products = [shape for name, shape in network.items() if name.endswith(".qkv.weight")]
        ends = ("out.2.weight", "input_blocks.0.0.weight")
        if not products or any(name not in network for name in ends):
            return False
        learned = network["out.2.weight"][0] == 2 * network["input_blocks.0.0.weight"][1]
        if len(products[0]) == 4 or "label_emb.0.weight" in network or learned:
            return True
        return (
            "input_blocks.0.0.weight" in shapes
            and tuple(unet_structure(network, "checkpoint").channels) not in LATENT_MODELS
        )

    def describe(self, shapes: Shapes, known: Known, where: str) -> Description:
        """Return config and schedule from the authors' flags, else from the published model of these shapes.

        Raises:
            ArtifactError: no published model matches, and there are no flags for the heads or for numeric labels.
        """
        network = network_shapes(shapes)
        found = unet_structure(network, where)
        if network["time_embed.0.weight"][1] != found.channels[0]:
            raise ArtifactError(
                f"diffusers has no UNet with {network['time_embed.0.weight'][1]} features of the timestep and {found.channels[0]} "
                "channels in its first convolution",
                where=where,
            )
        like = _like(found, network)
        flags = {**(like.flags if like else {}), **(known.published or {}), **unet_parameters(known.published)}
        schedule, unknown_schedule = _schedule(found, network, flags, where)
        if known.config is not None:
            return Description(dict(known.config), schedule, unknown_schedule)
        if not {"num_heads", "num_head_channels"} & flags.keys():
            raise ArtifactError(
                f"The number of attention heads of a UNet with {found.channels} channels can't be derived from its checkpoint",
                where=where,
                fix="Write the authors' flags into a YAML file (num_head_channels: 64, image_size: 64, ...) and name it "
                "with --config FILE",
            )
        if "image_size" not in flags:
            raise ArtifactError(
                "The size of this model's images can't be derived from its checkpoint",
                where=where,
                fix="Add image_size: N to the YAML file that --config names",
            )
        config = dict(describe_attention(found, flags, int(flags["image_size"]), where))
        original = dict(config.get(KEY) or {})
        if _order(network, flags) != _order(network, {}):
            original["attention_order"] = _order(network, flags)
        if "label_emb.0.weight" in network:
            original["label_values"] = values = _label_values(flags, where)
            config["num_class_embeds"] = values[2]
        return Description(config | ({KEY: original} if original else {}), schedule, unknown_schedule)

    def convert(self, state: Mapping[str, Tensor], config: ForeignConfig, where: str) -> dict[str, Tensor]:
        """Rename the tensors, split the fused projection of q, k and v, and tabulate an MLP for labels at their values."""
        tensors = network_tensors(state)
        original = config.get(KEY) or {}
        mlp = {name: tensors.pop(name) for name in list(tensors) if name.startswith(("label_emb.0.", "label_emb.2."))}
        order = original.get("attention_order") or _order({name: tuple(t.shape) for name, t in tensors.items()}, {})
        converted = convert_attention(tensors, config, where, together=order == LEGACY)
        if mlp:
            values = _label_values(original, where)
            converted["class_embedding.weight"] = _label_table(mlp, values)
        return converted


def _like(found: Structure, network: Shapes) -> KnownModel | None:
    """Return the published model of these shapes; None where there is none."""
    flat = _flat(network)
    for each in PUBLISHED:
        same = (each.channels, each.blocks, each.flat, each.in_channels) == (
            tuple(found.channels),
            found.layers_per_block,
            flat,
            found.in_channels,
        )
        if (
            same
            and found.classes in each.classes
            and ("label_values" in each.flags) == ("label_emb.0.weight" in network)
        ):
            return each
    return None


def _flat(network: Shapes) -> bool:
    """Return whether q, k and v come from a 2-d convolution, as in openai/consistency_models."""
    return any(name.endswith(".qkv.weight") and len(shape) == 4 for name, shape in network.items())


def _order(network: Shapes, flags: ForeignConfig) -> str:
    """Return the order of q, k and v: the authors' flag, else new with a 2-d convolution (flash attention) and legacy without."""
    if "use_new_attention_order" in flags:
        return NEW if flags["use_new_attention_order"] else LEGACY
    if _flat(network):
        return NEW if flags.get("attention_type", "flash") == "flash" else LEGACY
    return LEGACY


def _schedule(found: Structure, network: Shapes, flags: ForeignConfig, where: str) -> tuple[ForeignConfig, str | None]:
    """Return the model's scheduler config, and a description of its unknown part (None: nothing)."""
    if _flat(network):
        consistency = str(flags.get("training_mode", "")).startswith("consistency")
        sigmas = {key: float(flags[key]) for key in ("sigma_min", "sigma_max") if key in flags}
        return {**_CONSISTENCY, **sigmas}, None if consistency else _ASKS
    schedules = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
    name = flags.get("noise_schedule")
    config = {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": int(flags.get("diffusion_steps", 1000)),
        "prediction_type": "sample" if flags.get("predict_xstart") else "epsilon",
        "beta_schedule": schedules.get(str(name), "linear"),
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "clip_sample": True,
    }
    if name not in schedules:
        said = "is not recorded in its checkpoint" if name is None else f"is '{name}', which dqtool does not translate"
        return config, f"the noise schedule of this guided-diffusion model (linear or cosine) {said}"
    return config, None


def _label_values(flags: ForeignConfig, where: str) -> list[Any]:
    """Return the labels of a network with numeric labels, evenly spaced from the first to the last."""
    values = flags.get("label_values")
    if not isinstance(values, list) or len(values) != 3 or not isinstance(values[2], int) or values[2] < 2:
        raise ArtifactError(
            "This model is conditioned on a number, through an MLP; its labels can't be derived from its checkpoint",
            where=f"{where}, label_emb",
            fix="Add label_values: [first, last, how many] to the YAML file that --config names",
        )
    return values


def _label_table(mlp: Mapping[str, Tensor], values: list[Any]) -> Tensor:
    """Return the MLP's output at each label, `[labels, D]`."""
    import torch

    labels = torch.linspace(float(values[0]), float(values[1]), int(values[2]), dtype=torch.float64).float()[:, None]
    first = {leaf: mlp[f"label_emb.0.{leaf}"].float() for leaf in ("weight", "bias")}
    second = {leaf: mlp[f"label_emb.2.{leaf}"].float() for leaf in ("weight", "bias")}
    hidden = torch.nn.functional.silu(torch.nn.functional.linear(labels, first["weight"], first["bias"]))
    return torch.nn.functional.linear(hidden, second["weight"], second["bias"])
