"""Runtime on NVIDIA GPUs: int8 tensor-core kernels in Triton, weights in their bits.

The step is looked up on the device, and a new step compiles nothing: a network runs eagerly, under `torch.compile` and in CUDA
graphs. No call waits for the device but one in 16 eager ones, which reads the timesteps that were not calibrated, to warn of
them; dqtool's own sampling reads them at its end. Between products a network computes in the dtype that `.to` asked for; step tables, scales and
multipliers stay float32.

With `DQTOOL_CUDA_ON_CPU=1` and Triton's interpreter the runtime computes on the CPU, very slowly: for tests alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils._pytree import tree_leaves

from dqtool import report
from dqtool.artifacts import Artifact
from dqtool.errors import EnvironmentFault
from dqtool.graph.attention import is_attention, own_processor
from dqtool.models.networks.packed import exported_tensors, is_static, packed_network, plans_of
from dqtool.models.networks.packed_checks import step_count
from dqtool.nn.attention import QuantAttnProcessor
from dqtool.nn.call_lock import give, give_forward, one_call_at_a_time, run_forward
from dqtool.nn.integer import IntegerLayer, integer_attention, integer_layer
from dqtool.nn.packed_form import is_quantized_tensor, keep_out_of_states, keep_packed_form, packed_form
from dqtool.nn.packed_layer import PackedLayer
from dqtool.nn.processors import set_own
from dqtool.nn.surgery import steps_of
from dqtool.runtimes.cpu import joined, sample_of, simulated_again, without
from dqtool.runtimes.cpu.attention import merge_projections
from dqtool.runtimes.cpu.blocks import fuse
from dqtool.runtimes.cuda.attention import TABLES, AttentionTables, CudaAttnProcessor
from dqtool.runtimes.cuda.products import CudaProduct, Glue, fits

__all__ = ["available", "convert", "integer_report", "load", "missing"]

ON_CPU = "DQTOOL_CUDA_ON_CPU"

OLDEST = (8, 0)
"""Compute capability from which tensor cores multiply int8 as the kernels do."""


def available() -> str | None:
    """Return the reason why this machine can't run the engine, or None. The first call compares some sums with exact ones."""
    reason = missing()
    if reason is not None or _interpreted():
        return reason
    from dqtool.runtimes.cuda.self_check import fault_of

    return fault_of(f"cuda:{torch.cuda.current_device()}")


def missing() -> str | None:
    """Return what the machine lacks to run the engine, or None."""
    if not _interpreted():
        if not torch.cuda.is_available():
            return "there is no CUDA device"
        found = torch.cuda.get_device_capability()
        if found < OLDEST:
            return f"the GPU has compute capability {found[0]}.{found[1]}, and the kernels need 8.0"
    try:
        import triton  # noqa: F401
    except ImportError:
        return 'Triton is not installed: pip install "dqtool[gpu]"'
    return None


def load(artifact: Artifact) -> nn.Module:
    """The network of an exported directory on integers, on the current CUDA device.

    Raises:
        EnvironmentFault: the machine can't run it.
    """
    reason = available()
    if reason is not None:
        raise EnvironmentFault(
            f"The cuda runtime can't run here: {reason}", where="--runtime", fix="Use --runtime auto"
        )
    manifest = artifact.manifest
    state = exported_tensors(artifact)
    plans, static = plans_of(manifest), is_static(manifest, step_count(state))
    network = packed_network(manifest.network.class_name, manifest.network.config, plans, state, static)
    return convert(network if _interpreted() else network.to("cuda"))  # the GPU packs its weights itself


def convert(network: nn.Module) -> nn.Module:
    """Replace the packed layers of a network by integer ones, in place. `integer_report` returns the arithmetic of each.

    The packed form stays in main memory, for saving.
    """
    keep_packed_form(network)
    _untie_parameters(network)
    glue = Glue()
    kinds: dict[str, str] = {}
    merged: set[str] = set()
    choose = partial(_choose, glue=glue)
    for name, module in list(network.named_modules()):
        if is_attention(module) and isinstance(own_processor(module), QuantAttnProcessor):
            kinds[name] = _convert_attention(module, glue)
            merge_projections(name, module, choose, kinds, merged)
    for name, module in list(network.named_modules()):
        if isinstance(module, PackedLayer) and name not in merged:
            kinds[name] = _convert_layer(network, name, module, choose)
    fuse(network)
    saved = packed_form(network).state_dict().keys()
    for name, module in network.named_modules():
        if isinstance(module, CudaProduct | AttentionTables):
            # accelerate's device maps pass over modules without a state. The scales are those of the packed form.
            keep_out_of_states(module, "weight_scale" if f"{name}.weight_scale" in saved else None)
    kept = packed_form(network)
    type(kept)._apply(kept, lambda t: t.cpu())  # a network that was loaded on the GPU would hold its weights twice
    network.__dict__["_dqtool_integer"] = kinds
    network.__dict__["_dqtool_current_step"] = glue
    network.__dict__["_dqtool_dtype"] = torch.float32
    repeated = list(getattr(type(network), "_repeated_blocks", None) or [])
    network.__dict__["_repeated_blocks"] = repeated + [f"Fused{name}" for name in repeated]
    give_forward(network, gpu_forward)
    give(network, "_apply", gpu_apply)
    return one_call_at_a_time(network).eval()


