"""Layers and blocks of a recorded network in execution order, its input and output layers, and the blocks' dependencies."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dqtool.graph.attention import attention_layout, is_attention
from dqtool.graph.leaves import is_quantizable
from dqtool.graph.origins import follow_origins
from dqtool.graph.products import Calls
from dqtool.graph.recording import LEAVE, PRODUCTS, Op, Recording

__all__ = ["BlockInfo", "LayerInfo", "Trace", "block_names", "kept_float", "trace_of"]


@dataclass
class LayerInfo:
    """One Conv2d, Linear or attention product pair, as it ran.

    `macs` are multiply-accumulates for one sample; `role` is "input" (first consumer of the sample), "output" (producer
    of the network's output) or None; `shares` names the layer whose quantized input this one reuses (q of q, k, v).
    `rotation` is the group size of the Hadamard rotation that calibration gave the layer's input, 0 for none.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    macs: int
    role: str | None = None
    groups: int = 1
    heads: int = 0
    bias: bool = False
    shares: str | None = None
    rotation: int = 0


@dataclass
class BlockInfo:
    """A unit of block-wise training: its name, and the earlier blocks whose outputs it (or the glue before it) reads."""

    name: str
    reads: set[str] = field(default_factory=set)


@dataclass
class Trace:
    """Layers and blocks in execution order; `output_reads` names the blocks that the network's output is made from."""

    layers: list[LayerInfo]
    blocks: list[BlockInfo]
    output_reads: set[str]

    def last_reader(self) -> dict[str, int]:
        """Return, by block, the index of the last block that reads its output (`len(blocks)` for the network's output)."""
        last = {block.name: -1 for block in self.blocks}
        for index, block in enumerate(self.blocks):
            last.update(dict.fromkeys(block.reads, index))
        last.update({name: len(self.blocks) for name in self.output_reads})
        return last


def trace_of(recording: Recording, sample: str) -> Trace:
    """Read layers and blocks off a recording; `sample` names the input whose first readers are the network's input end."""
    layers = _find_layers(recording)
    _mark_ends(recording, layers, sample)
    _mark_shared(recording.network, layers)
    return Trace(list(layers.values()), *_find_blocks(recording))


def block_names(model: nn.Module, block_classes: Collection[str]) -> set[str]:
    """Return the outermost modules of `block_classes`, and the quantizable leaves outside of them, by name.

    A leaf that several places share (a repeated embedder) belongs to none of them and is a block of its own.
    """
    homes: dict[nn.Module, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        homes[module] = homes.get(module, 0) + 1
    names = {name for name, module in model.named_modules() if is_quantizable(module) and homes[module] > 1}
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix + ".") for prefix in inside):
            continue
        if type(module).__name__ in block_classes:
            names.add(name)
            inside.append(name)
        elif is_quantizable(module):
            names.add(name)
    return names


def quantizable_products(recording: Recording) -> set[str]:
    """Return the modules whose attention products are quantized although diffusers' processors don't tell their layout.

    A module with parts that are attention modules of a known layout is none of them.
    """
    known = [name for name, module in recording.network.named_modules() if is_attention(module)]
    return {
        name
        for name in recording.products.own
        if recording.products.single(name) and not any(f"{name}.".startswith(f"{each}.") for each in known)
    }


def kept_float(model: nn.Module, layers: Iterable[LayerInfo], products: Calls | None = None) -> dict[str, str]:
    """Return the reason why each multiplying part of `model` that stays float does so, by name.

    Such parts are Conv2d and Linear layers that the forward pass does not run, convolutions with non-zero padding or of
    another rank, and attention products that are no `scaled_dot_product_attention` of a module's own. `products` are the
    calls of the recording.
    """
    calls = products or Calls()
    seen = {info.name for info in layers}
    found = {}
    for name, module in model.named_modules():
        if is_quantizable(module) and name not in seen:
            found[name] = "never runs in a forward pass"
        elif isinstance(module, nn.Conv2d) and not is_quantizable(module):
            found[name] = f"its padding has no integer form ({module.padding}, {module.padding_mode})"
        elif isinstance(module, nn.Conv1d | nn.Conv3d):
            found[name] = f"a {type(module).__name__} is not quantized"
        elif name in seen or is_attention(module):
            continue
        elif calls.own[name]:
            found[name] = f"its products can't be told apart: {calls.own[name]} calls in {calls.runs[name]} runs"
        elif all(hasattr(module, part) for part in ("to_q", "to_k", "to_v")) and (calls.runs[name] or products is None):
            processor = type(getattr(module, "processor", module)).__name__
            found[name] = f"the products of {processor} are no scaled dot-product attention"
    return found


