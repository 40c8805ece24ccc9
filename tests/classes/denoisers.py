"""Tiny networks of diffusers' denoiser classes: config, arguments, and how their pipelines call them.

An argument is a shape (random numbers), or a tensor where the values matter: masks, sizes, positions, tokens. `structure`
is the JSON of `--example` for arguments that are not one tensor with the batch in front.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["DENOISERS", "Denoiser", "build_denoiser", "example_tensors"]

TEXT = 6
"""Tokens of every text."""


@dataclass(frozen=True)
class Denoiser:
    """A tiny network of one class.

    Attributes:
        config: arguments of the class.
        inputs: arguments of the forward, batch 1, the timestep excepted: a shape or a tensor each.
        structure: contents of the example's JSON file, for arguments of another kind.
        scheduler: class of the scheduler; a flow-matching class where the pipelines use one.
        time_scale: `dilate --time-scale`, where the class does not determine the time.
    """

    config: Mapping[str, Any]
    inputs: Mapping[str, tuple[int, ...] | Tensor]
    structure: Mapping[str, Any] = field(default_factory=dict)
    scheduler: str = "DDIMScheduler"
    time_scale: float | None = None


FLOW = "FlowMatchEulerDiscreteScheduler"


def build_denoiser(name: str, seed: int = 0) -> Any:
    """Return the network of class `name` with random weights; parameters that start at zero are drawn too."""
    import diffusers

    torch.manual_seed(seed)
    network = getattr(diffusers, name)(**DENOISERS[name].config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if not bool(parameter.any()) or not bool(parameter.isfinite().all()):
                parameter.normal_(std=0.1)
    return network


def example_tensors(name: str, seed: int = 0) -> dict[str, Tensor]:
    """Return the tensors of the example file, `[1, ...]` each."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: value if isinstance(value, Tensor) else torch.randn(value, generator=generator)
        for key, value in DENOISERS[name].inputs.items()
    }


def mask(*shape: int) -> Tensor:
    """A mask of ones, `[1, *shape]`."""
    return torch.ones(1, *shape, dtype=torch.bool)


def padded(tokens: int) -> Tensor:
    """A mask whose last token is padding, `[1, tokens]`."""
    return (torch.arange(tokens) < tokens - 1)[None]


def sizes(*values: float) -> Tensor:
    """Numbers of one sample, `[1, n]`."""
    return torch.tensor([values], dtype=torch.float32)


