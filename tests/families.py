"""One tiny network of every family, as configs, and the pipelines around some of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from helpers import NETWORK

__all__ = [
    "NETWORKS",
    "build",
    "component_directory",
    "dit_pipeline",
    "latent_class_pipeline",
    "text_pipeline",
    "unconditional_pipeline",
]

ATTENTION = {"num_attention_heads": 2, "attention_head_dim": 8}
UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "_context_tokens": 5,
}
NETWORKS: dict[str, dict[str, Any]] = {
    "unet2d": {"_class_name": "UNet2DModel", **NETWORK, "in_channels": 3, "out_channels": 3},
    "unet2d_condition": {"_class_name": "UNet2DConditionModel", **UNET},
    "sdxl": {
        "_class_name": "UNet2DConditionModel",
        **UNET,
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 * 4 + 6,
    },
    "dit": {
        "_class_name": "DiTTransformer2DModel",
        **ATTENTION,
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 8,  # the learned variance of the published models
        "num_layers": 2,
        "patch_size": 2,
        "num_embeds_ada_norm": 10,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
    },
    "pixart": {
        "_class_name": "PixArtTransformer2DModel",
        **ATTENTION,
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "cross_attention_dim": 16,
        "caption_channels": 12,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "_context_tokens": 5,
    },
    "sd3": {
        "_class_name": "SD3Transformer2DModel",
        **ATTENTION,
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "joint_attention_dim": 12,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 10,
        "pos_embed_max_size": 8,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
        "_context_tokens": 5,
    },
    "flux": {
        "_class_name": "FluxTransformer2DModel",
        **ATTENTION,
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 2,
        "joint_attention_dim": 12,
        "pooled_projection_dim": 10,
        "axes_dims_rope": (2, 2, 4),
        "guidance_embeds": True,
        "_context_tokens": 5,
        "_sample_size": 8,
    },
}
"""Tiny configs by the adapter's name; SDXL is the UNet's with added conditions."""


def build(name: str, seed: int = 0, **changes: Any) -> Any:
    """The network with random weights, those that training starts at zero included; `changes` are of its config."""
    from dqtool.models.families import FAMILIES

    config = NETWORKS[name] | changes
    torch.manual_seed(seed)
    network = FAMILIES[config["_class_name"]].build({k: v for k, v in config.items() if k != "_class_name"}).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1 and not bool(parameter.any()):
                parameter.normal_(std=0.1)
    return network


def component_directory(name: str, path: Path) -> Path:
    """A bare component directory with a network of the family."""
    build(name).save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    hints = {key: value for key, value in NETWORKS[name].items() if key.startswith("_")}
    (path / "config.json").write_text(json.dumps(config | hints))
    return path


SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "clip_sample": False,
}


def tiny_vae(channels: int = 1, shift: float | None = None) -> Any:
    """16x16 images to 4x8x8 latents."""
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        shift_factor=shift,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        sample_size=16,
        mid_block_add_attention=False,
    )


def dit_pipeline(path: Path, tied: bool = True) -> Path:
    """A stock DiTPipeline; `tied`: every block repeats one embedder, as in the published checkpoints."""
    from diffusers import DDIMScheduler, DiTPipeline

    network = build("dit")
    if tied:
        embedder = network.transformer_blocks[0].norm1.emb
        network.transformer_blocks[1].norm1.emb.load_state_dict(embedder.state_dict())
    labels = {i: str(i) for i in range(10)}
    DiTPipeline(network, tiny_vae(), DDIMScheduler(**SCHEDULER), id2label=labels).save_pretrained(path)
    return path


def latent_class_pipeline(path: Path, pixels: bool = False) -> Path:
    """Classes as the context of a UNet, with guidance; on `pixels` without a decoder."""
    from diffusers import DDIMScheduler

    from dqtool.models.latent_class import ClassEmbedder, LatentClassPipeline

    torch.manual_seed(2)
    embedder = ClassEmbedder(classes=10, dim=UNET["cross_attention_dim"])
    changes: dict[str, Any] = {"in_channels": 1, "out_channels": 1, "sample_size": 16} if pixels else {}
    network, vae = build("unet2d_condition", **changes), None if pixels else tiny_vae()
    LatentClassPipeline(network, vae, embedder, DDIMScheduler(**SCHEDULER)).save_pretrained(path)
    return path


def clip(path: Path, projection: bool, hidden: int, out: int) -> tuple[Any, Any]:
    """A tiny CLIP text model (with its projection or without) and its tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from dqtool.zoo.prompts import write_tokenizer

    vocabulary = write_tokenizer(path)
    tokenizer = CLIPTokenizer.from_pretrained(path)
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=out,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(3)
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config), tokenizer


