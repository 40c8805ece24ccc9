"""Runtime in int8 on the CPU, in eager PyTorch: compiled kernels where a C++ compiler is found, else oneDNN's operations.

In memory a weight takes one byte, 16/9 of a byte where a 3x3 convolution of up to 5 or 6 bits runs as a Winograd transform. In
large networks on AVX2, one of up to 4 bits takes half a byte (`memory.py`).
Nothing is recompiled when the step, the batch or the resolution changes.

A network computes in float32 around its products. `.to(torch.float16)`, for example of a whole pipeline, changes the
attribute `dtype` and no tensor; outputs have the dtype of the input. A NaN in one sample leaves the other samples of the
batch as they are.
"""

from __future__ import annotations

import inspect
import platform
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils._pytree import tree_leaves, tree_map

from dqtool import report
from dqtool.artifacts import Artifact
from dqtool.core.allocator import FilePages, keep_freed_memory
from dqtool.errors import EnvironmentFault, UsageError
from dqtool.graph.attention import is_attention, own_processor
from dqtool.models.components.export_layout import weights_files
from dqtool.models.networks.packed import exported_tensors, is_static, packed_network, plans_of
from dqtool.models.networks.packed_checks import step_count
from dqtool.nn.attention import QuantAttnProcessor
from dqtool.nn.call_lock import give, give_forward, one_call_at_a_time, run_forward, take_forward
from dqtool.nn.integer import IntegerLayer, integer_attention, integer_layer
from dqtool.nn.packed_form import PACKED_FORM, cast_unquantized, keep_out_of_states, keep_packed_form, packed_form
from dqtool.nn.packed_layer import PackedLayer
from dqtool.nn.processors import set_own
from dqtool.nn.surgery import steps_of
from dqtool.runtimes.cpu import library
from dqtool.runtimes.cpu.attention import IntegerAttnProcessor, merge_projections
from dqtool.runtimes.cpu.blocks import fuse
from dqtool.runtimes.cpu.codes import CurrentStep
from dqtool.runtimes.cpu.float_layer import FloatLayer
from dqtool.runtimes.cpu.memory import choose_memory
from dqtool.runtimes.cpu.native_product import NativeProduct
from dqtool.runtimes.cpu.onednn_product import OnednnProduct
from dqtool.runtimes.cpu.product import Product
from dqtool.runtimes.cpu.threads import step_threads

__all__ = ["available", "convert", "integer_report", "joined", "load", "simulated_again", "without"]

SERVED = ("cpu", "meta")
"""Devices that a converted network may move to."""

ENGINES = {"cuda": "dqtool.runtimes.cuda"}
"""Modules of the runtimes that take over when a network moves to a device that is not in `SERVED`."""


