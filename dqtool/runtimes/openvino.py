"""int8 through OpenVINO on CPUs, the step tables in the graph (`dqtool.formats.openvino`).

`dqtool.runtimes.openvino_graphs` compiles the graphs and keeps them. A change of step changes an input of the graph and
nothing else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from dqtool.artifacts import Artifact
from dqtool.errors import EnvironmentFault, UsageError
from dqtool.formats import require
from dqtool.formats.openvino import EXTRA, integer_layers
from dqtool.models.families import family_of
from dqtool.models.families.examples import ARGUMENTS
from dqtool.models.networks.packed import empty_network, exported_tensors, is_static, plans_of
from dqtool.nn.call_lock import CallLock
from dqtool.nn.prediction import is_correcting
from dqtool.nn.steps import StepIndex, nearest_rows
from dqtool.nn.traceable import flat_leaves
from dqtool.runtimes.openvino_fixed import Fixed
from dqtool.runtimes.openvino_graphs import CompiledGraphs

__all__ = ["OpenVINONetwork", "available", "integer_report", "load"]

ATTENTION_ARGUMENTS = {"cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs"}
"""Arguments through which pipelines pass a dict to attention processors."""


def available() -> str | None:
    """Return the reason why this runtime can't run here, or None."""
    try:
        require("openvino", EXTRA)
    except EnvironmentFault as e:
        return str(e)
    return None


def load(artifact: Artifact, precision: str = "f32") -> nn.Module:
    """Load the network of an exported directory, of format `dq` or `openvino`.

    `precision` ("f32" or "bf16") is that of everything but the integer products; less than f32 flips codes.

    Raises:
        EnvironmentFault: OpenVINO is not installed.
        ArtifactError: the packed tensors don't fit the manifest, or hold values that no quantizer makes.
        NumericError: a tensor holds a NaN or an infinity.
    """
    require("openvino", EXTRA)
    manifest = artifact.manifest
    if manifest.parameters.format == "dq":  # graphs are built from these tensors at the first call
        network = manifest.network
        empty_network(network.class_name, network.config, plans_of(manifest), exported_tensors(artifact))
    return OpenVINONetwork(artifact, precision).eval()


def integer_report(network: nn.Module) -> dict[str, str]:
    """Return "int8" or "float" for each quantized layer and attention, from the graph that was used last; empty before the
    first step."""
    assert isinstance(network, OpenVINONetwork)
    compiled = network.graphs.last
    if compiled is None:
        return {}
    integers = integer_layers(compiled)
    names = [layer.name for layer in network.artifact.manifest.layers]
    return {name: "int8" if name in integers else "float" for name in names}


