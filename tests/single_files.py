"""Single files written from tiny networks, with the names that the authors of Stable Diffusion give their tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from original_networks import FirstStage, UNetModel, randomize
from safetensors.torch import save_file
from torch import Tensor, nn

LAYERS = "text_model.encoder.layers."


def tokenizer(path: Path) -> int:
    """Write a tokenizer of prompts about digits, with "!" among its tokens; returns the size of its vocabulary."""
    from dqtool.zoo.prompts import write_tokenizer

    return write_tokenizer(path)


def text_tower(vocabulary: int, width: int, layers: int, quick: bool, projection: int | None = None) -> nn.Module:
    """A CLIP text model with heads of 64 channels and random weights; with `projection` it projects its pooled state."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        max_position_embeddings=16,
        hidden_act="quick_gelu" if quick else "gelu",
        projection_dim=projection or width,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    torch.manual_seed(width)
    model = CLIPTextModel(config) if projection is None else CLIPTextModelWithProjection(config)
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.05 * torch.randn_like(parameter)
    return model.eval()


def clip_names(model: nn.Module) -> dict[str, Tensor]:
    """Its tensors as OpenAI's CLIP in transformers names them, `text_model.` in front."""
    return {
        name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}": tensor
        for name, tensor in model.state_dict().items()
        if not name.endswith("position_ids")
    }


def open_clip_names(model: nn.Module) -> dict[str, Tensor]:
    """Its tensors as OpenCLIP names them: one product for q, k and v, the projection transposed."""
    state = clip_names(model)
    renamed = {
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "ln_final.weight": state["text_model.final_layer_norm.weight"],
        "ln_final.bias": state["text_model.final_layer_norm.bias"],
    }
    if "text_projection.weight" in state:
        renamed["text_projection"] = state["text_projection.weight"].T.contiguous()
    parts = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    for index in range(len({name[len(LAYERS) :].split(".")[0] for name in state if name.startswith(LAYERS)})):
        old, new = f"{LAYERS}{index}.", f"transformer.resblocks.{index}."
        for leaf in ("weight", "bias"):
            products = [state[f"{old}self_attn.{which}_proj.{leaf}"] for which in "qkv"]
            renamed[f"{new}attn.in_proj_{leaf}"] = torch.cat(products)
            renamed[f"{new}attn.out_proj.{leaf}"] = state[f"{old}self_attn.out_proj.{leaf}"]
            renamed |= {f"{new}{theirs}.{leaf}": state[f"{old}{ours}.{leaf}"] for ours, theirs in parts.items()}
    return renamed


def prefixed(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under longer names."""
    return {prefix + name: tensor.detach().clone().contiguous() for name, tensor in state.items()}


TINY = {"model_channels": 32, "channel_mult": (1, 2), "attention": (1, 2), "blocks": 1, "heads": 2}
"""Options of a `UNetModel` of two resolutions."""


def write(path: Path, context: int, texts: Mapping[str, Mapping[str, Tensor]], **unet: Any) -> tuple[nn.Module, Any]:
    """Write a single file of a UNet, an autoencoder and text encoders by prefix; returns the UNet and the autoencoder."""
    network = randomize(UNetModel(**{**TINY, "context": context, **unet}))
    stage: Any = randomize(FirstStage(widths=(32, 32)))
    state = prefixed("model.diffusion_model.", network.state_dict()) | prefixed(
        "first_stage_model.", stage.state_dict()
    )
    for prefix, tensors in texts.items():
        state |= prefixed(prefix, tensors)
    save_file(state, path)
    return network, stage


def unet_config(path: Path, context: int, **more: Any) -> str:
    """Write the diffusers config of `TINY`; returns its path."""
    config = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ["CrossAttnDownBlock2D"] * 2,
        "up_block_types": ["CrossAttnUpBlock2D"] * 2,
        "block_out_channels": [32, 64],
        "layers_per_block": 1,
        "cross_attention_dim": context,
        "attention_head_dim": 2,
        **more,
    }
    path.write_text(json.dumps(config))
    return str(path)