def available() -> str | None:
    """Return the reason why this machine can't run the engine, or None."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"the processor is {platform.machine()}, and oneDNN's int8 operations need x86-64"
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.onednn, "qconv2d_pointwise"):
        return "this build of PyTorch has no oneDNN"
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return f"the processor lacks AVX2 (PyTorch found {torch.backends.cpu.get_cpu_capability()})"
    return None


def load(artifact: Artifact) -> nn.Module:
    """Load the network of an exported directory on integer kernels.

    Raises:
        EnvironmentFault: the machine can't run it.
    """
    reason = available()
    if reason is not None:
        raise EnvironmentFault(
            f"The cpu runtime can't run here: {reason}", where="--runtime", fix="Use --runtime simulate or openvino"
        )
    manifest = artifact.manifest
    mapped = exported_tensors(artifact)
    weights = weights_files(manifest.pipeline, manifest.files or ())[0]
    # Only packed codes stay views of the mapped file, until they are in the kernels' layout. Then their pages are let go.
    state = {name: t if name.endswith(".weight_packed") else t.clone() for name, t in mapped.items()}
    pages = FilePages(artifact.path / weights, next(iter(mapped.values()), None))
    network = convert(
        packed_network(
            manifest.network.class_name,
            manifest.network.config,
            plans_of(manifest),
            state,
            is_static(manifest, step_count(state)),
        )
    )
    for tensor in mapped.values():  # pages that were read, and pages of a file just written
        pages.release(tensor.data_ptr(), tensor.nbytes)
    for module in network.modules():
        if isinstance(module, NativeProduct):
            module.pages = pages
    return network


def convert(network: nn.Module) -> nn.Module:
    """Replace the packed layers of a network by integer ones, in place. `integer_report` returns the arithmetic of each.

    The network's tensors then keep their dtypes and stay on the CPU; its attribute `dtype` is the last one that `.to` got.
    """
    if library.get() is None:
        report.warn(f"cpu: the compiled kernels are missing, and products run slower: {library.problem()}")
    keep_freed_memory()
    keep_packed_form(network)
    current_step = CurrentStep()
    kinds: dict[str, str] = {}
    merged: set[str] = set()
    for name, module in list(network.named_modules()):
        if is_attention(module) and isinstance(own_processor(module), QuantAttnProcessor):
            kinds[name] = _convert_attention(name, module, current_step, kinds, merged)
    for name, module in list(network.named_modules()):
        if isinstance(module, PackedLayer) and name not in merged:
            _replace(network, name, _product(name, module, current_step, kinds))
    for module in network.modules():
        if isinstance(module, Product):
            keep_out_of_states(module)
    choose_memory(network)
    if library.get() is not None:
        fuse(network)
    network.__dict__["_dqtool_integer"] = kinds
    network.__dict__["_dqtool_current_step"] = current_step
    network.__dict__["_dqtool_dtype"] = torch.float32
    repeated = list(getattr(type(network), "_repeated_blocks", None) or [])
    blocks = repeated + [f"Fused{name}" for name in repeated]  # class names for `compile_repeated_blocks`
    network.__dict__["_repeated_blocks"] = blocks
    give_forward(network, integer_forward)
    give(network, "_apply", integer_apply)
    return one_call_at_a_time(network, step_threads).eval()


def integer_report(network: nn.Module) -> dict[str, str]:
    """Return "int8" or "float" for each quantized layer and attention of a converted network."""
    return dict(network.__dict__.get("_dqtool_integer", {}))


def _product(name: str, layer: PackedLayer, current_step: CurrentStep, kinds: dict[str, str]) -> nn.Module:
    """Return the integer form of one layer, or the layer itself."""
    try:
        integer = integer_layer(layer, keep_packed=True)
    except TypeError:  # a geometry without integer form
        product = None
    else:
        product = choose_product(integer, current_step)
    kinds[name] = "float" if product is None else "int8"
    return FloatLayer.of(layer) if product is None else product


def choose_product(layer: IntegerLayer, current_step: CurrentStep) -> Product | None:
    """Return the product that computes a layer exactly on this machine; None for a layer that stays float."""
    if not layer.is_integer:
        return None
    if library.has_products() and layer.groups == 1:
        return NativeProduct(layer, current_step)
    return OnednnProduct(layer, current_step) if OnednnProduct.exact(layer) else None


def _convert_attention(name: str, attn: Any, current_step: CurrentStep, kinds: dict[str, str], merged: set[str]) -> str:
    """Give one attention module the integer processor, and merge projections of one input; return its arithmetic."""
    operands = integer_attention(attn)
    native = library.has_products() and operands.is_integer
    native = native and all(operands.operands[n].signed for n in "qkv") and operands.operands["probs"].bits <= 8
    own = own_processor(attn)
    scale = own.scale_of(attn)
    if scale is None and isinstance(getattr(attn, "head_dim", None), int):
        scale = attn.head_dim**-0.5
    set_own(attn, IntegerAttnProcessor(own, operands if native else None, current_step, scale))
    merge_projections(name, attn, partial(choose_product, current_step=current_step), kinds, merged)
    return "int8" if native else "float"


def sample_of(network_class: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the sample among the arguments of a network's forward: its first parameter, wherever the caller wrote it."""
    return args[0] if args else kwargs[list(inspect.signature(network_class.forward).parameters)[1]]  # type: ignore[attr-defined]


