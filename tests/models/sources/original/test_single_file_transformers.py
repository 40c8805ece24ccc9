"""Single files of Stable Diffusion 3 and FLUX.1, at full size without weights: configs, heads, parameters, converted names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dqtool.errors import ArtifactError
from dqtool.models.sources.original import LAYOUTS, Known

Shapes = dict[str, tuple[int, ...]]


def linear(name: str, width: int, wide: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (wide, width)} | ({f"{name}.bias": (wide,)} if bias else {})


def joint_block(prefix: str, width: int, norm: bool, dual: bool, last: bool) -> Iterator[Shapes]:
    """The image half (`last` False) of a block of `MMDiT`, or the text half, which ends with its attention in the last block."""
    yield linear(f"{prefix}.attn.qkv", width, 3 * width)
    yield linear(f"{prefix}.adaLN_modulation.1", width, (2 if last else 9 if dual else 6) * width)
    if not last:
        yield linear(f"{prefix}.attn.proj", width, width)
        yield linear(f"{prefix}.mlp.fc1", width, 4 * width)
        yield linear(f"{prefix}.mlp.fc2", 4 * width, width)
    if dual:
        yield linear(f"{prefix}.attn2.qkv", width, 3 * width)
        yield linear(f"{prefix}.attn2.proj", width, width)
    if norm:
        yield {f"{prefix}.attn{n}.ln_{which}.weight": (64,) for n in (("", "2") if dual else ("",)) for which in "qk"}


def sd3(depth: int, norm: bool, dual: int, positions: int) -> Shapes:
    width = 64 * depth
    shapes: Shapes = {"pos_embed": (1, positions**2, width), "x_embedder.proj.weight": (width, 16, 2, 2)}
    shapes["x_embedder.proj.bias"] = (width,)
    for name, given in (("t_embedder", 256), ("y_embedder", 2048)):
        shapes |= linear(f"{name}.mlp.0", given, width) | linear(f"{name}.mlp.2", width, width)
    shapes |= linear("context_embedder", 4096, width)
    for block in range(depth):
        for part in (
            *joint_block(f"joint_blocks.{block}.x_block", width, norm, block < dual, False),
            *joint_block(f"joint_blocks.{block}.context_block", width, norm, False, block == depth - 1),
        ):
            shapes |= part
    return shapes | linear("final_layer.linear", width, 64) | linear("final_layer.adaLN_modulation.1", width, 2 * width)


def flux(doubles: int, singles: int, guidance: bool, channels: int = 64, width: int = 3072) -> Shapes:
    shapes = linear("img_in", channels, width) | linear("txt_in", 4096, width)
    embedders = (("time_in", 256), ("vector_in", 768), *([("guidance_in", 256)] if guidance else []))
    for name, given in embedders:
        shapes |= linear(f"{name}.in_layer", given, width) | linear(f"{name}.out_layer", width, width)
    for block in range(doubles):
        for side in ("img", "txt"):
            at = f"double_blocks.{block}.{side}_"
            shapes |= linear(f"{at}mod.lin", width, 6 * width) | linear(f"{at}attn.qkv", width, 3 * width)
            shapes |= linear(f"{at}attn.proj", width, width) | linear(f"{at}mlp.0", width, 4 * width)
            shapes |= linear(f"{at}mlp.2", 4 * width, width)
            shapes |= {f"{at}attn.norm.{which}_norm.scale": (128,) for which in ("query", "key")}
    for block in range(singles):
        at = f"single_blocks.{block}."
        shapes |= linear(f"{at}modulation.lin", width, 3 * width) | linear(f"{at}linear1", width, 7 * width)
        shapes |= linear(f"{at}linear2", 5 * width, width)
        shapes |= {f"{at}norm.{which}_norm.scale": (128,) for which in ("query", "key")}
    return shapes | linear("final_layer.linear", width, 64) | linear("final_layer.adaLN_modulation.1", width, 2 * width)


PUBLISHED: dict[str, tuple[Shapes, dict[str, Any], int]] = {
    "sd3-medium": (
        sd3(24, False, 0, 192),
        {"num_attention_heads": 24, "num_layers": 24, "qk_norm": None, "pos_embed_max_size": 192},
        2_028_328_000,
    ),
    "sd35-medium": (
        sd3(24, True, 13, 384),
        {"num_attention_heads": 24, "qk_norm": "rms_norm", "dual_attention_layers": list(range(13))},
        2_243_171_520,
    ),
    "sd35-large": (
        sd3(38, True, 0, 192),
        {"num_attention_heads": 38, "caption_projection_dim": 2432, "dual_attention_layers": []},
        8_056_627_520,
    ),
    "flux-dev": (
        flux(19, 38, True),
        {"num_attention_heads": 24, "attention_head_dim": 128, "guidance_embeds": True, "out_channels": None},
        11_901_408_320,
    ),
    "flux-schnell": (flux(19, 38, False), {"num_single_layers": 38, "guidance_embeds": False}, 11_891_178_560),
    "flux-fill": (flux(19, 38, True, 384), {"in_channels": 384, "out_channels": 64}, 11_902_391_360),
}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_transformers(name: str, prefix: str) -> None:
    import diffusers

    shapes, expected, parameters = PUBLISHED[name]
    shapes = {prefix + key: shape for key, shape in shapes.items()}
    beside: Shapes = {"vae.decoder.conv_out.weight": (3, 128, 3, 3)} if prefix else {}
    layout = next(each for each in LAYOUTS.values() if each.matches(shapes | beside))
    found = layout.describe(shapes | beside, Known(), name)
    assert {key: found.config.get(key) for key in expected} == expected
    with torch.device("meta"):
        network = getattr(diffusers, found.config["_class_name"]).from_config(found.config)
        state: dict[str, Tensor] = {key: torch.empty(shape) for key, shape in (shapes | beside).items()}
    assert sum(p.numel() for p in network.parameters()) == parameters
    converted = layout.convert(state, found.config, name)
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in network.state_dict().items()}
    assert found.scheduler["_class_name"] == "FlowMatchEulerDiscreteScheduler"
    assert found.scheduler["shift"] == (1.0 if name == "flux-schnell" else 3.0)


def test_a_flux_of_another_width_is_refused() -> None:
    shapes = flux(1, 1, True, width=1536)
    with pytest.raises(ArtifactError, match="3072 channels"):
        LAYOUTS["flux"].describe(shapes, Known(), "small")
