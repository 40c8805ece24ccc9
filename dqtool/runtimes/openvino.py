"""int8 through OpenVINO on CPUs, the step tables in the graph (`dqtool.formats.openvino`).

Each combination of input shapes is compiled once, when it first comes: static shapes run fastest. What was compiled, and
the graph itself, are kept in `$DQTOOL_CACHE` (default `~/.cache/dqtool`), so that a later process neither builds the
PyTorch network nor compiles. A change of step changes an input of the graph and nothing else.
"""

from __future__ import annotations

import hashlib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from dqtool import report
from dqtool.artifacts import Artifact, cache_directory, dqtool_version, keep_in_cache
from dqtool.artifacts.names import path_within
from dqtool.artifacts.reading import TEXT_BYTES, open_regular
from dqtool.errors import ArtifactError, EnvironmentFault, UsageError
from dqtool.formats import require
from dqtool.formats.openvino import (
    EXTRA,
    IR,
    TIMESTEPS,
    build_ir,
    compile_settings,
    integer_layers,
    saturates,
    save_ir,
    shrink_weights,
)
from dqtool.models.components.export_layout import component_prefix
from dqtool.models.families import family_of
from dqtool.models.families.examples import ARGUMENTS
from dqtool.models.networks.packed import exported_tensors, is_static, packed_network, plans_of
from dqtool.models.networks.packed_checks import step_count
from dqtool.nn.call_lock import CallLock
from dqtool.nn.prediction import is_correcting, set_correcting
from dqtool.nn.steps import StepIndex, nearest_rows
from dqtool.nn.traceable import flat_leaves, nested_arguments
from dqtool.runtimes.openvino_fixed import Fixed
from dqtool.runtimes.openvino_limits import check_graph

__all__ = ["OpenVINONetwork", "available", "integer_report", "load"]

CODE_VERSION = 6
"""Part of the cache's key: raise it when the graph changes."""

ATTENTION_ARGUMENTS = {"cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs"}
"""Arguments through which pipelines pass a dict to attention processors."""

KEPT = 2
"""Compiled graphs kept in memory, one per combination of input shapes; each holds its own weights."""


def available() -> str | None:
    """Return the reason why this runtime can't run here, or None."""
    try:
        require("openvino", EXTRA)
    except EnvironmentFault as e:
        return str(e)
    return None


def load(artifact: Artifact, precision: str = "f32") -> nn.Module:
    """The network of an exported directory, of format `dq` or `openvino`.

    `precision` ("f32" or "bf16") is that of everything but the integer products; less than f32 flips codes.

    Raises:
        EnvironmentFault: OpenVINO is not installed.
    """
    require("openvino", EXTRA)
    return OpenVINONetwork(artifact, precision).eval()


def integer_report(network: nn.Module) -> dict[str, str]:
    """Return "int8" or "float" for each quantized layer and attention, from the graph that was used last; empty before the
    first step."""
    assert isinstance(network, OpenVINONetwork)
    if not network._requests:
        return {}
    compiled = next(reversed(network._requests.values()))[0].get_compiled_model()
    integers = integer_layers(compiled)
    names = [layer.name for layer in network.artifact.manifest.layers]
    return {name: "int8" if name in integers else "float" for name in names}


