"""The UNet of openai/guided-diffusion that CompVis' models are made of: its shapes read as a diffusers config."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dqtool.errors import ArtifactError
from dqtool.models.original.layout import Shapes

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "PREFIX",
    "Structure",
    "network_names",
    "network_shapes",
    "network_tensors",
    "scaled_linear",
    "structure",
    "unet_parameters",
]

PREFIX = "model.diffusion_model."
_EMA = "model_ema."
_FIRST = "input_blocks.0.0.weight"


@dataclass(frozen=True)
class Structure:
    """What shapes tell of a `UNetModel`. Lists have an entry per resolution; `heads` can't be told."""

    in_channels: int
    out_channels: int
    channels: list[int]
    layers_per_block: int
    attends: list[bool]
    transformer: bool
    depths: list[int]
    context_dim: int | None
    linear_projection: bool
    scale_shift: bool
    resnet_sampling: bool
    classes: int | None


def network_names(names: Iterable[str]) -> set[str]:
    """Of a file's tensors those of the network, by the names they have there."""
    names = set(names)
    return names if _FIRST in names else {name for name in names if name.startswith(PREFIX)}


def network_shapes(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The network's tensors under their bare names; empty when there is no such network."""
    if _FIRST in shapes:
        return dict(shapes)
    return {name.removeprefix(PREFIX): shape for name, shape in shapes.items() if name.startswith(PREFIX)}


def network_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The network's tensors under their bare names, the averaged ones where the file has them: samples use those."""
    if _FIRST in state:
        return dict(state)
    tensors = {}
    for name, tensor in state.items():
        if name.startswith(PREFIX):
            averaged = _EMA + name.removeprefix("model.").replace(".", "")
            tensors[name.removeprefix(PREFIX)] = state.get(averaged, tensor)
    return tensors


def structure(shapes: Shapes, where: str) -> Structure:
    """What the shapes of a `UNetModel` say.

    Raises:
        ArtifactError: the blocks don't form one.
    """
    blocks = len({name.split(".")[1] for name in shapes if name.startswith("input_blocks.")})
    resnet_sampling = not any(name.endswith(".0.op.weight") for name in shapes)
    # The decoder's first block that ends in an upsampler closes the first resolution.
    ups = [
        int(name.split(".")[1])
        for name in shapes
        if name.startswith("output_blocks.")
        and (name.endswith(".conv.weight") or (name.endswith(".in_layers.2.weight") and name.split(".")[2] != "0"))
    ]
    per_level = min(ups, default=blocks - 1) + 1  # one resolution: nothing is resampled
    if blocks % per_level:
        raise ArtifactError("The blocks of this checkpoint don't form a UNet of a known kind", where=where)
    firsts = [1 + level * per_level for level in range(blocks // per_level)]
    channels = [shapes[f"input_blocks.{first}.0.out_layers.3.weight"][0] for first in firsts]
    if shapes[_FIRST][0] != channels[0]:
        raise ArtifactError(
            "diffusers has no UNet whose first blocks widen the first convolution's output", where=where
        )
    emb = shapes["input_blocks.1.0.emb_layers.1.weight"][0]
    contexts = [shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")]
    projections = [shape for name, shape in shapes.items() if name.endswith(".proj_in.weight")]
    return Structure(
        in_channels=shapes[_FIRST][1],
        out_channels=shapes["out.2.weight"][0],
        channels=channels,
        layers_per_block=per_level - 1,
        attends=[f"input_blocks.{first}.1.norm.weight" in shapes for first in firsts],
        transformer=bool(projections),
        depths=[_depth(shapes, f"input_blocks.{first}.1.transformer_blocks.") for first in firsts],
        context_dim=contexts[0] if contexts else None,
        linear_projection=bool(projections) and len(projections[0]) == 2,
        scale_shift=emb == 2 * channels[0],
        resnet_sampling=resnet_sampling and len(firsts) > 1,
        classes=shapes["label_emb.weight"][0] if "label_emb.weight" in shapes else None,
    )


def unet_parameters(published: Mapping[str, Any] | None) -> dict[str, Any]:
    """`unet_config.params` of a CompVis YAML config; empty without one."""
    model = ((published or {}).get("model") or {}).get("params") or {}
    return dict((model.get("unet_config") or {}).get("params") or {})


def scaled_linear(published: Mapping[str, Any] | None, start: float, end: float) -> dict[str, Any]:
    """The noise schedule of CompVis' models ("linear" there is linear in the square root); `published` wins."""
    model = ((published or {}).get("model") or {}).get("params") or {}
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": int(model.get("timesteps", 1000)),
        "beta_schedule": "scaled_linear",
        "beta_start": float(model.get("linear_start", start)),
        "beta_end": float(model.get("linear_end", end)),
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }


def _depth(shapes: Shapes, prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix)})
