"""What a network does when it runs: its layers in execution order, which of them are its ends, who feeds whom.

One forward pass on shapes alone (the `meta` device) records everything. Roles and dependencies are read from autograd's
graph, so they follow the data and not names or positions in a list.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from dqtool.graph.attention import attention_layout, is_attention
from dqtool.graph.padding import zero_padding

__all__ = ["BlockInfo", "LayerInfo", "Trace", "is_quantizable", "kept_float", "trace"]


@dataclass
class LayerInfo:
    """One Conv2d, Linear or attention product pair, as it ran.

    `macs` are multiply-accumulates for one sample; `role` is "input" (first consumer of the sample), "output" (producer
    of the network's output) or None; `shares` names the layer whose quantized input this one reuses (q of q, k, v).
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


@dataclass
class BlockInfo:
    """A unit of block-wise training: its name, and the earlier blocks whose outputs it (or the glue before it) reads."""

    name: str
    reads: set[str] = field(default_factory=set)


@dataclass
class Trace:
    """Layers and blocks in execution order. `output_reads` are the blocks the network's output is made from."""

    layers: list[LayerInfo]
    blocks: list[BlockInfo]
    output_reads: set[str]

    def last_reader(self) -> dict[str, int]:
        """For each block, the index of the last block that reads its output (`len(blocks)` for the network's output)."""
        last = {block.name: -1 for block in self.blocks}
        for index, block in enumerate(self.blocks):
            last.update(dict.fromkeys(block.reads, index))
        last.update({name: len(self.blocks) for name in self.output_reads})
        return last


def is_quantizable(module: nn.Module) -> bool:
    """Whether this is a leaf dqtool quantizes."""
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and zero_padding(module) is not None)


def kept_float(model: nn.Module, layers: Collection[LayerInfo]) -> dict[str, str]:
    """What of `model` is not among the traced `layers`, and why: Conv2d and Linear that no forward pass runs, convolutions
    that pad with something else than zeros, and attention products that nobody here knows how to compute."""
    seen = {info.name for info in layers}
    found = {}
    for name, module in model.named_modules():
        if is_quantizable(module) and name not in seen:
            found[name] = "never runs in a forward pass"
        elif isinstance(module, nn.Conv2d) and not is_quantizable(module):
            found[name] = f"its padding has no integer form ({module.padding}, {module.padding_mode})"
        elif all(hasattr(module, part) for part in ("to_q", "to_k", "to_v", "processor")) and not is_attention(module):
            found[name] = f"the two products of {type(module.processor).__name__} are not known"  # type: ignore[union-attr]
    return found


def trace(
    model: nn.Module, inputs: Mapping[str, Any], sample: str = "sample", block_classes: Collection[str] = ()
) -> Trace:
    """Run `model(**inputs)` on the meta device and report what happened.

    `inputs` holds tensors of batch 1 (any device; only shapes matter), `sample` names the one whose consumers are the
    input end, `block_classes` the class names that are trained as one block. Every quantizable leaf outside of them is
    a block of its own.
    """
    ghost = _ghost_of(model)
    arguments = tree_map(lambda v: v.to("meta") if isinstance(v, Tensor) else v, dict(inputs))
    arguments[sample] = arguments[sample].detach().requires_grad_(True)
    block_names = find_blocks(ghost, block_classes)
    layers: list[LayerInfo] = []
    blocks: list[BlockInfo] = []
    layer_inputs: dict[str, list[Any]] = {}
    block_inputs: dict[str, list[Any]] = {}
    layer_outputs: dict[Any, str] = {}
    block_outputs: dict[Any, str] = {}
    attention: dict[str, tuple[int, int]] = {}
    made: dict[tuple[str, type], Any] = {}

    def enter(name: str, record: dict[str, list[Any]]) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            record[name] = [t.grad_fn or t for t in tensors if t.requires_grad]
            if is_attention(module):
                attention[name] = _sequence_lengths(module, args, kwargs)

        return hook

    def leave(name: str, outputs: dict[Any, str], order: list, make: Callable[[nn.Module, Any], Any]) -> Callable:
        def hook(module: nn.Module, _args: tuple, output: Any) -> None:
            for t in tree_leaves(output):
                if isinstance(t, Tensor) and t.grad_fn is not None:
                    outputs[t.grad_fn] = name
            info = make(module, output)
            again = made.setdefault((name, type(info)), info)
            if again is info:
                order.append(info)
            elif isinstance(info, LayerInfo):  # called more than once: what runs counts
                again.macs += info.macs

        return hook

    for name, module in ghost.named_modules():
        if is_quantizable(module):
            module.register_forward_pre_hook(enter(name, layer_inputs), with_kwargs=True)
            module.register_forward_hook(leave(name, layer_outputs, layers, partial(_layer_info, name)))
        elif is_attention(module) and name not in block_names:
            module.register_forward_pre_hook(enter(name, {}), with_kwargs=True)
        if is_attention(module):
            module.register_forward_hook(lambda m, _a, _o, n=name: layers.append(_attention_info(n, m, *attention[n])))
        if name in block_names:
            module.register_forward_pre_hook(enter(name, block_inputs), with_kwargs=True)
            module.register_forward_hook(leave(name, block_outputs, blocks, partial(_block_info, name)))
    with torch.enable_grad():
        output = ghost(**arguments)
    results = list(tree_leaves(output if isinstance(output, tuple | Tensor) else tuple(output.values())))

    _, heads_up = _reach((t.grad_fn for t in results if isinstance(t, Tensor)), layer_outputs, None)
    for info in layers:
        if info.kind != "attention":
            from_sample, _ = _reach(layer_inputs[info.name], layer_outputs, arguments[sample])
            info.role = "input" if from_sample else "output" if info.name in heads_up else None
    for block in blocks:
        _, block.reads = _reach(block_inputs[block.name], block_outputs, None)
    _, output_reads = _reach((t.grad_fn for t in results if isinstance(t, Tensor)), block_outputs, None)
    _mark_shared(ghost, layers)
    return Trace(layers, blocks, output_reads)


