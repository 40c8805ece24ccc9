"""Layout of ermongroup/ddim and of DDPM checkpoints in its format: pixel UNets of CIFAR-10, CelebA and LSUN."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dqtool.artifacts.jsonvalues import ForeignConfig
from dqtool.errors import ArtifactError
from dqtool.models.sources.original.layout import Description, Known, Layout, Shapes, register

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DdimCifar10"]

_RESNET = {"temb_proj": "time_emb_proj", "nin_shortcut": "conv_shortcut"}
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_ENDS = {
    "temb.dense.0": "time_embedding.linear_1",
    "temb.dense.1": "time_embedding.linear_2",
    "conv_in": "conv_in",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}
_MIDDLE = {"block_1": "resnets.0", "attn_1": "attentions.0", "block_2": "resnets.1"}
_ATTENTION_RESOLUTION = 16
"""Resolution of the attention in every model of the repository. It determines the image's size, which no shape does."""


@register
class DdimCifar10(Layout):
    """`Model` of ermongroup/ddim, `models/diffusion.py`."""

    name = "ddim"
    title = "ermongroup/ddim"

    def matches(self, shapes: Shapes) -> bool:
        """Return whether there are two dense layers of the time embedding and numbered blocks."""
        return "temb.dense.0.weight" in shapes and "down.0.block.0.conv1.weight" in shapes

    def describe(self, shapes: Shapes, known: Known, where: str) -> Description:
        """Return config and schedule from the shapes; the image's size follows from the level that has attention."""
        levels = _count(shapes, "down")
        channels = [shapes[f"down.{level}.block.0.conv1.weight"][0] for level in range(levels)]
        attends = [f"down.{level}.attn.0.q.weight" in shapes for level in range(levels)]
        if "down.0.downsample.conv.weight" not in shapes and levels > 1:
            raise ArtifactError("dqtool reads models of this layout that resample by convolutions only", where=where)
        size = ((known.published or {}).get("data") or {}).get("image_size")
        if size is None:
            if True not in attends:
                raise ArtifactError(
                    "The size of the images can't be derived from this checkpoint",
                    where=where,
                    fix="Name the authors' YAML config with --config FILE",
                )
            size = _ATTENTION_RESOLUTION * 2 ** attends.index(True)
        config = {
            "_class_name": "UNet2DModel",
            "sample_size": int(size),
            "in_channels": shapes["conv_in.weight"][1],
            "out_channels": shapes["conv_out.weight"][0],
            "down_block_types": ["AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends],
            "up_block_types": ["AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)],
            "block_out_channels": channels,
            "layers_per_block": _count(shapes, "down.0.block"),
            "attention_head_dim": None,  # one head
            "downsample_padding": 0,  # diffusers' value for padding on two sides only, as in the original
            "flip_sin_to_cos": False,
            "freq_shift": 1,
            "norm_num_groups": 32,
            "norm_eps": 1e-6,
        }
        diffusion = (known.published or {}).get("diffusion") or {}
        scheduler = {
            "_class_name": "DDIMScheduler",
            "num_train_timesteps": int(diffusion.get("num_diffusion_timesteps", 1000)),
            "beta_schedule": "linear",
            "beta_start": float(diffusion.get("beta_start", 0.0001)),
            "beta_end": float(diffusion.get("beta_end", 0.02)),
            "clip_sample": True,
        }
        return Description(config, scheduler)

    def convert(self, state: Mapping[str, Tensor], config: ForeignConfig, where: str) -> dict[str, Tensor]:
        """Rename the tensors; the 1x1 convolutions of attention become linear layers."""
        levels = len(config["block_out_channels"])
        converted: dict[str, Tensor] = {}
        for name, tensor in state.items():
            owner, _, leaf = name.rpartition(".")
            if owner in _ENDS:
                converted[f"{_ENDS[owner]}.{leaf}"] = tensor
                continue
            side, where_in, *rest = owner.split(".")
            if side == "mid":
                prefix, inner = f"mid_block.{_MIDDLE[where_in]}", rest
            elif side in ("down", "up"):
                level = int(where_in) if side == "down" else levels - 1 - int(where_in)
                block = f"{side}_blocks.{level}"
                if rest[0] in ("downsample", "upsample"):
                    converted[f"{block}.{rest[0]}rs.0.conv.{leaf}"] = tensor
                    continue
                kind = {"block": "resnets", "attn": "attentions"}[rest[0]]
                prefix, inner = f"{block}.{kind}.{rest[1]}", rest[2:]
            else:
                raise ArtifactError(f"The checkpoint holds '{name}', which this layout does not have", where=where)
            part = inner[0]
            if "attentions" in prefix:
                squeezed = tensor.flatten(1) if tensor.dim() == 4 else tensor
                converted[f"{prefix}.{_ATTENTION[part]}.{leaf}"] = squeezed
            else:
                converted[f"{prefix}.{_RESNET.get(part, part)}.{leaf}"] = tensor
        return converted


def _count(shapes: Shapes, prefix: str) -> int:
    """Return the number of numbered modules under `prefix`."""
    return len({name[len(prefix) + 1 :].split(".")[0] for name in shapes if name.startswith(prefix + ".")})