class OpenVINONetwork(Fixed, ModelMixin):
    """A network that pipelines take as their own: it has the original's forward signature, `config`, `dtype` and `device`, and
    what pipelines read besides, `add_embedding.linear_1.in_features` of SDXL's and `cache_context` of transformers.

    Moving it to another dtype changes what its `dtype` says. What would change the compiled graph is refused (`Fixed`).

    `steps` warns of timesteps that the tables are not for, and remembers them.
    """

    def __init__(self, artifact: Artifact, precision: str) -> None:
        super().__init__()
        import diffusers
        import openvino
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
        self._core = openvino.Core()
        self._cache = cache_folder(artifact, self._core)
        self._requests: OrderedDict[tuple, Any] = OrderedDict()
        self._lock = CallLock()
        timesteps = self._timesteps()
        self.steps = StepIndex(timesteps, is_static(artifact.manifest, len(timesteps)))

    def __reduce_ex__(self, _protocol: object) -> tuple[Any, ...]:
        """A copy compiles its own graphs, or finds them in the cache."""
        made = ("_function", "_signature", "_core", "_requests", "_lock", "_mapped", "_output_class", "steps")
        state = {name: value for name, value in self.__dict__.items() if name not in made}
        return OpenVINONetwork, (self.artifact, self.precision), state

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`forward` with its hooks; calls of other threads wait."""
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

    def cache_context(self, _name: str) -> AbstractContextManager[None]:
        """Nothing is cached from step to step."""
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
        outputs = [torch.from_numpy(array).to(dtype) for array in self._run(tensors, constants)]
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

    def _run(self, tensors: Mapping[str, Tensor], constants: Mapping[str, Any]) -> list[np.ndarray]:
        feed = {name: _array(tensor) for name, tensor in tensors.items()}
        known = repr(sorted(constants.items()))
        key = (is_correcting(self), known, *((name, array.shape) for name, array in feed.items()))
        if key not in self._requests:
            while len(self._requests) >= KEPT:
                self._requests.popitem(last=False)
            self._requests[key] = self._compile(tensors, constants, feed)
        self._requests.move_to_end(key)
        request, names = self._requests[key]
        results = request.infer({name: feed[name] for name in names}, share_inputs=True)
        return [results[port].copy() for port in results]

    def _compile(
        self, tensors: Mapping[str, Tensor], constants: Mapping[str, Any], feed: Mapping[str, np.ndarray]
    ) -> tuple[Any, list[str]]:
        """A request of the graph at these shapes: compiled before and kept, or compiled now."""
        settings = compile_settings(self.precision, torch.get_num_threads())
        shapes = {name: list(array.shape) for name, array in feed.items()}
        identity = hashlib.sha256(repr((sorted(shapes.items()), sorted(settings.items()))).encode()).hexdigest()[:24]
        inputs = repr(sorted(shapes)) + (repr(sorted(constants.items())) if constants else "")
        graph = hashlib.sha256(inputs.encode()).hexdigest()[:8]  # a graph has its inputs
        folder = self._cache / (graph if is_correcting(self) else f"{graph}-uncorrected")
        blob = folder / f"{identity}.blob"
        compiled = self._import(blob, settings)
        if compiled is None:
            report.say(f"openvino: compiling for {', '.join(f'{k} {v}' for k, v in shapes.items())}")
            compiled = self._core.compile_model(self._graph(tensors, constants, shapes, folder), "CPU", settings)
            keep(blob, lambda path: path.write_bytes(compiled.export_model().getbuffer()))
        return compiled.create_infer_request(), [input_name(port, feed) for port in compiled.inputs]

    def _import(self, blob: Path, settings: Mapping[str, Any]) -> Any:
        import openvino

        if not blob.exists():
            return None
        try:
            data = np.memmap(blob, dtype=np.uint8, mode="r")
            # The engine reads weights out of the mapped file while it runs.
            self.__dict__.setdefault("_mapped", []).append(data)
            return self._core.import_model(openvino.Tensor(data, list(data.shape), openvino.Type.u8), "CPU", settings)
        except (RuntimeError, OSError, ValueError):
            report.warn(f"the compiled graph {blob} can't be used and is made again")
            return None

    def _graph(
        self, tensors: Mapping[str, Tensor], constants: Mapping[str, Any], shapes: Mapping[str, list[int]], folder: Path
    ) -> Any:
        """The graph at these shapes; without them it is kept in `folder`."""
        traced = nested_arguments({**constants, **tensors})
        if self.artifact.manifest.parameters.format == "openvino":
            self._check_constants(constants)
            model = self._exported_graph()
        else:
            path = folder / IR
            if not path.exists():
                keep(folder, lambda partial: self._write_ir(partial, traced), directory=True)
            model = self._core.read_model(path) if path.exists() else self._build(traced)
        known = {input_name(port, shapes): port for port in model.inputs}
        unknown = sorted(set(shapes) - set(known))
        if unknown:
            raise UsageError(
                f"This graph has no input '{unknown[0]}'",
                where="openvino runtime",
                fix=f"Its inputs are {', '.join(known)}; leave the argument out, or use another runtime",
            )
        try:
            self._check_size(known, shapes)
            model.reshape({port: shapes[name] for name, port in known.items()})
        except RuntimeError as e:
            if self.artifact.manifest.parameters.format == "openvino":
                raise UsageError(
                    f"The exported graph can't take inputs of the shapes {shapes}",
                    where=self.artifact.given,
                    fix="Use an export of format dq, from which a graph is made for any shape the network takes",
                ) from e
            model = self._build(traced)  # the network has constants that depend on the shape: trace it again
            model.reshape({port: shapes[input_name(port, shapes)] for port in model.inputs})
        return model

    def _check_size(self, inputs: Mapping[str, Any], shapes: Mapping[str, list[int]]) -> None:
        """Raises `RuntimeError` where the graph was traced at another height and width, which it can't do without."""
        port = inputs[self.family.sample]
        if self.family.traced_size:
            for known, wanted in zip(port.get_partial_shape(), shapes[self.family.sample], strict=True):
                if known.is_static and known.get_length() != wanted:
                    raise RuntimeError(f"traced at {port.get_partial_shape()}")

    def _check_constants(self, constants: Mapping[str, Any]) -> None:
        """Raise `UsageError` where an exported graph was made with other values of what is no tensor."""
        example = flat_leaves(self.family.example(self.config))
        own = {name: leaf for name, leaf in example.items() if not isinstance(leaf, Tensor)}
        other = sorted(name for name in own.keys() | constants.keys() if own.get(name) != constants.get(name))
        if other:
            raise UsageError(
                f"The exported graph was made with {other[0]} = {own.get(other[0])}, and not {constants.get(other[0])}",
                where=self.artifact.given,
                fix="Use an export of format dq, from which a graph is made for any value",
            )

    def _build(self, arguments: Mapping[str, Any]) -> Any:
        manifest = self.artifact.manifest
        state = exported_tensors(self.artifact)
        network = packed_network(manifest.network.class_name, manifest.network.config, plans_of(manifest), state)
        set_correcting(network, is_correcting(self))
        try:
            return build_ir(network, self.family, arguments, saturates())
        except RuntimeError as e:
            raise UsageError(
                f"The network can't be traced with the arguments {', '.join(arguments)}: {str(e).strip().splitlines()[-1]:.200}",
                where="openvino runtime",
                fix="Leave out what the network was not made for, or use another runtime",
            ) from e

    def _write_ir(self, folder: Path, arguments: Mapping[str, Any]) -> None:
        folder.mkdir()
        model = self._build(arguments)
        shrink_weights(model)
        save_ir(model, folder / IR)

    def _exported_ir(self) -> Path:
        prefix = component_prefix(self.artifact.manifest.pipeline)
        return path_within(self.artifact.path, f"{prefix}{IR}", self.artifact.given)

    def _exported_graph(self) -> Any:
        """Return the graph of an export in the format `openvino`, whose files must be ordinary ones."""
        path = self._exported_ir()
        with open_regular(path, TEXT_BYTES), open_regular(path.with_suffix(".bin")):
            pass
        try:
            graph = self._core.read_model(path)
        except RuntimeError as error:
            text = " ".join(str(error).split())[:200]
            raise ArtifactError(f"OpenVINO can't read this graph: {text}", where=str(path)) from error
        check_graph(graph, path.with_suffix(".bin").stat().st_size, str(path))
        return graph

    def _timesteps(self) -> Tensor:
        manifest = self.artifact.manifest
        if manifest.parameters.format == "dq":
            return exported_tensors(self.artifact)["timesteps"]
        graph = self._exported_graph()
        try:
            text = str(graph.get_rt_info(TIMESTEPS).astype(str))
            table = torch.tensor([float(t) for t in text.split()])
        except (RuntimeError, ValueError, TypeError) as error:
            raise ArtifactError("The graph holds no table of timesteps", where=str(self._exported_ir())) from error
        step_count({"timesteps": table})
        return table

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


