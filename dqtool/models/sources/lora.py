"""Merging of LoRAs into float weights: `W += weight · alpha/r · B·A` (arXiv 2106.09685, Eq. 3).

Reads the formats of diffusers and peft, and through diffusers' converters that of kohya's scripts. Merging is a product of
two matrices and needs no peft.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dqtool import report
from dqtool.artifacts import check_finite
from dqtool.artifacts.jsonvalues import ForeignConfig
from dqtool.artifacts.reading import parse_json
from dqtool.artifacts.tensorfile import load_tensors, read_metadata
from dqtool.errors import ArtifactError, NumericError
from dqtool.models.sources.adapter_kinds import MERGE_ELSEWHERE, other_kind
from dqtool.models.sources.lora_files import LoraFile
from dqtool.models.sources.patterns import Patterns

if TYPE_CHECKING:
    from dqtool.models.sources.resolve import ModelSource

__all__ = ["fuse_loras", "lora_delta"]

_LOADERS = {
    "UNet2DConditionModel": "StableDiffusionLoraLoaderMixin",
    "FluxTransformer2DModel": "FluxLoraLoaderMixin",
    "SD3Transformer2DModel": "SD3LoraLoaderMixin",
}
"""Loader classes of diffusers that convert other LoRA formats, by network class."""

_PREFIXES = ("unet.", "transformer.", "transformer_2.", "prior.", "base_model.model.", "diffusion_model.")
_PARTS = re.compile(r"(.+)\.lora_(A|B)(?:\.[\w-]+)?\.(weight|bias)")
_METADATA = "lora_adapter_metadata"


@dataclass
class _Pair:
    """Low-rank factors of one layer: `down [r, in, ...]` (A), `up [out, r, ...]` (B), and a bias of B."""

    down: Tensor | None = None
    up: Tensor | None = None
    bias: Tensor | None = None


def fuse_loras(state: Mapping[str, Tensor], source: ModelSource) -> dict[str, Tensor]:
    """Return `state` (float32, diffusers' names) with the LoRAs of `source` added; other tensors are passed through.

    Raises:
        ArtifactError: a file is no LoRA, is for another network, or is no product of two matrices.
        NumericError: a LoRA holds NaN or infinity.
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
            if not fused[name].is_floating_point():
                raise ArtifactError(
                    "The LoRA changes a layer whose weights are no floats", where=f"{lora.path}, {name}"
                )
            scale = lora.weight * alphas.get(module, 1.0)
            delta = lora_delta(pair.down, pair.up, fused[name].shape, f"{lora.path}, {module}")
            fused[name] = fused[name] + scale * delta
            bias = fused.get(f"{module}.bias")
            if pair.bias is not None and bias is not None and pair.bias.shape != bias.shape:
                raise ArtifactError(
                    f"The LoRA's bias {list(pair.bias.shape)} does not fit one of {list(bias.shape)}",
                    where=f"{lora.path}, {module}",
                )
            if pair.bias is not None and bias is not None:
                fused[f"{module}.bias"] = fused[f"{module}.bias"] + scale * pair.bias.float()
        report.say(f"LoRA {lora.path} fused with weight {lora.weight:g}: {len(pairs)} layers")
    return fused


def lora_delta(down: Tensor, up: Tensor, shape: torch.Size, where: str) -> Tensor:
    """Return `B·A` in the shape of a linear or convolution weight, in float32.

    Raises:
        ArtifactError: the two matrices don't fit the shape.
    """
    if up.dim() < 2 or down.dim() < 2 or 0 in (*up.shape, *down.shape) or len(shape) < 2:
        raise ArtifactError(
            f"The LoRA's factors {list(up.shape)} and {list(down.shape)} are no two matrices of a rank above 0",
            where=where,
        )
    if up.dim() == 4 and up.shape[2:] != (1, 1):
        raise ArtifactError("This LoRA's second factor is no 1x1 convolution, which dqtool does not merge", where=where)
    if up[0].numel() != down.shape[0] or up.shape[0] != shape[0] or down[0].numel() != shape[1:].numel():
        raise ArtifactError(
            f"The LoRA's factors {list(up.shape)} and {list(down.shape)} don't fit a weight of {list(shape)}",
            where=where,
            fix="Give a LoRA that was trained for this network",
        )
    return (up.flatten(1).float() @ down.flatten(1).float()).view(shape)


def _read(lora: LoraFile, source: ModelSource) -> tuple[dict[str, _Pair], dict[str, float]]:
    """Return the file's factors and `alpha / r`, each by module of the network."""
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
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            raise ArtifactError(f"A LoRA's tensors are floats, and {name} is {tensor.dtype}", where=path)
    settings = _settings(metadata, path)
    return pairs, {module: _alpha(module, pair, network_alphas, settings) for module, pair in pairs.items()}


def _load(lora: LoraFile) -> tuple[dict[str, Tensor], ForeignConfig]:
    text = read_metadata(lora.path).get(_METADATA)
    try:
        metadata = parse_json(text) if text else {}
    except ValueError:
        metadata = {}
    return load_tensors(lora.path), metadata if isinstance(metadata, dict) else {}


def _to_peft(state: dict[str, Tensor], source: ModelSource, path: str) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the tensors under peft's names (`lora_A`, `lora_B`), and the alphas that the file holds as tensors, by module."""
    other = other_kind(state)
    if other is not None:
        raise ArtifactError(f"This is a {other[0]}: it {other[1]}", where=path, fix=MERGE_ELSEWHERE)
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
            except Exception as error:  # diffusers' converters raise these on malformed names
                raise ArtifactError(f"diffusers can't convert this LoRA: {error}", where=path) from error
        alphas = {**(alphas or {}), **{k: state[k] for k in list(state) if k.endswith(".alpha")}}
        try:
            # diffusers keys an alpha by the name of its tensor.
            alphas = convert_unet_state_dict_to_peft({k.removesuffix(".alpha"): v for k, v in alphas.items()})
            state = convert_unet_state_dict_to_peft({k: v for k, v in state.items() if not k.endswith(".alpha")})
        except Exception as error:
            raise ArtifactError(f"diffusers can't convert this LoRA: {error}", where=path) from error
    else:
        alphas = {k.removesuffix(".alpha"): v for k, v in state.items() if k.endswith(".alpha")}
        state = {k: v for k, v in state.items() if not k.endswith(".alpha")}
    parts = {name: _PARTS.fullmatch(name) for name in alphas}
    return state, {_bare(part[1] if part else name): _number(alphas[name], name, path) for name, part in parts.items()}


def _number(value: Any, name: str, path: str) -> float:
    """Return an alpha, given as a tensor or in the settings, as a number.

    Raises:
        ArtifactError: `value` is no single number.
        NumericError: `value` is NaN or infinite.
    """
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ArtifactError("An alpha of this LoRA is no number", where=f"{path}, {name}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise NumericError(f"An alpha of this LoRA is {number}", where=f"{path}, {name}")
    return number


def _bare(module: str) -> str:
    for prefix in _PREFIXES:
        module = module.removeprefix(prefix)
    return module


@dataclass(frozen=True)
class _Settings:
    """Settings of peft: alpha of all layers, alpha of layers whose names match a pattern, and the divisor of alpha."""

    alpha: float | None
    alphas: Mapping[str, float]
    patterns: Patterns
    by_root: bool


def _settings(metadata: ForeignConfig, path: str) -> _Settings:
    """Return peft's settings as the file's metadata holds them.

    Raises:
        ArtifactError: an alpha is no number, or its pattern no regular expression.
    """
    found = {key.split(".", 1)[1]: value for key, value in metadata.items() if key.startswith(_PREFIXES)}
    where = f"{path}, {_METADATA}"
    given = found.get("alpha_pattern") or {}
    if not isinstance(given, dict):
        raise ArtifactError("alpha_pattern is no object of numbers by name", where=where)
    alpha = found.get("lora_alpha")
    try:
        return _Settings(
            None if alpha is None else _number(alpha, f"{_METADATA}, lora_alpha", path),
            {text: _number(value, f"{_METADATA}, alpha_pattern", path) for text, value in given.items()},
            Patterns(given),
            bool(found.get("use_rslora")),
        )
    except ValueError as error:
        raise ArtifactError(f"A pattern of alpha_pattern can't be used: {error}", where=where) from error


def _alpha(module: str, pair: _Pair, network_alphas: Mapping[str, float], settings: _Settings) -> float:
    """Return `alpha / r` of a layer: 1 unless the file says otherwise, in a tensor or in peft's settings.

    Raises:
        ArtifactError: a pattern of the settings takes too long to match.
    """
    if pair.down is None or pair.down.dim() == 0 or len(pair.down) == 0:
        return 1.0
    rank = pair.down.shape[0]
    if module in network_alphas:
        return network_alphas[module] / rank
    alpha = float(rank) if settings.alpha is None else settings.alpha
    try:
        pattern = settings.patterns.first(module)
    except ValueError as error:
        raise ArtifactError(f"alpha_pattern can't be matched: {error}", where=f"{_METADATA}, {module}") from error
    if pattern is not None:
        alpha = settings.alphas[pattern]
    return alpha / (math.sqrt(rank) if settings.by_root else rank)
