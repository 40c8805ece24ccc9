"""Small random models that know text: a CLIP and a Stable Diffusion pipeline, as their libraries write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

D = 12
"""Length of the tiny CLIP's embeddings."""
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def tokenizer_files(path: Path) -> dict[str, Any]:
    """Write a tokenizer of single letters; returns the text model's settings that go with it."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    path.mkdir(parents=True, exist_ok=True)
    (path / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 16})
    )
    return {"vocab_size": len(tokens), "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1}


def tiny_clip(path: Path) -> Path:
    """A CLIPModel directory: two small towers and the tokenizer."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    text = tokenizer_files(path)
    config = CLIPConfig(
        text_config={**TOWER, **text}, vision_config={**TOWER, "image_size": 32, "patch_size": 8}, projection_dim=D
    )
    CLIPModel(config).save_pretrained(path)
    return path


def tiny_stable_diffusion(path: Path) -> Path:
    """A StableDiffusionPipeline of 4x4 latents and 8x8 RGB images."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    text = tokenizer_files(path / "tokenizer")
    unet = UNet2DConditionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=2,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(CLIPTextConfig(**TOWER, **text)),
        tokenizer=CLIPTokenizer.from_pretrained(path / "tokenizer"),
        unet=unet,
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(path)
    return path