def find_blocks(model: nn.Module, block_classes: Collection[str]) -> set[str]:
    """Names of the outermost modules of `block_classes`, and of the quantizable leaves outside of them. A leaf that
    several places share (a repeated embedder) belongs to none of them and is a block of its own."""
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


def _reach(starts: Iterable[Any], stops: Mapping[Any, str], leaf: Tensor | None) -> tuple[bool, set[str]]:
    """Walk autograd's graph up from `starts`, not past the nodes in `stops`: whether `leaf` was met, and which stops."""
    seen: set[Any] = set()
    found: set[str] = set()
    met = False
    pending = list(starts)
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, Tensor):
            met = met or node is leaf
            continue
        if node in stops:
            found.add(stops[node])
            continue
        if leaf is not None and getattr(node, "variable", None) is leaf:
            met = True
        pending.extend(parent for parent, _ in node.next_functions)
    return met, found


def _layer_info(name: str, module: nn.Module, output: Tensor) -> LayerInfo:
    shape = tuple(module.weight.shape)  # type: ignore[union-attr,arg-type]
    positions = output[0, 0].numel() if output.dim() == 4 else output[0].numel() // output.shape[-1]
    if isinstance(module, nn.Linear) and output.dim() == 4:
        positions = output[0, ..., 0].numel()
    macs = positions * torch.Size(shape).numel()
    kind = "conv2d" if isinstance(module, nn.Conv2d) else "linear"
    return LayerInfo(name, kind, shape, macs, groups=getattr(module, "groups", 1), bias=module.bias is not None)


def _block_info(name: str, _module: nn.Module, _output: Any) -> BlockInfo:
    return BlockInfo(name)


def _attention_info(name: str, module: nn.Module, queries: int, keys: int) -> LayerInfo:
    heads: int = module.heads  # type: ignore[assignment]
    inner: int = module.to_q.out_features  # type: ignore[union-attr,assignment]
    return LayerInfo(name, "attention", (queries, keys, inner), 2 * queries * keys * inner, heads=heads)


def _ghost_of(model: nn.Module) -> nn.Module:
    """A copy on the `meta` device that asks for gradients; the weights themselves are never copied."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.is_floating_point())
    for b in model.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    return copy.deepcopy(model, memo).eval()


def _sequence_lengths(module: nn.Module, args: tuple, kwargs: dict) -> tuple[int, int]:
    hidden = args[0] if args else kwargs["hidden_states"]
    context = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
    queries = hidden.shape[2:].numel() if hidden.dim() == 4 else hidden.shape[1]
    if attention_layout(module) != "single":  # text and image attend to both
        total = queries + (0 if context is None else context.shape[1])
        return total, total
    return queries, queries if context is None else context.shape[1]


def _mark_shared(model: nn.Module, layers: list[LayerInfo]) -> None:
    """q, k, v of self-attention (k, v of cross-attention) read one tensor and share one quantized input; so do those of
    a second stream."""
    by_name = {info.name: info for info in layers}
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