def _find_layers(recording: Recording) -> dict[str, LayerInfo]:
    """Return layers and attention products in the order in which they first end; MACs add up over their calls."""
    found: dict[str, LayerInfo] = {}
    products = quantizable_products(recording)
    for op in recording.ops:
        info = None
        if op.layer is not None:
            info = _layer_info(op.layer, recording.network.get_submodule(op.layer), op.outputs[0])
        elif op.name == PRODUCTS:
            if op.module is not None and op.module in products:
                info = _products_info(op.module, *op.args)
        elif op.module is not None and op.name == LEAVE:
            module = recording.network.get_submodule(op.module)
            if is_attention(module):
                info = _attention_info(op.module, module, *_sequence_lengths(module, *op.args))
        if info is not None and found.setdefault(info.name, info) is not info:
            found[info.name].macs += info.macs
    return found


def _mark_ends(recording: Recording, layers: dict[str, LayerInfo], sample: str) -> None:
    """Set the role of the first layers that read the sample and of the last layers before the output."""
    starts = {"": recording.inputs[sample]}
    read = follow_origins(recording, starts, _multiplies, nearest=True)
    for name, calls in recording.calls.items():
        if "" in read.get(calls[-1], ()):
            layers[name].role = "input"
    for name in read.get(recording.ops[-1], ()):
        if name in layers and layers[name].role is None:
            layers[name].role = "output"


def _multiplies(op: Op) -> str | None:
    """Return the layer that an operation is; a convolution that stays float ends the sample's way as a layer does."""
    return "(float)" if op.name.startswith("aten.convolution") else op.layer


def _find_blocks(recording: Recording) -> tuple[list[BlockInfo], set[str]]:
    """Return the blocks in the order in which they first end, and the blocks that the output is made from."""

    def ended(op: Op) -> str | None:
        name = op.layer or (op.module if op.name == LEAVE else None)
        return name if name in recording.blocks else None

    read = follow_origins(recording, {}, ended, nearest=True)
    blocks: dict[str, BlockInfo] = {}
    entered: dict[str, set[str]] = {}
    for op in recording.ops:
        name = op.layer or op.module
        if name in recording.blocks and op.name != LEAVE:
            entered[name] = set(read.get(op, ()))
        if (ending := ended(op)) is not None:
            blocks.setdefault(ending, BlockInfo(ending)).reads = entered[ending]
    return list(blocks.values()), set(read.get(recording.ops[-1], ()))


def _layer_info(name: str, module: nn.Module, output: Tensor) -> LayerInfo:
    shape = tuple(module.weight.shape)  # type: ignore[arg-type]
    positions = output[0, 0].numel() if output.dim() == 4 else output[0].numel() // output.shape[-1]
    if isinstance(module, nn.Linear) and output.dim() == 4:
        positions = output[0, ..., 0].numel()
    macs = positions * torch.Size(shape).numel()
    kind = "conv2d" if isinstance(module, nn.Conv2d) else "linear"
    return LayerInfo(name, kind, shape, macs, groups=getattr(module, "groups", 1), bias=module.bias is not None)


def _attention_info(name: str, module: nn.Module, queries: int, keys: int) -> LayerInfo:
    heads: int = module.heads  # type: ignore[assignment]
    inner: int = module.to_q.out_features  # type: ignore[union-attr,assignment]
    return LayerInfo(name, "attention", (queries, keys, inner), 2 * queries * keys * inner, heads=heads)


def _products_info(name: str, query: Tensor, key: Tensor, value: Tensor) -> LayerInfo:
    heads, queries, width = query.shape[1:]
    keys = key.shape[2]
    macs = len(query) * heads * queries * keys * (width + value.shape[3])  # frames of a video may be in the batch
    return LayerInfo(name, "attention", (queries, keys, heads * width), macs, heads=heads)


def _sequence_lengths(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
    hidden = args[0] if args else kwargs["hidden_states"]
    context = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
    queries = hidden.shape[2:].numel() if hidden.dim() == 4 else hidden.shape[1]
    if attention_layout(module) != "single":  # text and image attend to both
        total = queries + (0 if context is None else context.shape[1])
        return total, total
    return queries, queries if context is None else context.shape[1]


def _mark_shared(model: nn.Module, by_name: dict[str, LayerInfo]) -> None:
    """Note which projections share one quantized input: q, k, v of self-attention, k, v of cross-attention, and those of a
    second stream."""
    for name, module in model.named_modules():
        if not is_attention(module):
            continue
        q, k, v = (by_name.get(f"{name}.to_{which}") for which in "qkv")
        if q is None or k is None or v is None:
            continue
        attention = by_name[name]
        crossed = attention.shape[0] != attention.shape[1] or k.shape[1] != q.shape[1] or _is_cross(module)
        if not crossed:
            k.shares = v.shares = q.name
        else:
            v.shares = k.name
        added = [by_name.get(f"{name}.add_{which}_proj") for which in "qkv"]
        if all(added):
            added[1].shares = added[2].shares = added[0].name  # type: ignore[union-attr]


def _is_cross(module: nn.Module) -> bool:
    return bool(getattr(module, "is_cross_attention", False))