class OpenVINONetwork(Fixed, ModelMixin):
    """A network that runs compiled graphs and takes the original's place in a pipeline.

    It has the original's forward signature, `config`, `dtype` and `device`, and the attributes that some pipelines read:
    SDXL's `add_embedding.linear_1.in_features` and transformers' `cache_context`. Moving it to another dtype changes its
    attribute `dtype` alone. Methods that would change the compiled graph raise `UsageError` (`Fixed`).

    `steps` warns of timesteps that were not calibrated, and records them.
    """

    def __init__(self, artifact: Artifact, precision: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        import diffusers
        from diffusers.configuration_utils import FrozenDict

        model = artifact.manifest.network
        self.artifact, self.precision = artifact, precision
        self._dtype = torch.float32
        self.family = family_of(model.class_name, artifact.given, model.config)
        self.config = FrozenDict(model.config)
        if self.config.get("addition_embed_type") == "text_time":
            width = self.config["projection_class_embeddings_input_dim"]
            self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=width))
        cls = getattr(diffusers, self.family.class_name)
        self._function = inspect.unwrap(cls.forward)
        self._signature = inspect.signature(self._function)
        self.graphs = CompiledGraphs(artifact, self.family, precision)
        self._lock = CallLock()
        timesteps = self.graphs.timesteps()
        self.steps = StepIndex(timesteps, is_static(artifact.manifest, len(timesteps)))

    def __reduce_ex__(self, _protocol: object) -> tuple[Any, ...]:
        """Copy without the compiled graphs; the copy compiles its own, or finds them in the cache."""
        made = ("_function", "_signature", "graphs", "_lock", "_output_class", "steps")
        state = {name: value for name, value in self.__dict__.items() if name not in made}
        return OpenVINONetwork, (self.artifact, self.precision), state

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run `forward` with its hooks; calls of other threads wait."""
        with self._lock:
            return super().__call__(*args, **kwargs)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that was asked for last. Outputs have that of the input."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """OpenVINO's CPU plugin."""
        return torch.device("cpu")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OpenVINONetwork:
        probe = fn(torch.empty(0, dtype=self._dtype))
        if probe.device.type not in ("cpu", "meta"):
            raise UsageError(
                f"The openvino runtime computes on the CPU, and its network can't move to {probe.device}",
                where="openvino runtime",
                fix='Leave it where it is, or load it with runtime="simulate"',
            )
        self._dtype = probe.dtype
        return self

    def to(self, *args: Any, **kwargs: Any) -> OpenVINONetwork:  # type: ignore[override]
        """Note the dtype, without diffusers' warning about modules that stay float32: nothing is cast."""
        return nn.Module.to(self, *args, **kwargs)

    def cache_context(self, _name: str) -> AbstractContextManager[None]:
        """Return a context that does nothing: no part of a step is cached for the next one."""
        return nullcontext()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run one step; arguments and output are those of the original network.

        Raises:
            UsageError: an argument that is not part of the compiled graph.
        """
        bound = self._signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        given = {k: v for k, v in list(bound.arguments.items())[1:] if v is not None}
        as_dict = given.pop("return_dict", True)
        for name in ATTENTION_ARGUMENTS & given.keys():  # `scale` is that of LoRA, which a graph has none of
            given[name] = {key: value for key, value in given[name].items() if key != "scale"}
        given = {k: v for k, v in given.items() if v is not self._signature.parameters[k].default}
        structure = self.config.get(ARGUMENTS, {})  # an example of these arguments was given: a graph has their values
        _only_tensors({k: v for k, v in given.items() if k not in (self.family.timestep, *structure)})
        given[self.family.timestep] = self._timestep(given[self.family.timestep])
        leaves = flat_leaves(given)
        tensors = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor)}
        constants = {name: leaf for name, leaf in leaves.items() if name not in tensors}
        dtype = next(t.dtype for name, t in tensors.items() if name.split(".")[0] == self.family.sample)
        outputs = [
            torch.from_numpy(array).to(dtype) for array in self.graphs.run(tensors, constants, is_correcting(self))
        ]
        if as_dict and self._output_class is not None:
            return self._output_class(*outputs)
        return tuple(outputs)

    def _timestep(self, given: Tensor | float | int) -> Tensor:
        """Return the graph's input `timestep` `[1]`, or `[N]` for mixed steps. The graph takes the row nearest to it."""
        self.steps.set(given)
        timestep, rows = torch.as_tensor(given).detach().cpu().reshape(-1), self.steps.rows.cpu()
        exact = timestep.to(torch.float32)
        exact = exact[:1] if len(rows) == 1 and bool((exact == exact[0]).all()) else exact
        table = self.steps.timesteps.to(torch.float32)
        # A half type may round a timestep past the middle between two rows.
        return torch.where(nearest_rows(exact, table) == rows, exact, table[rows])

    @cached_property
    def _output_class(self) -> Any:
        """The dataclass that the original's forward returns."""
        from diffusers.utils import BaseOutput

        named = (self._function.__globals__.get(name) for name in self._function.__code__.co_names)
        return next((found for found in named if inspect.isclass(found) and issubclass(found, BaseOutput)), None)


def _only_tensors(arguments: Mapping[str, Any]) -> None:
    """Raises `UsageError` for what a graph has no input for: anything but tensors, and dicts and sequences of them."""
    for name, value in arguments.items():
        if isinstance(value, list | tuple):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            _only_tensors({f"{name}.{key}": each for key, each in value.items() if each is not None})
        elif not isinstance(value, Tensor):
            raise UsageError(
                f"The argument '{name}' is {value!r:.60}, and the compiled graph takes tensors alone",
                where="openvino runtime",
                fix='Leave it out, or load the network with runtime="cpu" or "simulate"',
            )