def t5(width: int) -> tuple[Any, Any]:
    """A tiny T5 encoder and a tokenizer of letters and digits."""
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        *((c, -3.0) for c in "abcdefghijklmnopqrstuvwxyz0123456789▁"),
    ]
    torch.manual_seed(4)
    encoder = T5EncoderModel(T5Config(vocab_size=64, d_model=width, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    return encoder, T5TokenizerFast(vocab=pieces, extra_ids=0)


def text_pipeline(kind: str, path: Path) -> Path:
    """The stock pipeline of "sd", "sdxl", "pixart", "sd3" (with T5: "sd3-t5") or "flux" around tiny networks, with a card of two prompts."""
    import diffusers

    width = UNET["cross_attention_dim"]
    pipeline: Any
    if kind == "sd":
        text, tokenizer = clip(path / "tokenizer", False, width, width)
        pipeline = diffusers.StableDiffusionPipeline(
            vae=tiny_vae(),
            text_encoder=text,
            tokenizer=tokenizer,
            unet=build("unet2d_condition"),
            scheduler=diffusers.DDIMScheduler(**SCHEDULER),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    elif kind == "sdxl":
        text, tokenizer = clip(path / "tokenizer", False, 4, 4)
        pipeline = diffusers.StableDiffusionXLPipeline(
            vae=tiny_vae(3),
            text_encoder=text,
            text_encoder_2=clip(path / "tokenizer", True, 8, 6)[0],
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            unet=build("sdxl"),
            scheduler=diffusers.EulerDiscreteScheduler(),
        )
    elif kind == "pixart":
        text, tokenizer = t5(12)
        pipeline = diffusers.PixArtAlphaPipeline(
            tokenizer, text, tiny_vae(3), build("pixart"), diffusers.DPMSolverMultistepScheduler()
        )
    elif kind in ("sd3", "sd3-t5"):
        text, tokenizer = clip(path / "tokenizer", True, 4, 4)
        long_text, long_tokenizer = t5(12) if kind == "sd3-t5" else (None, None)
        pipeline = diffusers.StableDiffusion3Pipeline(
            transformer=build("sd3"),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=tiny_vae(3, 0.05),
            text_encoder=text,
            tokenizer=tokenizer,
            text_encoder_2=clip(path / "tokenizer", True, 6, 6)[0],
            tokenizer_2=tokenizer,
            text_encoder_3=long_text,
            tokenizer_3=long_tokenizer,
        )
    else:
        text, tokenizer = clip(path / "tokenizer", False, 10, 10)
        long_text, long_tokenizer = t5(12)
        pipeline = diffusers.FluxPipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=tiny_vae(3, 0.05),
            text_encoder=text,
            tokenizer=tokenizer,
            text_encoder_2=long_text,
            tokenizer_2=long_tokenizer,
            transformer=build("flux"),
        )
    pipeline.save_pretrained(path)
    if kind == "flux":  # its config has no size
        config = json.loads((path / "transformer" / "config.json").read_text())
        (path / "transformer" / "config.json").write_text(json.dumps(config | {"_sample_size": 8}))
    card = {"prompts": [["a handwritten seven", 7], ["the digit 3", 3]]} | ({"guidance": 1.5} if kind == "sd" else {})
    (path / "sampling.json").write_text(json.dumps(card))
    return path


def unconditional_pipeline(path: Path) -> Path:
    """A stock LDMPipeline: latents of a VQModel, no condition."""
    from diffusers import DDIMScheduler, LDMPipeline, UNet2DModel, VQModel

    torch.manual_seed(5)
    vae = VQModel(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=3,
        num_vq_embeddings=16,
        mid_block_add_attention=False,
    )
    config = {k: v for k, v in NETWORKS["unet2d"].items() if k != "_class_name"}
    LDMPipeline(vae, UNet2DModel(**config), DDIMScheduler(**SCHEDULER)).save_pretrained(path)
    return path
