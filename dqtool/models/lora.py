"""LoRAs added to the weights they were trained for: `W += weight · alpha/r · B·A` (arXiv 2106.09685, Eq. 3).

Reads what diffusers and peft write, and through diffusers' converters what kohya's scripts write. The merging itself is
a product of two matrices, so that peft is not needed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dqtool import report
from dqtool.artifacts import check_finite, read_header
from dqtool.artifacts.tensorfile import library_faults, load_tensors
from dqtool.errors import ArtifactError
from dqtool.models.lora_files import LoraFile

if TYPE_CHECKING:
    from dqtool.models.sources import ModelSource

__all__ = ["fuse_loras", "lora_delta"]

_LOADERS = {
    "UNet2DConditionModel": "StableDiffusionLoraLoaderMixin",
    "FluxTransformer2DModel": "FluxLoraLoaderMixin",
    "SD3Transformer2DModel": "SD3LoraLoaderMixin",
}
"""diffusers' classes that know the other formats of a network's LoRAs."""

_PREFIXES = ("unet.", "transformer.", "transformer_2.", "prior.", "base_model.model.", "diffusion_model.")
_PARTS = re.compile(r"(.+)\.lora_(A|B)(?:\.[\w-]+)?\.(weight|bias)")
_METADATA = "lora_adapter_metadata"


@dataclass
class _Pair:
    """The factors of one layer's change: `down [r, in, ...]` (A), `up [out, r, ...]` (B), a bias of B."""

    down: Tensor | None = None
    up: Tensor | None = None
    bias: Tensor | None = None


def fuse_loras(state: Mapping[str, Tensor], source: ModelSource) -> dict[str, Tensor]:
    """`state` (float32, diffusers' names) with the LoRAs of `source` added; untouched tensors are those given.

    Raises:
        ArtifactError: a file is no LoRA, is one of another network, or of a kind that is no product of two matrices.
        NumericError: NaN or infinity in a LoRA.
    """
    fused = dict(state)
    for lora in source.loras:
        pairs, alphas = _read(lora, source)
        for module, pair in pairs.items():
            name = f"{module}.weight"
            if pair.down is None or pair.up is None:
                raise ArtifactError("A layer has one of its two matrices only", where=f"{lora.path}, {module}")
            if name not in fused:
                raise ArtifactError(
                    f"The LoRA changes '{module}', which the network does not have",
                    where=str(lora.path),
                    fix=f"Give a LoRA that was trained for this {source.class_name}",
                )
            scale = lora.weight * alphas.get(module, 1.0)
            delta = lora_delta(pair.down, pair.up, fused[name].shape, f"{lora.path}, {module}")
            fused[name] = fused[name] + scale * delta
            if pair.bias is not None and f"{module}.bias" in fused:
                fused[f"{module}.bias"] = fused[f"{module}.bias"] + scale * pair.bias.float()
        report.say(f"LoRA {lora.path} fused with weight {lora.weight:g}: {len(pairs)} layers")
    return fused


def lora_delta(down: Tensor, up: Tensor, shape: torch.Size, where: str) -> Tensor:
    """`B·A` as a change of a weight of `shape`, linear or convolution, in float32.

    Raises:
        ArtifactError: the two matrices are not of that weight.
    """
    if up.dim() == 4 and up.shape[2:] != (1, 1):
        raise ArtifactError("This LoRA's second factor is no 1x1 convolution, which dqtool does not merge", where=where)
    if up.shape[1] != down.shape[0] or up.shape[0] != shape[0] or down[0].numel() != shape[1:].numel():
        raise ArtifactError(
            f"The LoRA's factors {list(up.shape)} and {list(down.shape)} don't fit a weight of {list(shape)}",
            where=where,
            fix="Give a LoRA that was trained for this network",
        )
    return (up.flatten(1).float() @ down.flatten(1).float()).view(shape)


