"""The packed form of an integer network, kept for saving, counting parameters and moving between devices.

The packed form is a second tree of modules that shares all tensors with the network. Its weights stay views of the mapped
file until something reads them.
"""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from dqtool import report
from dqtool.graph.attention import OWN, is_attention
from dqtool.nn.branch import LowRankBranch
from dqtool.nn.call_lock import give
from dqtool.nn.layers import QuantLayer
from dqtool.nn.packed_layer import PackedLayer
from dqtool.nn.prediction import PredictionTables
from dqtool.nn.processors import set_own

__all__ = [
    "PACKED_FORM",
    "add_count_methods",
    "cast_unquantized",
    "is_quantized_tensor",
    "keep_out_of_states",
    "keep_packed_form",
    "packed_form",
]

KEPT = "_dqtool_packed"
PACKED_FORM = (KEPT, "state_dict")
"""Attributes of a network that keeps its packed form."""


def keep_packed_form(network: nn.Module) -> None:
    """Keep a copy of `network`, made of packed layers, before it is converted in place to another form."""
    shared: dict[int, Any] = {id(t): t for t in chain(network.parameters(), network.buffers())}
    for module in network.modules():
        expanded = getattr(module, "_expanded", None)
        if isinstance(expanded, Tensor):
            shared[id(expanded)] = expanded
    network.__dict__[KEPT] = copy.deepcopy(network, shared)
    give(network, "state_dict", _state_dict)
    add_count_methods(network)


def keep_out_of_states(layer: nn.Module, kept: str | None = None) -> None:
    """Keep the buffers of an integer layer, but for its own buffer `kept`, out of state dicts, which hold the packed form.

    accelerate leaves such buffers on the device that computes: it would look for the others in a state dict.
    """
    for module in layer.modules():
        names = {name for name, buffer in module._buffers.items() if buffer is not None}
        module._non_persistent_buffers_set.update(names - {kept} if module is layer else names)


def packed_form(network: nn.Module) -> nn.Module:
    """Return the network of packed layers: the one that `network` keeps, or itself."""
    kept: nn.Module = network.__dict__.get(KEPT, network)
    return kept


def add_count_methods(network: nn.Module) -> None:
    """Install methods that count the float network's parameters and the bytes of the quantized one."""
    give(network, "num_parameters", _num_parameters)
    give(network, "get_memory_footprint", _get_memory_footprint)
    give(network, "to", _to)
    give(network, "half", _half)
    give(network, "float", _float)
    for name in ("fuse_qkv_projections", "unfuse_qkv_projections", "set_default_attn_processor"):
        if hasattr(type(network), name):
            give(network, name, _KEEPERS[name])


def is_quantized_tensor(network: nn.Module, name: str) -> bool:
    """Return whether the tensor `name` belongs to quantization: such tensors keep their dtype whatever the network's is."""
    parent, _, leaf = name.rpartition(".")
    holder = network.get_submodule(parent) if parent else network
    if isinstance(holder, QuantLayer | LowRankBranch | PredictionTables) or leaf == "timesteps":
        return True
    return is_attention(holder) and leaf.endswith(("_scale", "_zero_point"))


def cast_unquantized(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast the unquantized tensors of a network of packed layers to `dtype`, in place."""
    tensors = chain(network.named_parameters(), network.named_buffers())
    for name, tensor in list(tensors):
        if tensor.is_floating_point() and tensor.dtype != dtype and not is_quantized_tensor(network, name):
            tensor.data = tensor.data.to(dtype)
    return network


def _to(network: Any, *args: Any, **kwargs: Any) -> Any:
    """Replace `to`: cast unquantized tensors to a given dtype, where diffusers refuses dtypes for quantized networks.

    Pipelines cast their networks, and so does `from_pipe`, whose default is float32.
    """
    device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
    if dtype is not None and KEPT in network.__dict__:
        nn.Module.to(network, dtype)
    elif dtype is not None:
        cast_unquantized(network, dtype)
    return network if device is None else type(network).to(network, device, non_blocking=non_blocking)


def _half(network: Any) -> Any:
    return _to(network, torch.float16)


def _float(network: Any) -> Any:
    return _to(network, torch.float32)


def _state_dict(network: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Return the `state_dict` of the packed form, which `load` and `from_pretrained` read, with this network's adapters."""
    packed = packed_form(network)
    state: dict[str, Any] = type(packed).state_dict(packed, *args, **kwargs)
    own = type(network).state_dict(network, *args, **kwargs)
    return state | {name: value for name, value in own.items() if ".lora_" in name}


def _num_parameters(network: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """Return the number of parameters of the original float network; packed parameters are not trainable."""
    count = 0
    for module in packed_form(network).modules():
        if isinstance(module, PackedLayer):
            bias = 0 if module.bias is None else module.bias.numel()
            count += 0 if only_trainable else module._weight_shape().numel() + bias
        elif not (exclude_embeddings and isinstance(module, nn.Embedding)):
            own = module.parameters(recurse=False)
            count += sum(p.numel() for p in own if p.requires_grad or not only_trainable)
    return count


def _get_memory_footprint(network: Any, return_buffers: bool = True) -> int:
    """Return the bytes of the network's tensors: packed words, or the kernels' own layouts of them."""
    tensors = {id(t): t for t in network.parameters()}
    if return_buffers:
        tensors |= {id(t): t for t in network.buffers()}
    for module in network.modules():
        waiting = getattr(module, "source", None)  # an integer layer that has not run reads the packed words then
        expanded = getattr(module, "_expanded", None)
        if waiting is not None and getattr(module, "packed", None) is None:
            tensors[id(waiting.words)] = waiting.words
        if isinstance(expanded, Tensor):
            tensors[id(expanded)] = expanded
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _keep_projections(_network: Any) -> None:
    report.say("dqtool: q, k and v are quantized as they are and share one input: their projections are not fused")


def _restore_processors(network: Any) -> None:
    """Reinstall every attention's quantizing processor, the default of a quantized network."""
    for module in network.modules():
        if OWN in module.__dict__:
            set_own(module, module.__dict__[OWN])


_KEEPERS = {
    "fuse_qkv_projections": _keep_projections,
    "unfuse_qkv_projections": _keep_projections,
    "set_default_attn_processor": _restore_processors,
}
"""Methods of diffusers' networks that would replace quantized products by float ones."""
