"""Aesthetic score: LAION's small networks that predict from a CLIP image embedding how much people like an image.

V1 is one linear layer (LAION-AI/aesthetic-predictor, `sa_0_4_vit_*_linear.pth`). V2 has five
(improved-aesthetic-predictor), without ReLU in `sac+logos+ava1-l14-linearMSE.pth` and with ReLU in
`ava+logos-l14-reluMSE.pth`. Files of simple-aesthetics-predictor hold the same heads beside the CLIP tower.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from torch import Tensor, nn

from dqtool.artifacts.torch_files import weights_content
from dqtool.errors import ArtifactError

__all__ = ["load_aesthetic_head"]

_LINEAR = [0, 2, 4, 6, 7]
_RELU = [0, 3, 6, 9, 11]
"""Indices of the five linear layers in their `nn.Sequential`, with dropout or with ReLU and dropout between them."""
_KNOWN = "Give LAION's linear head (sa_0_4_vit_*_linear.pth) or an MLP of improved-aesthetic-predictor"


def load_aesthetic_head(path: str | os.PathLike[str], features: int) -> nn.Module:
    """Return the head of a file (.pth or .safetensors), which maps unit CLIP embeddings `[N, features]` to scores `[N,
    1]`.

    Raises:
        EnvironmentFault: the file can't be read.
        ArtifactError: the file holds no such head, or a head for embeddings of another length.
    """
    given = os.fspath(path)
    head = _head(_read(Path(path)), given)
    first = next(module for module in head.modules() if isinstance(module, nn.Linear))
    if first.in_features != features:
        raise ArtifactError(
            f"This head is for CLIP embeddings of {first.in_features} numbers, and --clip gives {features}",
            where=given,
            fix="Give the CLIP model that the head was trained on (768: clip-vit-large-patch14)",
        )
    return head.eval().requires_grad_(False)


def _head(state: dict[str, Tensor], given: str) -> nn.Module:
    """Build the head from the tensors of a file."""
    for prefix in ("", "predictor."):
        if f"{prefix}weight" in state:
            return _linear(state, prefix.rstrip("."), given)
    places = sorted(int(m[1]) for name in state if (m := re.fullmatch(r"(?:.*\.)?layers\.(\d+)\.weight", name)))
    if places not in (_LINEAR, _RELU):
        raise ArtifactError("This file holds no aesthetic predictor", where=given, fix=_KNOWN)
    stem = next(name for name in state if re.search(r"(^|\.)layers\.0\.weight$", name)).removesuffix("0.weight")
    modules: list[nn.Module] = []
    for place in places:
        if modules and places == _RELU:
            modules.append(nn.ReLU())
        modules.append(_linear(state, f"{stem}{place}", given))
    return nn.Sequential(*modules)


def _linear(state: dict[str, Tensor], name: str, given: str) -> nn.Linear:
    """Build one linear layer from its tensors."""
    dot = f"{name}." if name else ""
    weight, bias = state[f"{dot}weight"], state.get(f"{dot}bias")
    if weight.ndim != 2 or bias is None or bias.shape != weight.shape[:1]:
        raise ArtifactError(f"{dot}weight and {dot}bias do not form a linear layer", where=given, fix=_KNOWN)
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.load_state_dict({"weight": weight.float(), "bias": bias.float()})
    return layer


def _read(path: Path) -> dict[str, Tensor]:
    """Return the named tensors of a file."""
    try:
        content = weights_content(path)
    except ValueError as error:
        raise ArtifactError(f"The aesthetic predictor can't be read: {error}", where=str(path), fix=_KNOWN) from error
    if not isinstance(content, dict):
        raise ArtifactError("The aesthetic predictor can't be read", where=str(path), fix=_KNOWN)
    return {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor) and isinstance(name, str)}