def _read(lora: LoraFile, source: ModelSource) -> tuple[dict[str, _Pair], dict[str, float]]:
    """The pairs of a file by module of the network, and `alpha / r` of each."""
    path = str(lora.path)
    state, metadata = _load(lora)
    state, network_alphas = _to_peft(state, source, path)
    pairs: dict[str, _Pair] = {}
    elsewhere, unknown = 0, []
    for name, tensor in state.items():
        if name.startswith(("text_encoder", "lora_te")):
            elsewhere += 1
            continue
        found = _PARTS.fullmatch(name)
        if found is None:
            unknown.append(name)
            continue
        pair = pairs.setdefault(_bare(found[1]), _Pair())
        if found[3] == "bias":
            pair.bias = tensor
        elif found[2] == "A":
            pair.down = tensor
        else:
            pair.up = tensor
    if unknown or not pairs:
        what = f"'{unknown[0]}', which dqtool can't merge" if unknown else "no layer of the network"
        raise ArtifactError(
            f"This file holds {what}", where=path, fix="Give a LoRA of diffusers', peft's or kohya's format"
        )
    if elsewhere:
        report.warn(f"{path}: {elsewhere} tensors are for text encoders, which stay as they are")
    check_finite(state, path)
    return pairs, {module: _alpha(module, pair, network_alphas, metadata) for module, pair in pairs.items()}


def _load(lora: LoraFile) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import safe_open

    read_header(lora.path)
    with library_faults(lora.path), safe_open(str(lora.path), "pt") as file:
        text = (file.metadata() or {}).get(_METADATA)
    try:
        metadata = json.loads(text) if text else {}
    except ValueError:
        metadata = {}
    return load_tensors(lora.path), metadata if isinstance(metadata, dict) else {}


def _to_peft(state: dict[str, Tensor], source: ModelSource, path: str) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Names of peft (`lora_A`, `lora_B`), and the alphas that the file holds as tensors, by module."""
    if any("dora_scale" in name or "lora_magnitude_vector" in name for name in state):
        raise ArtifactError("This is a DoRA, whose change is no product of two matrices", where=path, fix="Give a LoRA")
    alphas: dict[str, Any] = {}
    if not all(_PARTS.fullmatch(name) for name in state if not name.endswith(".alpha")):
        import diffusers.loaders.lora_pipeline as loaders
        from diffusers.utils import convert_unet_state_dict_to_peft

        mixin = getattr(loaders, _LOADERS.get(source.class_name, ""), None)
        if mixin is not None and not all(name.startswith(_PREFIXES) for name in state):
            from types import SimpleNamespace

            try:
                if mixin.__name__.startswith("StableDiffusion"):
                    state, alphas = mixin.lora_state_dict(dict(state), unet_config=SimpleNamespace(**source.config))
                else:
                    kwargs = {"return_alphas": True} if mixin.__name__.startswith("Flux") else {}
                    result = mixin.lora_state_dict(dict(state), **kwargs)
                    state, alphas = result if isinstance(result, tuple) else (result, {})
            except (ValueError, KeyError, AttributeError, NotImplementedError) as error:
                raise ArtifactError(f"diffusers can't convert this LoRA: {error}", where=path) from error
        alphas = {**(alphas or {}), **{k: state[k] for k in list(state) if k.endswith(".alpha")}}
        # diffusers keys an alpha by the tensor it is for.
        alphas = convert_unet_state_dict_to_peft({k.removesuffix(".alpha"): v for k, v in alphas.items()})
        state = convert_unet_state_dict_to_peft({k: v for k, v in state.items() if not k.endswith(".alpha")})
    else:
        alphas = {k.removesuffix(".alpha"): v for k, v in state.items() if k.endswith(".alpha")}
        state = {k: v for k, v in state.items() if not k.endswith(".alpha")}
    parts = {name: _PARTS.fullmatch(name) for name in alphas}
    return state, {_bare(part[1] if part else name): float(alphas[name]) for name, part in parts.items()}


def _bare(module: str) -> str:
    for prefix in _PREFIXES:
        module = module.removeprefix(prefix)
    return module


def _alpha(module: str, pair: _Pair, network_alphas: Mapping[str, float], metadata: Mapping[str, Any]) -> float:
    """`alpha / r` of a layer: 1 unless the file says otherwise, in a tensor or as peft's settings in its metadata."""
    if pair.down is None:
        return 1.0
    rank = pair.down.shape[0]
    if module in network_alphas:
        return network_alphas[module] / rank
    settings = {key.split(".", 1)[1]: value for key, value in metadata.items() if key.startswith(_PREFIXES)}
    alpha = settings.get("lora_alpha", rank)
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            alpha = value
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