def integer_report(network: nn.Module) -> dict[str, str]:
    """Return "int8" or "float" for each quantized layer and attention of a converted network."""
    return dict(network.__dict__.get("_dqtool_integer", {}))


def gpu_forward(network: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of a converted network: its class's, with the rows of the step tables on the device of the sample."""
    original = type(network)
    given = sample_of(original, args, kwargs)
    leaf = next(t for t in tree_leaves(given) if isinstance(t, Tensor))
    if leaf.device.type == "cpu" and not _interpreted():
        return run_forward(_elsewhere(network, leaf.device), *args, **kwargs)
    glue: Glue = network.__dict__["_dqtool_current_step"]
    steps = steps_of(network)
    kept = glue.rows
    glue.rows = steps.rows.to(leaf.device) if is_compiling() else steps.rows_for(leaf)
    output = original.forward(network, *args, **kwargs)
    if is_compiling():
        glue.rows = kept
    batch = len(given)
    lost = _lost_samples((args, kwargs), batch, leaf)
    return joined([output], lambda parts: without(parts[0].to(leaf.dtype), lost))


def gpu_apply(network: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
    """`_apply` of a converted network: tensors move, and those of quantizers keep their dtypes.

    On a device that is neither a GPU nor the CPU it becomes the float simulation. On the CPU it waits in its form, as offloading
    does between calls; a call there makes it a network of the `cpu` runtime.
    """
    glue: Glue = network.__dict__["_dqtool_current_step"]
    probe = fn(torch.empty(0, dtype=glue.dtype))
    if probe.device.type not in ("cuda", "cpu", "meta"):
        return _elsewhere(network, probe.device)._apply(fn, recurse)
    fixed = {
        id(t)
        for name, t in (*network.named_parameters(), *network.named_buffers())
        if is_quantized_tensor(network, name)
    }

    def keep(t: Tensor) -> Tensor:
        changed = fn(t)
        return t.to(changed.device) if id(t) in fixed and changed.dtype != t.dtype else changed

    type(network)._apply(network, keep, recurse)
    glue.dtype = network.__dict__["_dqtool_dtype"] = probe.dtype
    return network


def _elsewhere(network: nn.Module, device: torch.device) -> nn.Module:
    """Return the network, in place, in a form that computes on `device`."""
    from dqtool.runtimes import cpu

    packed = simulated_again(network)
    if device.type == "cpu" and cpu.available() is None:
        report.say("runtime: cpu from here on: the network is called on the CPU")
        converted = cpu.convert(packed)
        converted.runtime = "cpu"  # type: ignore[assignment]
        return converted
    report.say(f"runtime: simulate from here on: the network computes on {device}")
    return packed


def _interpreted() -> bool:
    return os.environ.get(ON_CPU) == "1"


def _choose(layer: IntegerLayer, glue: Glue) -> CudaProduct | None:
    """Return the product that computes a layer exactly; None for a layer that stays float."""
    return CudaProduct(layer, glue) if fits(layer) else None


def _convert_layer(
    network: nn.Module, name: str, layer: PackedLayer, choose: Callable[[IntegerLayer], CudaProduct | None]
) -> str:
    try:
        product = choose(integer_layer(layer, keep_packed=True))
    except TypeError:  # a geometry without integer form
        product = None
    if product is None:
        return "float"
    parent, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(parent) if parent else network, leaf, product)
    return "int8"


def _convert_attention(attn: Any, glue: Glue) -> str:
    """Give one attention module the processor of this runtime, and its tables."""
    operands = integer_attention(attn)
    exact = operands.is_integer and all(operands.operands[n].signed for n in "qkv")
    exact = exact and operands.operands["probs"].bits <= 8
    set_own(attn, CudaAttnProcessor(own_processor(attn), operands if exact else None, glue))
    if exact:
        attn.add_module(TABLES, AttentionTables(operands))
    return "int8" if exact else "float"


def _untie_parameters(network: nn.Module) -> None:
    """Give the network parameters of its own: those of the packed form, which share memory with them, stay where they are."""
    made: dict[int, nn.Parameter] = {}
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                own = nn.Parameter(parameter.detach(), requires_grad=False)
                module._parameters[name] = made.setdefault(id(parameter), own)


def _lost_samples(arguments: Any, batch: int, leaf: Tensor) -> Tensor:
    """Return a mask `[N]`, on the device, of the samples with a NaN in an input: codes can't hold NaN."""
    lost = torch.zeros(batch, dtype=torch.bool, device=leaf.device)
    for value in tree_leaves(arguments):
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1 and len(value) == batch:
            lost = lost | value.isnan().flatten(1).any(1).to(leaf.device)
    return lost
