"""UNets of every kind, tiny."""

from __future__ import annotations

import torch
from denoiser_parts import TEXT, TEXT_12, UNET3D, Denoiser, padded, sizes

UNETS: dict[str, Denoiser] = {
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
}
"""Networks by the diffusers class."""
