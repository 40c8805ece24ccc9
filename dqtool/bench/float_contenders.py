"""The float network in PyTorch: eager, channels-last or compiled, in float32 or bfloat16."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dqtool.bench.contender import Loaded
from dqtool.bench.subject import Arguments, Subject

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["load_float", "prepare_float"]

COMPILATIONS = 256
"""Most compilations of one network by `torch.compile`: each batch size and contender needs one."""


def load_float(subject: Subject, dtype: str, channels_last: bool = False, compiled: bool = False) -> Loaded:
    """Load the float network into PyTorch from its diffusers directory."""
    import diffusers
    import torch

    from dqtool.models.config_extras import apply_config_extras

    kind = getattr(torch, dtype)
    network = getattr(diffusers, subject.diffusers_class).from_pretrained(subject.float_directory, torch_dtype=kind)
    network = apply_config_extras(network, subject.config).eval().requires_grad_(False)
    if channels_last:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if compiled:
        # Beyond its limit of compilations of one code, torch.compile runs eager without a word.
        torch._dynamo.config.recompile_limit = COMPILATIONS
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        # Static shapes and frozen weights are the fastest that torch.compile offers.
        network = torch.compile(network, dynamic=False, options={"freezing": True})

    def run(arguments: Arguments) -> Tensor:
        with torch.no_grad():
            result: Tensor = network(**arguments, return_dict=False)[0]
            return result

    return Loaded(run, lambda arguments: Subject.cast(arguments, kind, channels_last))


def prepare_float(subject: Subject) -> None:
    """Write the float directory as `save_pretrained` does. That function refuses networks that share modules."""
    from dqtool.artifacts.tensorfile import save_tensors
    from dqtool.bench.reference import float_network
    from dqtool.graph.tied_modules import restore_copies
    from dqtool.models.components.export_layout import WEIGHTS
    from dqtool.models.families import family_of

    if subject.float_directory.exists():
        return
    network = float_network(subject)
    pairs = family_of(subject.class_name, subject.directory).tied_modules(subject.config)
    subject.float_directory.mkdir()
    network.save_config(subject.float_directory)  # type: ignore[operator]
    save_tensors(subject.float_directory / WEIGHTS, restore_copies(network.state_dict(), pairs))
