"""Small real models and helper functions for tests."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

if TYPE_CHECKING:
    from dqtool.nn.layers import FakeQuantLayer

__all__ = [
    "NETWORK",
    "SCHEDULER",
    "listing",
    "load_json",
    "refused",
    "resigned",
    "rewrite_weights",
    "tiny_pipeline",
    "weights_of",
]

NETWORK = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}
SCHEDULER = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"}


def tiny_pipeline(path: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **network: Any) -> Path:
    """Write a DDIMPipeline with a random UNet2DModel of 8x8 pixels (self-attention included) and return `path`."""
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    torch.manual_seed(seed)
    unet = nn.Module.to(UNet2DModel(**{**NETWORK, **network}), dtype)  # diffusers' own `to` warns of dtypes
    DDIMPipeline(unet=unet, scheduler=DDIMScheduler(**SCHEDULER)).save_pretrained(path)
    return path


def weights_of(pipeline: Path) -> Path:
    """Return the path of the network's weights in a pipeline directory."""
    return pipeline / "unet" / "diffusion_pytorch_model.safetensors"


def rewrite_weights(pipeline: Path, changes: Mapping[str, torch.Tensor]) -> None:
    """Replace some tensors of a pipeline's network."""
    path = weights_of(pipeline)
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    os.unlink(path)
    save_file({**tensors, **changes}, path, metadata={"format": "pt"})


def listing(path: Path) -> dict[str, bytes | None]:
    """Return everything under `path` by relative name: content of files, None for directories. Equal listings mean no
    change."""
    return {
        entry.relative_to(path).as_posix(): entry.read_bytes() if entry.is_file() else None
        for entry in sorted(path.rglob("*"))
    }


def load_json(text: str) -> Any:
    """Return the JSON value in `text`, which must be one line."""
    assert text.count("\n") == 1, text
    return json.loads(text)


def refused(run: Callable[..., Any], directory: Path, code: int, *arguments: str) -> str:
    """Run a command line that must fail with `code`, print one paragraph and change nothing; return that paragraph."""
    before = listing(directory)
    result = run(*arguments, cwd=directory)
    assert (result.returncode, result.stdout) == (code, ""), result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("dqtool"), result.stderr
    assert "Traceback" not in result.stderr
    assert len(last) < 700, last
    assert listing(directory) == before
    return last


def resigned(note: Path, content: dict[str, Any]) -> None:
    """Write a manifest with the checksum of its content."""
    from dqtool.artifacts.manifest import canonical_json

    content.pop("checksum", None)
    checksum = hashlib.sha256(canonical_json(content).encode()).hexdigest()
    note.write_text(json.dumps({**content, "checksum": checksum}))


T = 6
"""Number of steps of `quantized_conv`."""


def quantized_conv() -> FakeQuantLayer:
    """Return a 4/4 convolution with step tables for `T` steps at timesteps 0, 10, ..."""
    from dqtool.core.bits import LayerBits
    from dqtool.nn.layers import FakeQuantLayer
    from dqtool.nn.steps import StepIndex

    torch.manual_seed(0)
    layer = FakeQuantLayer(nn.Conv2d(3, 4, 3, padding=1), LayerBits(4, 4), StepIndex(torch.arange(T) * 10.0))
    layer.input_scale = nn.Parameter(torch.rand(T) * 0.1 + 0.1)
    layer.input_zero_point = nn.Parameter(torch.full((T,), 7.0))
    layer.weight_scale = nn.Parameter(torch.full((4,), 0.05))
    layer.weight_zero_point = nn.Parameter(torch.full((4,), 8.0))
    return layer
