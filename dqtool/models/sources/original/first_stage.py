"""Autoencoder of a single file as a diffusers module: config from shapes, tensors through diffusers' converter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from dqtool.artifacts.jsonvalues import ForeignConfig
from dqtool.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FIRST_STAGES", "build_first_stage", "first_stage_prefix"]

FIRST_STAGES = ("first_stage_model.", "vae.")
"""Prefixes of an autoencoder's tensors."""

_CODES = "quantize.embedding.weight"


def first_stage_prefix(names: Iterable[str]) -> str | None:
    """Return the prefix of the autoencoder's tensors among `names`; None where there is no decoder."""
    names = set(names)
    return next((prefix for prefix in FIRST_STAGES if f"{prefix}decoder.conv_out.weight" in names), None)


def build_first_stage(state: Mapping[str, Tensor], prefix: str, known: ForeignConfig, where: str) -> Any:
    """Return the autoencoder (`AutoencoderKL`, or `VQModel` where it has codes) in float32 and eval mode.

    `known` holds config entries that shapes don't determine; a `scale_factor` in the file takes precedence.

    Raises:
        ArtifactError: diffusers has no equivalent autoencoder.
    """
    import diffusers
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    levels = len({name.split(".")[2] for name in own if name.startswith("encoder.down.")})
    firsts = [f"encoder.down.{level}.block.0.conv1.weight" for level in range(levels)]
    attends = any(name.startswith("encoder.down.") and ".attn." in name for name in own)
    if not levels or attends or "encoder.mid.attn_1.norm.weight" not in own:
        raise ArtifactError("dqtool reads first stages that attend in the middle only", where=f"{where}, {prefix}*")
    config: dict[str, Any] = {
        "in_channels": own["encoder.conv_in.weight"].shape[1],
        "out_channels": own["decoder.conv_out.weight"].shape[0],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": [own[name].shape[0] for name in firsts],
        "layers_per_block": len({n.split(".")[4] for n in own if n.startswith("encoder.down.0.block.")}),
        "latent_channels": own["decoder.conv_in.weight"].shape[1],
        "norm_num_groups": 32,
        **known,
    }
    if "scale_factor" in state:
        config["scaling_factor"] = float(state["scale_factor"])
    converted = convert_ldm_vae_checkpoint(dict(own), config)
    vae: Any
    if _CODES in own:
        codes, width = own[_CODES].shape
        vae = diffusers.VQModel(**config, num_vq_embeddings=codes, vq_embed_dim=width)
        converted[_CODES] = own[_CODES]
    else:
        quantizes = "quant_conv.weight" in own
        vae = diffusers.AutoencoderKL(**config, use_quant_conv=quantizes, use_post_quant_conv=quantizes)
    try:
        vae.load_state_dict({name: tensor.float() for name, tensor in converted.items()}, strict=True)
    except RuntimeError as error:
        raise ArtifactError(f"diffusers has no equal of this first stage: {error}", where=where) from error
    return vae.eval()