def input_name(port: Any, names: Collection[str]) -> str:
    """Return the one of `names` that a graph's input has. OpenVINO gives an input more names when it removes operations behind it.

    Raises:
        UsageError: the input has none of them: an argument that the graph needs was not given.
    """
    found = sorted(set(names) & set(port.names))
    if not found:
        raise UsageError(
            f"The network needs the argument '{port.get_node().get_friendly_name()}'", where="openvino runtime"
        )
    return found[0]


def cache_folder(artifact: Artifact, core: Any) -> Path:
    """Return the cache folder of this artifact's graphs, for these versions and this kind of CPU."""
    import diffusers
    import openvino

    identity = (
        artifact.sha256,
        dqtool_version(),
        CODE_VERSION,
        openvino.__version__,
        torch.__version__,
        diffusers.__version__,
        saturates(),
        core.get_property("CPU", "FULL_DEVICE_NAME"),
        core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"),
    )
    return cache_directory("openvino") / hashlib.sha256(repr(identity).encode()).hexdigest()[:32]


def keep(path: Path, write: Callable[[Path], object], *, directory: bool = False) -> None:
    """Keep a file or directory in the cache; warn if that is impossible."""
    reason = keep_in_cache(path, write, directory=directory)
    if reason is not None:
        report.warn(f"the compiled graph can't be kept in {path.parent}: {reason}")


def _array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).contiguous().numpy()
