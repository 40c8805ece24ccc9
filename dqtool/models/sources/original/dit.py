"""Layout of facebookresearch/DiT: class-conditional diffusion transformers."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import TYPE_CHECKING

from dqtool.artifacts.jsonvalues import ForeignConfig
from dqtool.errors import ArtifactError
from dqtool.models.config_extras import KEY
from dqtool.models.sources.original.layout import Description, Known, Layout, Shapes, register

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Dit"]

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
"""Attention heads by width: DiT-S, B, L, XL."""

_BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
_EMBEDDINGS = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}
_ENDS = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.linear": "proj_out_2",
    "final_layer.adaLN_modulation.1": "proj_out_1",
}


@register
class Dit(Layout):
    """`DiT` of facebookresearch/DiT, `models.py`."""

    name = "dit"
    title = "facebookresearch/DiT"

    def matches(self, shapes: Shapes) -> bool:
        """Return whether there are embedders of patches and labels, and numbered blocks."""
        return {"x_embedder.proj.weight", "y_embedder.embedding_table.weight", "blocks.0.attn.qkv.weight"} <= set(
            shapes
        )

    def describe(self, shapes: Shapes, known: Known, where: str) -> Description:
        """Return config and schedule from the shapes; the number of heads follows from the width of published models.

        diffusers' DiT spaces the frequencies of its time embedding differently; the `original` entry corrects this.
        """
        width, in_channels, patch, _ = shapes["x_embedder.proj.weight"]
        heads = (known.published or {}).get("num_heads", HEADS.get(width))
        if heads is None:
            raise ArtifactError(
                f"The number of attention heads of a DiT of width {width} can't be derived from its checkpoint",
                where=where,
                fix="Name a YAML file that says num_heads with --config FILE",
            )
        config = {
            "_class_name": "DiTTransformer2DModel",
            "sample_size": isqrt(shapes["pos_embed"][1]) * patch,
            "in_channels": in_channels,
            "out_channels": shapes["final_layer.linear.weight"][0] // patch**2,
            "patch_size": patch,
            "num_layers": len({name.split(".")[1] for name in shapes if name.startswith("blocks.")}),
            "num_attention_heads": int(heads),
            "attention_head_dim": width // int(heads),
            "num_embeds_ada_norm": shapes["y_embedder.embedding_table.weight"][0] - 1,  # the last row means "no class"
            "attention_bias": True,
            "activation_fn": "gelu-approximate",
            "norm_type": "ada_norm_zero",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            "norm_num_groups": 32,
            "dropout": 0.0,
            KEY: {"time_freq_shift": 0},
        }
        scheduler = {
            "_class_name": "DDIMScheduler",
            "num_train_timesteps": 1000,
            "beta_schedule": "linear",
            "beta_start": 0.0001,
            "beta_end": 0.02,
            "clip_sample": False,
            "set_alpha_to_one": True,
            "steps_offset": 0,
        }
        return Description(config, scheduler)

    def convert(self, state: Mapping[str, Tensor], config: ForeignConfig, where: str) -> dict[str, Tensor]:
        """Split q, k, v and repeat the two embedders in every block, as diffusers does; the repeated tensors are shared."""
        _check_positions(state["pos_embed"], config, where)
        converted: dict[str, Tensor] = {}
        for name, tensor in state.items():
            owner, _, leaf = name.rpartition(".")
            if name == "pos_embed":
                continue
            if owner in _ENDS:
                converted[f"{_ENDS[owner]}.{leaf}"] = tensor
            elif owner in _EMBEDDINGS:
                for block in range(config["num_layers"]):
                    converted[f"transformer_blocks.{block}.norm1.emb.{_EMBEDDINGS[owner]}.{leaf}"] = tensor
            elif owner.startswith("blocks."):
                _, block_name, part = owner.split(".", 2)
                prefix = f"transformer_blocks.{block_name}"
                if part == "attn.qkv":
                    for which, third in zip("qkv", tensor.chunk(3), strict=True):
                        converted[f"{prefix}.attn1.to_{which}.{leaf}"] = third
                elif part in _BLOCK:
                    converted[f"{prefix}.{_BLOCK[part]}.{leaf}"] = tensor
                else:
                    raise ArtifactError(f"The checkpoint holds '{name}', which a DiT does not have", where=where)
            else:
                raise ArtifactError(f"The checkpoint holds '{name}', which a DiT does not have", where=where)
        return converted


def _check_positions(table: Tensor, config: ForeignConfig, where: str) -> None:
    """Raise `ArtifactError` for a position table that differs from the sine-cosine table that diffusers computes."""
    import torch
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    grid = config["sample_size"] // config["patch_size"]
    expected = get_2d_sincos_pos_embed(table.shape[-1], grid, base_size=grid, output_type="pt")
    if table.shape[1] != grid**2 or not torch.allclose(table[0].float(), expected.float(), atol=1e-3):
        raise ArtifactError(
            "This checkpoint's table of positions is not the fixed one of DiT", where=f"{where}, tensor pos_embed"
        )
