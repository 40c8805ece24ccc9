"""The UNet of openai/guided-diffusion, which CompVis' models use: its structure derived from shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dqtool.artifacts.jsonvalues import ForeignConfig
from dqtool.errors import ArtifactError
from dqtool.models.sources.original.layout import Layout, Shapes

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "PREFIX",
    "CompVisLayout",
    "Structure",
    "model_parameters",
    "network_shapes",
    "network_tensors",
    "scaled_linear",
    "unet_parameters",
    "unet_structure",
]

PREFIX = "model.diffusion_model."
_EMA = "model_ema."
_FIRST = "input_blocks.0.0.weight"


@dataclass(frozen=True)
class Structure:
    """Structure of a `UNetModel` as far as its shapes determine it; the number of attention heads is not included.

    `channels` and `attends` have an entry per resolution. `down_depths` and `up_depths` hold the transformer blocks of each
    layer of each resolution, in the order in which they run (0: no attention); `mid_depth` is None where the middle has no
    attention.
    """

    in_channels: int
    out_channels: int
    channels: list[int]
    layers_per_block: int
    attends: list[bool]
    transformer: bool
    down_depths: list[list[int]]
    up_depths: list[list[int]]
    mid_depth: int | None
    context_dim: int | None
    only_cross: list[bool]
    linear_projection: bool
    scale_shift: bool
    resnet_sampling: bool
    classes: int | None
    vector_dim: int | None


class CompVisLayout(Layout):
    """Layout of a file that holds a `UNetModel`, either alone or under CompVis' prefix beside other networks."""

    def network(self, names: Iterable[str]) -> set[str]:
        """Return the names without those of the first stage, the conditioner and the averaged copies."""
        names = set(names)
        return names if _FIRST in names else {name for name in names if name.startswith(PREFIX)}


def network_shapes(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the network's tensors under their bare names; empty where there is no such network."""
    if _FIRST in shapes:
        return dict(shapes)
    return {name.removeprefix(PREFIX): shape for name, shape in shapes.items() if name.startswith(PREFIX)}


def network_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the network's tensors under their bare names; averaged weights where the file has them, since samples use them."""
    if _FIRST in state:
        return dict(state)
    tensors = {}
    for name, tensor in state.items():
        if name.startswith(PREFIX):
            averaged = _EMA + name.removeprefix("model.").replace(".", "")
            tensors[name.removeprefix(PREFIX)] = state.get(averaged, tensor)
    return tensors


def unet_structure(shapes: Shapes, where: str) -> Structure:
    """Return the structure of a `UNetModel` from its shapes.

    Raises:
        ArtifactError: the blocks don't form a `UNetModel`.
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
    layers = [range(first, first + per_level - 1) for first in firsts]
    outputs = [range(start, start + per_level) for start in range(0, blocks, per_level)]
    middle = "middle_block.1.norm.weight" in shapes or "middle_block.1.qkv.weight" in shapes
    return Structure(
        in_channels=shapes[_FIRST][1],
        out_channels=shapes["out.2.weight"][0],
        channels=channels,
        layers_per_block=per_level - 1,
        attends=[f"input_blocks.{first}.1.norm.weight" in shapes for first in firsts],
        transformer=bool(projections),
        down_depths=[[_depth(shapes, f"input_blocks.{index}.1.") for index in level] for level in layers],
        up_depths=[[_depth(shapes, f"output_blocks.{index}.1.") for index in level] for level in outputs],
        mid_depth=_depth(shapes, "middle_block.1.") if middle else None,
        context_dim=contexts[0] if contexts else None,
        only_cross=[_only_cross(shapes, f"input_blocks.{first}.1.", contexts) for first in firsts],
        linear_projection=bool(projections) and len(projections[0]) == 2,
        scale_shift=emb == 2 * channels[0],
        resnet_sampling=resnet_sampling and len(firsts) > 1,
        classes=shapes["label_emb.weight"][0] if "label_emb.weight" in shapes else None,
        vector_dim=shapes["label_emb.0.0.weight"][1] if "label_emb.0.0.weight" in shapes else None,
    )


def model_parameters(published: ForeignConfig | None) -> ForeignConfig:
    """Return `model.params` of an authors' YAML config; empty without one."""
    return dict(((published or {}).get("model") or {}).get("params") or {})


def unet_parameters(published: ForeignConfig | None) -> ForeignConfig:
    """Return the network's `params` of an authors' YAML config: `unet_config` of CompVis, `network_config` of Stability."""
    model = model_parameters(published)
    return dict((model.get("unet_config") or model.get("network_config") or {}).get("params") or {})


def scaled_linear(published: ForeignConfig | None, start: float, end: float) -> ForeignConfig:
    """Return the noise schedule of CompVis' models ("linear" there is linear in the square root); `published` takes precedence.

    Raises:
        ArtifactError: `published` names a schedule of another form.
    """
    model = model_parameters(published)
    if model.get("beta_schedule", "linear") != "linear":
        raise ArtifactError(
            f"The YAML config names the noise schedule '{model['beta_schedule']}', which dqtool does not translate",
            where="YAML config, key model.params.beta_schedule",
            fix="Give the scheduler_config.json of an equal diffusers scheduler with --scheduler FILE",
        )
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
    """Return the number of transformer blocks under `prefix`: 1 for an `AttentionBlock`, 0 without attention."""
    start = prefix + "transformer_blocks."
    numbers = {name[len(start) :].split(".")[0] for name in shapes if name.startswith(start)}
    return len(numbers) or int(f"{prefix}qkv.weight" in shapes)


def _only_cross(shapes: Shapes, prefix: str, contexts: list[int]) -> bool:
    """Return whether the first attention of a transformer block also reads the context (Stable Diffusion's upscaler)."""
    name = f"{prefix}transformer_blocks.0.attn1.to_k.weight"
    return name in shapes and shapes[name][1] == contexts[0] != shapes[name][0]
