"""Readers of the files that hold the weights of FID's Inception network; all give the same state dict.

Known files are `pt_inception-2015-12-05-6726825d.pth` of pytorch-fid and torch-fidelity, the TorchScript archive
`inception-2015-12-05.pt` of NVIDIA's StyleGAN metrics, `classify_image_graph_def.pb` of the ADM suite and the first FID
code, and a safetensors file with any of their names.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from dqtool.artifacts.reading import open_regular, read_file
from dqtool.artifacts.torch_archive import flat_tensors
from dqtool.artifacts.torch_files import MAX_WEIGHTS, weights_content
from dqtool.errors import ArtifactError, NumericError
from dqtool.metrics.graphdef import graph_constants
from dqtool.metrics.inception import CLASSES, POOL, InceptionV3, tensorflow_scopes

__all__ = ["load_inception", "weights_digest"]

_KNOWN = (
    "Give pt_inception-2015-12-05-6726825d.pth (pytorch-fid, torch-fidelity), NVIDIA's inception-2015-12-05.pt, or "
    "classify_image_graph_def.pb (the ADM suite)"
)
_LEAVES = {
    "conv2d_params": "conv.weight",
    "weight": "conv.weight",
    "gamma": "bn.weight",
    "beta": "bn.bias",
    "mean": "bn.running_mean",
    "moving_mean": "bn.running_mean",
    "var": "bn.running_var",
    "moving_variance": "bn.running_var",
}
_HEAD = {
    "softmax_weights": "fc.weight",
    "softmax_biases": "fc.bias",
    "output_weight": "fc.weight",
    "output_bias": "fc.bias",
}


def load_inception(path: str | os.PathLike[str]) -> InceptionV3:
    """Return the network with the weights of a file, in evaluation mode.

    Raises:
        EnvironmentFault: the file can't be read.
        ArtifactError: the file holds something else, such as torchvision's ImageNet network.
        NumericError: a weight is NaN or infinite.
    """
    given = os.fspath(path)
    state = _canonical(_read(Path(path)))
    model = InceptionV3()
    expected = {name: tensor.shape for name, tensor in model.state_dict().items() if "num_batches" not in name}
    head = state.get("fc.weight")
    if head is not None and head.shape == (1000, POOL):
        raise ArtifactError(
            f"This is torchvision's Inception of 1000 classes, not FID's of {CLASSES}", where=given, fix=_KNOWN
        )
    for name, shape in expected.items():
        if name not in state or state[name].shape != shape:
            found = f"is {tuple(state[name].shape)}" if name in state else "is missing"
            raise ArtifactError(
                "These are not the weights of FID's Inception network",
                where=f"{given}: {name} should be {tuple(shape)} and {found}",
                fix=_KNOWN,
            )
        if not torch.isfinite(state[name]).all():
            raise NumericError("A weight of the Inception network is NaN or infinite", where=f"{given}: {name}")
    model.load_state_dict({name: state[name].float() for name in expected}, strict=False)
    return model.eval().requires_grad_(False)


def weights_digest(model: InceptionV3) -> str:
    """Return the SHA-256 of the weights, which does not depend on the kind of file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if "num_batches" not in name and name != "fc.bias":  # the bias is not used
            digest.update(name.encode())
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path) -> dict[str, Tensor]:
    """Return the named tensors of a file of any kind."""
    try:
        with open_regular(path, MAX_WEIGHTS) as stream:
            start = stream.read(16)
        if start[:2] == b"PK" or start[8:9] == b"{" or start[:1] == b"\x80":
            content = weights_content(path)
        else:
            arrays = graph_constants(read_file(path, MAX_WEIGHTS))
            content = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    except ValueError as error:
        raise ArtifactError(f"The Inception weights can't be read: {error}", where=str(path), fix=_KNOWN) from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise ArtifactError("This file holds no named tensors", where=str(path), fix=_KNOWN)
    try:
        return flat_tensors(content)
    except ValueError as error:
        raise ArtifactError(f"The Inception weights can't be read: {error}", where=str(path), fix=_KNOWN) from error


def _canonical(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under the names and in the layouts of `InceptionV3`, without unknown ones."""
    scopes = _flat_scopes()
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("num_batches_tracked"):
            continue
        plain = name.removeprefix("module.").removeprefix("inception.")
        flat = name.removeprefix("layers.").replace("/", "_").replace(".", "_").replace("_batchnorm_", "_")
        leaf = next((leaf for leaf in sorted(_LEAVES, key=len, reverse=True) if flat.endswith(f"_{leaf}")), "")
        scope = flat.removesuffix(f"_{leaf}") if leaf else ""
        if flat in _HEAD:
            state[_HEAD[flat]] = tensor.T if flat == "softmax_weights" else tensor
        elif scope in scopes:
            is_hwio = leaf == "conv2d_params"
            state[f"{scopes[scope]}.{_LEAVES[leaf]}"] = tensor.permute(3, 2, 0, 1) if is_hwio else tensor
        else:
            state[plain] = tensor
    for module in scopes.values():  # NVIDIA's leaves out what is one everywhere
        bias = state.get(f"{module}.bn.bias")
        if bias is not None:
            state.setdefault(f"{module}.bn.weight", torch.ones_like(bias))
    return state


@cache
def _flat_scopes() -> dict[str, str]:
    """Return the module of each scope, with `/` and `.` in the scope's name replaced by `_`."""
    return {scope.replace("/", "_"): module for scope, module in tensorflow_scopes()}