def integer_forward(network: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the forward of a converted network's class in float32, one step at a time."""
    original = type(network)
    given = sample_of(original, args, kwargs)
    given = given if isinstance(given, Tensor) else torch.stack(list(given))  # some networks take a list of samples
    if given.device.type not in SERVED:
        # Hooks that move the tensors of one layer after the other never move the network. It moves as a whole.
        integer_apply(network, lambda t: t.to(given.device))
        return run_forward(network, *args, **kwargs)
    if is_compiling():
        return _traced(original, network, given, tree_map(_float32, args), tree_map(_float32, kwargs))
    asked, network.__dict__["_dqtool_dtype"] = _dtype(network), torch.float32
    try:
        output = _step_by_step(original, network, given, tree_map(_float32, args), tree_map(_float32, kwargs))
    finally:
        network.__dict__["_dqtool_dtype"] = asked
    lost = _nan_samples((args, kwargs), len(given))
    if given.dtype == torch.float32 and not bool(lost.any()):
        return output
    return joined([output], lambda parts: without(parts[0].to(given.dtype), lost))


def integer_apply(network: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
    """Replace `_apply` of a converted network: keep its tensors, whose addresses the kernels know, and note the dtype.

    On a device that the kernels don't serve it becomes a network of that device's runtime, else the float simulation.
    """
    probe = fn(torch.empty(0, dtype=_dtype(network)))
    if probe.device.type not in SERVED:
        engine = _engine_on(probe.device)
        if engine is not None:
            report.say(f"runtime: {probe.device.type} from here on: the network moves to {probe.device}")
            asked = _dtype(network)
            moved: nn.Module = engine.convert(simulated_again(network)).to(asked)
            moved.runtime = probe.device.type  # type: ignore[assignment]
            return moved._apply(fn, recurse)
        report.say(f"runtime: simulate from here on: cpu computes on the CPU, and the network moves to {probe.device}")
        return simulated_again(network)._apply(fn, recurse)

    def keep(t: Tensor) -> Tensor:  # the kernels read float32 by address
        changed = fn(t)
        return changed if changed.dtype == t.dtype else t

    type(network)._apply(network, keep, recurse)
    network.__dict__["_dqtool_dtype"] = probe.dtype
    return network


def _engine_on(device: torch.device) -> ModuleType | None:
    """Return the integer runtime of a device, or None where there is none or it can't run."""
    name = ENGINES.get(device.type)
    engine = None if name is None else import_module(name)
    return engine if engine is not None and engine.available() is None else None


def simulated_again(network: nn.Module) -> nn.Module:
    """Turn a converted network back into a packed one, in place, which simulates in the last dtype that `.to` got.

    Raises:
        UsageError: LoRAs are loaded. They are in the converted network alone, and would be lost.
    """
    if getattr(network, "peft_config", None):
        raise UsageError(
            "The network has LoRAs, and changes its engine when it moves to this device",
            fix="Move the pipeline first, then load the LoRA (`unload_lora_weights` removes it)",
        )
    dtype, packed, rows = _dtype(network), packed_form(network), steps_of(network).rows
    take_forward(network)
    for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_dqtool_steps"):
        network.__dict__[name] = packed.__dict__[name]
    for name in (
        "_apply",
        *PACKED_FORM,
        "_dqtool_current_step",
        "_dqtool_integer",
        "_dqtool_dtype",
        "_repeated_blocks",
    ):
        network.__dict__.pop(name, None)
    steps_of(network).select(rows)  # a hook may change the form in the middle of a call
    network.runtime = "simulate"  # type: ignore[assignment]
    return cast_unquantized(one_call_at_a_time(network), dtype)


def _dtype(network: nn.Module) -> torch.dtype:
    return network.__dict__.get("_dqtool_dtype", torch.float32)


def _traced(original: Any, network: Any, sample: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run the forward of the class `original` as a graph contains it: no decision depends on a tensor's values."""
    current_step: CurrentStep = network.__dict__["_dqtool_current_step"]
    kept = current_step.rows
    current_step.rows = steps_of(network).rows
    output = original.forward(network, *args, **kwargs)
    current_step.rows = kept
    lost = _nan_samples((args, kwargs), len(sample))
    return joined([output], lambda parts: without(parts[0].to(sample.dtype), lost))


def _step_by_step(original: Any, network: nn.Module, sample: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Set the current step and run the forward of the class `original`. A batch of several steps runs once for each step."""
    steps = steps_of(network)
    rows = asked = steps.rows
    current_step: CurrentStep = network.__dict__["_dqtool_current_step"]
    if not len(sample):  # the kernels divide by sizes: one sample of zeros runs, and none of it is returned
        args, kwargs = tree_map(_one_of_zeros, args), tree_map(_one_of_zeros, kwargs)
        steps.select(asked if len(asked) else torch.zeros(1, dtype=torch.long))
        try:
            output = _step_by_step(original, network, sample.new_zeros(1), args, kwargs)
        finally:
            steps.select(asked)
        return joined([output], lambda parts: parts[0][:0])
    if len(rows) == 1:
        current_step.row, current_step.rows = int(rows[0]), rows
        return original.forward(network, *args, **kwargs)
    batch = len(sample)
    rows = rows.repeat_interleave(batch // len(rows))
    outputs: list[tuple[Tensor, Any]] = []
    try:
        for row in rows.unique().tolist():
            chosen = (rows == row).nonzero().flatten()

            def pick(value: Any, chosen: Tensor = chosen) -> Any:
                if _is_batch(value, batch):
                    return [value[index] for index in chosen.tolist()]
                mixed = isinstance(value, Tensor) and value.dim() > 0 and len(value) == batch
                return value[chosen] if mixed else value

            current_step.row, current_step.rows = int(row), torch.tensor([row])
            steps.select(current_step.rows)  # for what stayed float
            mine = tree_map(pick, (args, kwargs), is_leaf=partial(_is_batch, batch=batch))
            outputs.append((chosen, original.forward(network, *mine[0], **mine[1])))
    finally:
        steps.select(asked)
    order = torch.cat([chosen for chosen, _ in outputs]).argsort()
    return joined([out for _, out in outputs], lambda parts: torch.cat(parts)[order])


def joined(outputs: list[Any], join: Callable[[list[Tensor]], Tensor]) -> Any:
    """Return one output with the structure of `outputs`; `join` makes each tensor from theirs."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return join(outputs)
    if isinstance(first, tuple) and not hasattr(first, "to_tuple"):
        return tuple(joined(list(parts), join) for parts in zip(*outputs, strict=True))
    if isinstance(first, list):  # one tensor for each sample
        return list(join([torch.stack(samples) for samples in outputs]).unbind())
    return type(first)(**{key: joined([out[key] for out in outputs], join) for key in first})


def _is_batch(value: Any, batch: int) -> bool:
    """Return whether a list holds one item for each sample of a batch: sizes, or the samples themselves."""
    return (
        isinstance(value, list)
        and len(value) == batch
        and not (value and isinstance(value[0], Tensor) and len(value[0]) == batch)
    )


def _nan_samples(arguments: Any, batch: int) -> Tensor:
    """Return a mask `[N]` of the samples with a NaN in an input. Codes can't hold NaN, so the first layer would lose it."""
    lost = torch.zeros(batch, dtype=torch.bool)
    for value in tree_leaves(arguments):
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1 and len(value) == batch:
            lost |= value.isnan().flatten(1).any(1)
    return lost


def without(output: Tensor, lost: Tensor) -> Tensor:
    """Return `output` `[N, ...]` with NaN for the samples of the mask `lost` `[N]`."""
    return output.masked_fill(lost.to(output.device).view(-1, *(1,) * (output.dim() - 1)), torch.nan)


def _one_of_zeros(value: Any) -> Any:
    empty = isinstance(value, Tensor) and value.dim() > 0 and not len(value)
    return value.new_zeros(1, *value.shape[1:]) if empty else value


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _replace(network: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(parent) if parent else network, leaf, layer)


def _offer_dtype() -> None:
    """Make `dtype` of diffusers' networks return, for a converted network, the last one that `.to` got."""
    from diffusers import ModelMixin

    base: Any = ModelMixin
    own = base.dtype.fget

    def dtype(self: Any) -> torch.dtype:
        """`torch.dtype`: The dtype of the module (assuming that all the module parameters have the same dtype)."""
        asked = self.__dict__.get("_dqtool_dtype")
        return own(self) if asked is None else asked

    base.dtype = property(dtype)


_offer_dtype()