def grid(side: int, first: int = 0, axes: int = 3) -> Tensor:
    """Positions `[1, side * side, axes]` of a square of image tokens; the last two axes are row and column."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    ids = torch.full((side * side, axes), float(first))
    ids[:, -2], ids[:, -1] = rows.flatten(), columns.flatten()
    return ids[None]


def line(tokens: int, axes: int = 3, axis: int = 0) -> Tensor:
    """Positions `[1, tokens, axes]` of text tokens along one axis."""
    ids = torch.zeros(tokens, axes)
    ids[:, axis] = torch.arange(tokens)
    return ids[None]


UNET3D = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
    "attention_head_dim": 4,
    "layers_per_block": 1,
}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
TEXT_12 = {"encoder_hidden_states": (1, TEXT, 12)}
PACKED = {"hidden_states": (1, 16, 8)}
POSITIONS = {"img_ids": {"$shared": "img_ids"}, "txt_ids": {"$shared": "txt_ids"}}
POSITION_TENSORS = {"img_ids": grid(4), "txt_ids": line(TEXT)}

DENOISERS: dict[str, Denoiser] = {
    "UNet1DModel": Denoiser(
        {
            "block_out_channels": (8, 8, 16),
            "in_channels": 4,
            "out_channels": 4,
            "time_embedding_type": "positional",
            "use_timestep_embedding": True,
            "flip_sin_to_cos": False,
            "freq_shift": 1.0,
            "out_block_type": "OutConv1DBlock",
            "mid_block_type": "MidResTemporalBlock1D",
            "down_block_types": ("DownResnetBlock1D",) * 3,
            "up_block_types": ("UpResnetBlock1D",) * 2,
            "act_fn": "swish",
        },
        {"sample": (1, 4, 16)},
    ),
    "UNet2DModel": Denoiser(
        {
            "sample_size": 8,
            "in_channels": 3,
            "out_channels": 3,
            "layers_per_block": 1,
            "block_out_channels": (8, 16),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "norm_num_groups": 4,
            "attention_head_dim": 8,
        },
        {},
    ),
    "UNet2DConditionModel": Denoiser(
        {
            "sample_size": 8,
            "layers_per_block": 1,
            "block_out_channels": (8, 16),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "norm_num_groups": 4,
            "cross_attention_dim": 12,
            "attention_head_dim": 2,
        },
        {},
    ),
    "UNet3DConditionModel": Denoiser(
        {
            **UNET3D,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        },
        {"sample": (1, 4, 2, 8, 8), "encoder_hidden_states": (1, TEXT, 8)},
    ),
    "UNetMotionModel": Denoiser(
        {
            "sample_size": 8,
            "block_out_channels": (8, 16),
            "norm_num_groups": 4,
            "cross_attention_dim": 8,
            "num_attention_heads": 2,
            "layers_per_block": 1,
            "motion_num_attention_heads": 2,
            "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
        },
        {"sample": (1, 4, 2, 8, 8), "text": (1, TEXT, 8)},
        {"encoder_hidden_states": {"$tensor": "text", "repeat": 2}},
    ),
    "UNetSpatioTemporalConditionModel": Denoiser(
        {
            "sample_size": 8,
            "in_channels": 8,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "cross_attention_dim": 8,
            "num_attention_heads": (2, 4),
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24,
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        },
        {
            "sample": (1, 2, 4, 8, 8),
            "image": (1, 2, 4, 8, 8),
            "encoder_hidden_states": (1, 1, 8),
            "added_time_ids": sizes(6, 127, 0.02),
        },
        {"sample": {"$concat": [{"$tensor": "sample"}, {"$tensor": "image"}], "dim": 2}},
        scheduler="EulerDiscreteScheduler",
    ),
    "I2VGenXLUNet": Denoiser(
        {
            **UNET3D,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        },
        {
            "sample": (1, 4, 2, 8, 8),
            "fps": torch.tensor([16]),
            "image_latents": (1, 4, 2, 8, 8),
            "image_embeddings": (1, 8),
            "encoder_hidden_states": (1, TEXT, 8),
        },
    ),
    "AudioLDM2UNet2DConditionModel": Denoiser(
        {
            "sample_size": 8,
            "block_out_channels": (8, 16),
            "norm_num_groups": 4,
            "cross_attention_dim": ((None, 8, None, 12),) * 2,
            "attention_head_dim": 2,
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        },
        {"encoder_hidden_states": (1, 4, 8), "encoder_hidden_states_1": (1, TEXT, 12)},
    ),
    "Kandinsky3UNet": Denoiser(
        {
            "time_embedding_dim": 16,
            "groups": 2,
            "attention_head_dim": 4,
            "layers_per_block": 2,
            "block_out_channels": (8, 16, 32, 64),
            "cross_attention_dim": 8,
            "encoder_hid_dim": 12,
        },
        {"sample": (1, 4, 16, 16), **TEXT_12, "encoder_attention_mask": padded(TEXT).float()},
    ),
    "StableCascadeUNet": Denoiser(
        {
            "in_channels": 4,
            "out_channels": 4,
            "timestep_ratio_embedding_dim": 8,
            "conditioning_dim": 8,
            "block_out_channels": (8, 16),
            "num_attention_heads": (0, 2),
            "down_num_layers_per_block": (1, 1),
            "up_num_layers_per_block": (1, 1),
            "block_types_per_layer": (
                ("SDCascadeResBlock", "SDCascadeTimestepBlock"),
                ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
            ),
            "switch_level": (False,),
            "clip_text_pooled_in_channels": 8,
            "clip_seq": 2,
        },
        {"sample": (1, 4, 8, 8), "clip_text_pooled": (1, 1, 8)},
        scheduler="DDPMScheduler",
        time_scale=0.001,
    ),
    "DiTTransformer2DModel": Denoiser(
        {
            **HEADS,
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 2,
            "patch_size": 2,
            "num_embeds_ada_norm": 10,
            "norm_type": "ada_norm_zero",
            "norm_elementwise_affine": False,
        },
        {},
    ),
    "PixArtTransformer2DModel": Denoiser(
        {
            **HEADS,
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 2,
            "cross_attention_dim": 32,
            "caption_channels": 12,
        },
        {},
    ),
    "SD3Transformer2DModel": Denoiser(
        {
            **HEADS,
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "joint_attention_dim": 12,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 10,
            "pos_embed_max_size": 8,
        },
        {},
        scheduler=FLOW,
    ),
    "FluxTransformer2DModel": Denoiser(
        {
            **HEADS,
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "joint_attention_dim": 12,
            "pooled_projection_dim": 10,
            "axes_dims_rope": (4, 4, 8),
        },
        {},
        scheduler=FLOW,
    ),
    "PriorTransformer": Denoiser(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 4,
            "num_layers": 2,
            "embedding_dim": 8,
            "num_embeddings": 5,
            "additional_embeddings": 4,
        },
        {"hidden_states": (1, 8), "proj_embedding": (1, 8), "encoder_hidden_states": (1, 5, 8)},
        scheduler="DDPMScheduler",
    ),
    "AuraFlowTransformer2DModel": Denoiser(
        {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "caption_projection_dim": 16,
            "pos_embed_max_size": 16,
        },
        {**TEXT_12},
        scheduler=FLOW,
    ),
    "AllegroTransformer3DModel": Denoiser(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 24,
            "num_layers": 2,
            "cross_attention_dim": 48,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 8,
            "caption_channels": 12,
        },
        {
            "hidden_states": (1, 4, 2, 8, 8),
            **TEXT_12,
            "encoder_attention_mask": padded(TEXT).float(),
            "attention_mask": torch.ones(1, 2, 8, 8),
            **{f"{kind}.{axis}": (1, 4, 8) for kind in ("cos", "sin") for axis in "thw"},
            "t": torch.arange(2).repeat_interleave(16)[None, None],
            "h": torch.arange(4).repeat_interleave(4).repeat(2)[None, None],
            "w": torch.arange(4).repeat(8)[None, None],
        },
        {
            "image_rotary_emb": [
                [[{"$shared": f"cos.{axis}"}, {"$shared": f"sin.{axis}"}] for axis in "thw"],
                [{"$shared": axis} for axis in "thw"],
            ],
        },
        scheduler="EulerAncestralDiscreteScheduler",
    ),
    "BriaTransformer2DModel": Denoiser(
        {
            **HEADS,
            "in_channels": 8,
            "num_layers": 1,
            "num_single_layers": 1,
            "joint_attention_dim": 12,
            "pooled_projection_dim": None,
            "axes_dims_rope": (0, 8, 8),
        },
        {**PACKED, **TEXT_12, **POSITION_TENSORS},
        POSITIONS,
        scheduler=FLOW,
        time_scale=1.0,
    ),
    "BriaFiboTransformer2DModel": Denoiser(
        {
            **HEADS,
            "in_channels": 8,
            "num_layers": 1,
            "num_single_layers": 1,
            "joint_attention_dim": 12,
            "text_encoder_dim": 6,
            "pooled_projection_dim": None,
            "axes_dims_rope": (0, 8, 8),
        },
        {**PACKED, **TEXT_12, **POSITION_TENSORS, "first": (1, TEXT, 6), "second": (1, TEXT, 6)},
        {
            **POSITIONS,
            "text_encoder_layers": [{"$tensor": "first"}, {"$tensor": "second"}],
        },
        scheduler=FLOW,
        time_scale=1.0,
    ),
    "ChromaTransformer2DModel": Denoiser(
        {
            **HEADS,
            "in_channels": 8,
            "num_layers": 1,
            "num_single_layers": 1,
            "joint_attention_dim": 12,
            "axes_dims_rope": (4, 4, 8),
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 16,
            "approximator_layers": 1,
        },
        {**PACKED, **TEXT_12, **POSITION_TENSORS, "attention_mask": mask(16 + TEXT)},
        POSITIONS,
        scheduler=FLOW,
    ),
    "CogVideoXTransformer3DModel": Denoiser(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 8,
            "text_embed_dim": 12,
            "num_layers": 2,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 5,
            "max_text_seq_length": TEXT,
            "use_rotary_positional_embeddings": True,
        },
        {"hidden_states": (1, 2, 4, 8, 8), **TEXT_12, "cos": (1, 32, 16), "sin": (1, 32, 16)},
        {"image_rotary_emb": [{"$shared": "cos"}, {"$shared": "sin"}]},
        scheduler="CogVideoXDDIMScheduler",
    ),
    "ConsisIDTransformer3DModel": Denoiser(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 24,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 8,
            "text_embed_dim": 12,
            "num_layers": 2,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 5,
            "max_text_seq_length": TEXT,
            "is_train_face": True,
            "cross_attn_interval": 1,
            "cross_attn_dim_head": 8,
            "cross_attn_num_heads": 2,
            "LFE_id_dim": 6,
            "LFE_vit_dim": 8,
            "LFE_depth": 5,
            "LFE_dim_head": 8,
            "LFE_num_heads": 2,
            "LFE_num_id_token": 1,
            "LFE_num_querie": 2,
            "LFE_output_dim": 32,
            "LFE_num_scale": 5,
        },
        {
            "hidden_states": (1, 2, 4, 8, 8),
            **TEXT_12,
            "id_cond": (1, 6),
            **{f"vit.{i}": (1, 3, 8) for i in range(5)},
        },
        {"id_vit_hidden": [{"$tensor": f"vit.{i}"} for i in range(5)]},
        scheduler="CogVideoXDDIMScheduler",
    ),
    "CogView3PlusTransformer2DModel": Denoiser(
        {
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "out_channels": 4,
            "text_embed_dim": 12,
            "time_embed_dim": 8,
            "condition_dim": 2,
            "pos_embed_max_size": 8,
            "sample_size": 8,
        },
        {
            **TEXT_12,
            "original_size": sizes(64, 64),
            "target_size": sizes(64, 64),
            "crop_coords": sizes(0, 0),
        },
        scheduler="CogVideoXDDIMScheduler",
    ),
    "CogView4Transformer2DModel": Denoiser(
        {
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "out_channels": 4,
            "text_embed_dim": 12,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "sample_size": 8,
        },
        {
            **TEXT_12,
            "original_size": sizes(64, 64),
            "target_size": sizes(64, 64),
            "crop_coords": sizes(0, 0),
        },
        scheduler=FLOW,
        time_scale=1.0,
    ),
    "CosmosTransformer3DModel": Denoiser(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 2,
            "mlp_ratio": 2,
            "text_embed_dim": 12,
            "adaln_lora_dim": 4,
            "max_size": (4, 32, 32),
            "patch_size": (1, 2, 2),
            "rope_scale": (2.0, 1.0, 1.0),
            "concat_padding_mask": False,
            "extra_pos_embed_type": "learnable",
        },
        {
            "hidden_states": (1, 4, 2, 8, 8),
            **TEXT_12,
        },
        {"fps": 30},
        scheduler=FLOW,
        time_scale=0.001,
    ),
    "EasyAnimateTransformer3DModel": Denoiser(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "mmdit_layers": 1,
            "patch_size": 2,
            "sample_height": 8,
            "sample_width": 8,
            "text_embed_dim": 12,
            "time_embed_dim": 8,
        },
        {"hidden_states": (1, 4, 2, 8, 8), **TEXT_12},
        scheduler=FLOW,
        time_scale=1.0,
    ),
    "Flux2Transformer2DModel": Denoiser(
        {
            **HEADS,
            "in_channels": 8,
            "num_layers": 1,
            "num_single_layers": 1,
            "joint_attention_dim": 12,
            "timestep_guidance_channels": 16,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        {
            **PACKED,
            **TEXT_12,
            "img_ids": grid(4, axes=4),
            "txt_ids": line(TEXT, 4, 3),
            "guidance": torch.tensor([3.5]),
        },
        scheduler=FLOW,
    ),
    "GlmImageTransformer2DModel": Denoiser(
        {
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "text_embed_dim": 12,
            "time_embed_dim": 16,
            "condition_dim": 8,
            "prior_vq_quantizer_codebook_size": 64,
        },
        {
            "hidden_states": (1, 4, 8, 8),
            **TEXT_12,
            "prior_token_id": torch.arange(16)[None],
            "prior_token_drop": torch.zeros(1, 16, dtype=torch.bool),
            "target_size": sizes(8, 8),
            "crop_coords": sizes(0, 0),
        },
        scheduler=FLOW,
        time_scale=1.0,
    ),
    "HiDreamImageTransformer2DModel": Denoiser(
        {
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "caption_channels": [12, 6],
            "text_emb_dim": 8,
            "num_routed_experts": 2,
            "num_activated_experts": 2,
            "axes_dims_rope": (4, 2, 2),
            "max_resolution": (8, 8),
            "llama_layers": (0, 1),
            "force_inference_output": True,
        },
        {
            "hidden_states": (1, 4, 8, 8),
            "encoder_hidden_states_t5": (1, TEXT, 12),
            "llama": (1, 2, TEXT, 6),
            "pooled_embeds": (1, 8),
        },
        {"encoder_hidden_states_llama3": {"$tensor": "llama", "dim": 1}},
        scheduler=FLOW,
        time_scale=1.0,
    ),
    "HunyuanDiT2DModel": Denoiser(
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "cross_attention_dim": 12,
            "cross_attention_dim_t5": 16,
            "pooled_projection_dim": 4,
            "hidden_size": 16,
            "text_len": TEXT,
            "text_len_t5": TEXT,
            "activation_fn": "gelu-approximate",
        },
        {
            **TEXT_12,
            "text_embedding_mask": padded(TEXT).float(),
            "encoder_hidden_states_t5": (1, TEXT, 16),
            "text_embedding_mask_t5": padded(TEXT).float(),
            "image_meta_size": sizes(64, 64, 64, 64, 0, 0),
            "style": torch.tensor([0]),
            "cos": (1, 16, 8),
            "sin": (1, 16, 8),
        },
        {"image_rotary_emb": [{"$shared": "cos"}, {"$shared": "sin"}]},
        scheduler="DDPMScheduler",
    ),
    "HunyuanImageTransformer2DModel": Denoiser(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": 12,
            "rope_axes_dim": (8, 8),
        },
        {"hidden_states": (1, 4, 8, 8), **TEXT_12, "encoder_attention_mask": padded(TEXT).long()},
        scheduler=FLOW,
        time_scale=1.0,
    ),
    "HunyuanVideoTransformer3DModel": Denoiser(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 10,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "patch_size": 2,
            "patch_size_t": 1,
            "guidance_embeds": True,
            "text_embed_dim": 12,
            "pooled_projection_dim": 8,
            "rope_axes_dim": (2, 4, 4),
        },
        {
            "hidden_states": (1, 4, 2, 8, 8),
            **TEXT_12,
            "encoder_attention_mask": padded(TEXT),
            "pooled_projections": (1, 8),
            "guidance": torch.tensor([6000.0]),
        },
        scheduler=FLOW,
    ),
    "Kandinsky5Transformer3DModel": Denoiser(
        {
            "in_visual_dim": 4,
            "in_text_dim": 12,
            "in_text_dim2": 8,
            "time_dim": 8,
            "out_visual_dim": 4,
            "model_dim": 32,
            "ff_dim": 32,
            "num_text_blocks": 1,
            "num_visual_blocks": 1,
            "axes_dims": (4, 4, 8),
        },
        {
            "hidden_states": (1, 2, 8, 8, 4),
            **TEXT_12,
            "pooled_projections": (1, 8),
            "text_positions": torch.arange(TEXT)[None],
            "frames": torch.arange(2)[None],
            "rows": torch.arange(4)[None],
        },
        {
            "visual_rope_pos": [{"$shared": "frames"}, {"$shared": "rows"}, {"$shared": "rows"}],
            "text_rope_pos": {"$shared": "text_positions"},
        },
        scheduler=FLOW,
    ),
    "LTXVideoTransformer3DModel": Denoiser(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "cross_attention_dim": 32,
            "num_layers": 2,
            "caption_channels": 12,
        },
        {"hidden_states": (1, 32, 4), **TEXT_12, "encoder_attention_mask": padded(TEXT)},
        {"num_frames": 2, "height": 4, "width": 4},
        scheduler=FLOW,
    ),
    "LatteTransformer3DModel": Denoiser(
        {
            "sample_size": 8,
            "num_layers": 1,
            "patch_size": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "caption_channels": 12,
            "in_channels": 4,
            "cross_attention_dim": 16,
            "out_channels": 8,
            "attention_bias": True,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "video_length": 2,
        },
        {"hidden_states": (1, 4, 2, 8, 8), **TEXT_12},
    ),
    "LongCatImageTransformer2DModel": Denoiser(
        {
            **HEADS,
            "in_channels": 8,
            "num_layers": 1,
            "num_single_layers": 1,
            "joint_attention_dim": 12,
            "pooled_projection_dim": 12,
            "axes_dims_rope": (4, 4, 8),
        },
        {**PACKED, **TEXT_12, **POSITION_TENSORS},
        POSITIONS,
        scheduler=FLOW,
    ),
    "Lumina2Transformer2DModel": Denoiser(
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 2,
            "axes_dim_rope": (4, 2, 2),
            "axes_lens": (32, 32, 32),
            "cap_feat_dim": 12,
        },
        {**TEXT_12, "encoder_attention_mask": mask(TEXT)},
        scheduler=FLOW,
    ),
    "LuminaNextDiT2DModel": Denoiser(
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 2,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "learn_sigma": False,
            "cross_attention_dim": 12,
        },
        {**TEXT_12, "encoder_mask": mask(TEXT).float(), "rotary": (1, 16, 16, 4)},
        {"image_rotary_emb": {"$shared": "rotary"}, "cross_attention_kwargs": {}},
        scheduler=FLOW,
    ),
    "MochiTransformer3DModel": Denoiser(
        {
            "patch_size": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "pooled_projection_dim": 16,
            "in_channels": 4,
            "qk_norm": "rms_norm",
            "text_embed_dim": 16,
            "time_embed_dim": 4,
            "activation_fn": "swiglu",
            "max_sequence_length": TEXT,
        },
        {
            "hidden_states": (1, 4, 2, 8, 8),
            "encoder_hidden_states": (1, TEXT, 16),
            "encoder_attention_mask": padded(TEXT),
        },
        scheduler=FLOW,
    ),
    "OmniGenTransformer2DModel": Denoiser(
        {
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 32,
            "num_layers": 2,
            "pad_token_id": 0,
            "vocab_size": 100,
            "in_channels": 4,
            "time_step_dim": 8,
            "rope_scaling": {"long_factor": [1, 2, 3, 4], "short_factor": [1, 2, 3, 4]},
        },
        {
            "hidden_states": (1, 4, 8, 8),
            "input_ids": torch.arange(TEXT)[None],
            "attention_mask": torch.ones(1, TEXT + 17, TEXT + 17),
            "position_ids": torch.arange(TEXT + 17)[None],
        },
        {"input_img_latents": [], "input_image_sizes": {}},
        scheduler=FLOW,
        time_scale=-0.001,
    ),
    "OvisImageTransformer2DModel": Denoiser(
        {
            **HEADS,
            "in_channels": 8,
            "out_channels": 8,
            "num_layers": 1,
            "num_single_layers": 1,
            "joint_attention_dim": 12,
            "axes_dims_rope": (4, 4, 8),
        },
        {**PACKED, **TEXT_12, **POSITION_TENSORS},
        POSITIONS,
        scheduler=FLOW,
    ),
    "PRXTransformer2DModel": Denoiser(
        {
            "in_channels": 4,
            "patch_size": 2,
            "context_in_dim": 12,
            "hidden_size": 32,
            "num_heads": 2,
            "depth": 2,
            "axes_dim": [8, 8],
        },
        {"hidden_states": (1, 4, 8, 8), **TEXT_12, "attention_mask": padded(TEXT)},
        scheduler=FLOW,
    ),
    "QwenImageTransformer2DModel": Denoiser(
        {
            **HEADS,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "joint_attention_dim": 12,
            "axes_dims_rope": (4, 6, 6),
        },
        {"hidden_states": (1, 16, 16), **TEXT_12, "encoder_hidden_states_mask": mask(TEXT)},
        {"img_shapes": {"$each": [[1, 4, 4]]}},
        scheduler=FLOW,
    ),
    "SanaTransformer2DModel": Denoiser(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": 12,
            "sample_size": 8,
        },
        {**TEXT_12, "encoder_attention_mask": padded(TEXT).float()},
        scheduler=FLOW,
    ),
    "SanaVideoTransformer3DModel": Denoiser(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 12,
            "num_attention_heads": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 12,
            "cross_attention_dim": 24,
            "caption_channels": 12,
            "sample_size": 8,
        },
        {"hidden_states": (1, 4, 2, 8, 8), **TEXT_12},
        scheduler=FLOW,
        time_scale=1.0,
    ),
    "SkyReelsV2Transformer3DModel": Denoiser(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 12,
            "freq_dim": 16,
            "ffn_dim": 32,
            "num_layers": 2,
            "rope_max_seq_len": 32,
        },
        {"hidden_states": (1, 4, 1, 8, 8), **TEXT_12},
        scheduler=FLOW,
        time_scale=1.0,
    ),
    "StableAudioDiTModel": Denoiser(
        {
            "sample_size": 16,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "num_key_value_attention_heads": 1,
            "out_channels": 4,
            "cross_attention_dim": 8,
            "time_proj_dim": 8,
            "global_states_input_dim": 8,
            "cross_attention_input_dim": 12,
        },
        {
            "hidden_states": (1, 4, 16),
            **TEXT_12,
            "global_hidden_states": (1, 1, 8),
            "cos": (1, 17, 4),
            "sin": (1, 17, 4),
        },
        {"rotary_embedding": [{"$shared": "cos"}, {"$shared": "sin"}]},
        scheduler="EDMDPMSolverMultistepScheduler",
    ),
    "Transformer2DModel": Denoiser(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 2,
            "cross_attention_dim": 32,
            "caption_channels": 12,
            "sample_size": 8,
            "patch_size": 2,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "num_embeds_ada_norm": 1000,
            "attention_bias": True,
        },
        {**TEXT_12},
        {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    ),
    "WanTransformer3DModel": Denoiser(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 12,
            "freq_dim": 16,
            "ffn_dim": 32,
            "num_layers": 2,
            "rope_max_seq_len": 32,
        },
        {"hidden_states": (1, 4, 2, 8, 8), **TEXT_12},
        scheduler="UniPCMultistepScheduler",
    ),
    "WanVACETransformer3DModel": Denoiser(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 12,
            "freq_dim": 16,
            "ffn_dim": 32,
            "num_layers": 2,
            "rope_max_seq_len": 32,
            "vace_layers": [0],
            "vace_in_channels": 12,
        },
        {"hidden_states": (1, 4, 2, 8, 8), **TEXT_12, "control_hidden_states": (1, 12, 2, 8, 8)},
        scheduler="UniPCMultistepScheduler",
    ),
    "ZImageTransformer2DModel": Denoiser(
        {
            "in_channels": 4,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 12,
            "axes_dims": [4, 6, 6],
            "axes_lens": [64, 16, 16],
        },
        {"x": (1, 4, 1, 8, 8), "text": (1, TEXT, 12)},
        {"x": {"$each": {"$tensor": "x"}}, "cap_feats": {"$each": {"$tensor": "text"}}},
        scheduler=FLOW,
    ),
}
"""Networks by the diffusers class, in the table's order."""
