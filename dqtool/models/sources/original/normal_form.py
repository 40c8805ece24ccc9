"""Normalization of a checkpoint's tensors: common prefixes are removed, scaled fp8 is dequantized. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from dqtool.artifacts.header import TensorEntry
from dqtool.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["plain_entries", "plain_tensors"]

T = TypeVar("T")

_PREFIXES = ("module.", "_orig_mod.", "model.", "unet.", "network.", "denoiser.", "ema_model.", "net.")
"""Prefixes that `DataParallel`, `torch.compile` and training scripts put before every name."""
_KEPT = ("model.diffusion_model.", "net.blocks.", "net.x_embedder.")
"""Prefixes by which layouts are recognised and which therefore stay."""

_SCALES = (".scale_weight", ".weight_scale")
_INPUTS = (".scale_input", ".input_scale", ".comfy_quant")
_MARK = "scaled_fp8"
_FP8 = ("F8_E4M3", "F8_E5M2")
_FOREIGN = (
    ".quant_state.bitsandbytes__nf4",
    ".quant_state.bitsandbytes__fp4",
    ".absmax",
    ".SCB",
    ".qzeros",
    ".weight_packed",
)
"""Suffixes of names that identify another tool's quantized weights."""


def plain_entries(entries: Mapping[str, TensorEntry], where: str) -> dict[str, TensorEntry]:
    """Return {name: {dtype, shape}} of the tensors that `plain_tensors` returns; fp8 keeps the file's dtype.

    Raises:
        ArtifactError: the file holds another tool's quantized weights.
    """
    foreign = next((name for name in entries if name.endswith(_FOREIGN)), None)
    if foreign is not None:
        raise ArtifactError(
            f"These weights are quantized already: the file holds '{foreign}'",
            where=where,
            fix="Give the full-precision model they were made from",
        )
    return _without(_plain(entries))


def plain_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without common prefixes, with fp8 weights dequantized to float32."""
    plain = _plain(state)
    result = _without(plain)
    for name in plain:
        end = next((end for end in _SCALES if name.endswith(end)), None)
        weight = name[: -len(end)] + ".weight" if end else ""
        if weight in result and "float8" in str(result[weight].dtype):
            scale = plain[name].float()
            rows = scale.reshape(-1, *[1] * (result[weight].dim() - 1)) if scale.numel() > 1 else scale.reshape(())
            result[weight] = result[weight].float() * rows
    return result


def _without(plain: Mapping[str, T]) -> dict[str, T]:
    """Return the tensors without the scales of fp8 weights."""
    scaled = {name.removesuffix(end) for name in plain for end in _SCALES if name.endswith(end)}
    scaled = {owner for owner in scaled if _is_fp8(plain.get(f"{owner}.weight"))}
    if not scaled and _MARK not in plain:
        return dict(plain)
    scales = {owner + end for owner in scaled for end in (*_SCALES, *_INPUTS)}
    return {
        name: value
        for name, value in plain.items()
        if name not in scales and name.rpartition(".")[2] != _MARK and not name.endswith(_SCALES + _INPUTS)
    }


def _is_fp8(value: Any) -> bool:
    if value is None:
        return False
    return value["dtype"] in _FP8 if isinstance(value, Mapping) else "float8" in str(value.dtype)


def _plain(state: Mapping[str, T]) -> dict[str, T]:
    """Return the tensors with common prefixes removed, repeatedly."""
    names = dict(state)
    while names:
        first = next(iter(names))
        prefix = next((prefix for prefix in _PREFIXES if first.startswith(prefix)), None)
        if prefix is None or any(name.startswith(_KEPT) for name in names):
            break
        if not all(name.startswith(prefix) for name in names):
            break
        names = {name.removeprefix(prefix): value for name, value in names.items()}
    return names
