"""Graphs that OpenVINO compiled for one exported network: made from the artifact, compiled once and kept in a cache.

Each combination of input shapes is compiled once, when it first comes: static shapes run fastest. Compiled graphs and the
graph itself stay in `$DQTOOL_CACHE` (default `~/.cache/dqtool`), so that a later process neither builds the PyTorch network
nor compiles.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dqtool import report
from dqtool.artifacts import Artifact, cache_directory, dqtool_version, keep_in_cache
from dqtool.artifacts.names import path_within
from dqtool.artifacts.reading import TEXT_BYTES, open_regular
from dqtool.errors import ArtifactError, UsageError
from dqtool.formats.openvino import IR, TIMESTEPS, build_ir, compile_settings, saturates, save_ir, shrink_weights
from dqtool.models.components.export_layout import component_prefix
from dqtool.models.families import Family
from dqtool.models.networks.packed import exported_tensors, packed_network, plans_of
from dqtool.models.networks.packed_checks import step_count
from dqtool.nn.prediction import set_correcting
from dqtool.nn.traceable import flat_leaves, nested_arguments
from dqtool.runtimes.openvino_limits import check_graph

__all__ = ["CompiledGraphs"]

CODE_VERSION = 6
"""Part of the cache's key: raise it when the graph changes."""

KEPT = 2
"""Compiled graphs kept in memory, one per combination of input shapes; each holds its own weights."""


class CompiledGraphs:
    """The compiled graphs of one artifact. `run` compiles the graph of its input shapes, or takes one compiled before.

    `precision` ("f32" or "bf16") is that of everything but the integer products.
    """

    def __init__(self, artifact: Artifact, family: Family, precision: str) -> None:
        import openvino

        self.artifact, self.family, self.precision = artifact, family, precision
        self._core = openvino.Core()
        self._requests: OrderedDict[tuple[object, ...], tuple[Any, list[str]]] = OrderedDict()
        self._mapped: list[np.memmap] = []
        """Files of compiled graphs: OpenVINO reads weights out of them while a graph runs."""

    @property
    def last(self) -> Any | None:
        """The compiled graph that ran last, or None."""
        return next(reversed(self._requests.values()))[0].get_compiled_model() if self._requests else None

    @cached_property
    def is_ir(self) -> bool:
        """True if the artifact holds an OpenVINO graph itself (format `openvino`), not packed weights."""
        return self.artifact.manifest.parameters.format == "openvino"

    @cached_property
    def _cache(self) -> Path:
        return _cache_folder(self.artifact, self._core)

    def timesteps(self) -> Tensor:
        """Return the table of timesteps `[T]` of the export.

        Raises:
            ArtifactError: the graph holds no such table.
        """
        if self.artifact.manifest.parameters.format == "dq":
            return exported_tensors(self.artifact)["timesteps"]
        graph = self._exported_graph()
        try:
            text = str(graph.get_rt_info(TIMESTEPS).astype(str))
            table = torch.tensor([float(t) for t in text.split()])
        except (RuntimeError, ValueError, TypeError) as error:
            raise ArtifactError("The graph holds no table of timesteps", where=str(self._exported_ir())) from error
        step_count({"timesteps": table})
        return table

    def run(self, tensors: Mapping[str, Tensor], constants: Mapping[str, Any], corrects: bool) -> list[np.ndarray]:
        """Return the outputs of one step.

        `tensors` are the graph's inputs by name, `constants` the arguments that a graph is traced with; `corrects` selects
        the graph that corrects predictions.

        Raises:
            UsageError: an argument that the graph has no input for, or one that it needs and lacks.
        """
        feed = {name: _array(tensor) for name, tensor in tensors.items()}
        key = (corrects, repr(sorted(constants.items())), *((name, array.shape) for name, array in feed.items()))
        if key not in self._requests:
            while len(self._requests) >= KEPT:
                self._requests.popitem(last=False)
            self._requests[key] = self._compile(tensors, constants, feed, corrects)
        self._requests.move_to_end(key)
        request, names = self._requests[key]
        results = request.infer({name: feed[name] for name in names}, share_inputs=True)
        return [results[port].copy() for port in results]

    def _compile(
        self,
        tensors: Mapping[str, Tensor],
        constants: Mapping[str, Any],
        feed: Mapping[str, np.ndarray],
        corrects: bool,
    ) -> tuple[Any, list[str]]:
        """Return a request of the graph at these shapes, and its inputs' names. Read it from the cache, or compile it."""
        settings = compile_settings(self.precision, torch.get_num_threads())
        shapes = {name: list(array.shape) for name, array in feed.items()}
        identity = hashlib.sha256(repr((sorted(shapes.items()), sorted(settings.items()))).encode()).hexdigest()[:24]
        inputs = repr(sorted(shapes)) + (repr(sorted(constants.items())) if constants else "")
        graph = hashlib.sha256(inputs.encode()).hexdigest()[:8]  # a graph has its inputs
        folder = self._cache / (graph if corrects else f"{graph}-uncorrected")
        blob = folder / f"{identity}.blob"
        compiled = self._import(blob, settings)
        if compiled is None:
            report.say(f"openvino: compiling for {', '.join(f'{k} {v}' for k, v in shapes.items())}")
            model = self._graph(tensors, constants, shapes, folder, corrects)
            compiled = with_or_without_snippets(lambda chosen: self._core.compile_model(model, "CPU", chosen), settings)
            _keep(blob, lambda path: path.write_bytes(compiled.export_model().getbuffer()))
        return compiled.create_infer_request(), [_input_name(port, feed) for port in compiled.inputs]

    def _import(self, blob: Path, settings: Mapping[str, Any]) -> Any | None:
        """Return the compiled graph in the cache's file `blob`; None if it is not there or can't be used."""
        import openvino

        if not blob.exists():
            return None
        try:
            data = np.memmap(blob, dtype=np.uint8, mode="r")
            self._mapped.append(data)
            tensor = openvino.Tensor(data, list(data.shape), openvino.Type.u8)
            return with_or_without_snippets(lambda chosen: self._core.import_model(tensor, "CPU", chosen), settings)
        except (RuntimeError, OSError, ValueError):
            report.warn(f"the compiled graph {blob} can't be used and is made again")
            return None

    def _graph(
        self,
        tensors: Mapping[str, Tensor],
        constants: Mapping[str, Any],
        shapes: Mapping[str, list[int]],
        folder: Path,
        corrects: bool,
    ) -> Any:
        """Return the graph at these shapes. Keep the graph of dynamic shapes in `folder`."""
        traced = nested_arguments({**constants, **tensors})
        if self.is_ir:
            self._check_constants(constants)
            model = self._exported_graph()
        else:
            path = folder / IR
            if not path.exists():
                _keep(folder, lambda partial: self._write_ir(partial, traced, corrects), directory=True)
            model = self._core.read_model(path) if path.exists() else self._build(traced, corrects)
        known = {_input_name(port, shapes): port for port in model.inputs}
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
            if self.is_ir:
                raise UsageError(
                    f"The exported graph can't take inputs of the shapes {shapes}",
                    where=self.artifact.given,
                    fix="Use an export of format dq, from which a graph is made for any shape the network takes",
                ) from e
            model = self._build(traced, corrects)  # the network has constants that depend on the shape: trace it again
            model.reshape({port: shapes[_input_name(port, shapes)] for port in model.inputs})
        return model

    def _check_size(self, inputs: Mapping[str, Any], shapes: Mapping[str, list[int]]) -> None:
        """Raise `RuntimeError` if the graph was traced at another height and width, and works at that size alone."""
        port = inputs[self.family.sample]
        if self.family.traced_size:
            for known, wanted in zip(port.get_partial_shape(), shapes[self.family.sample], strict=True):
                if known.is_static and known.get_length() != wanted:
                    raise RuntimeError(f"traced at {port.get_partial_shape()}")

    def _check_constants(self, constants: Mapping[str, Any]) -> None:
        """Raise `UsageError` if an exported graph was traced with other values of arguments that are no tensors."""
        example = flat_leaves(self.family.example(self.artifact.manifest.network.config))
        own = {name: leaf for name, leaf in example.items() if not isinstance(leaf, Tensor)}
        other = sorted(name for name in own.keys() | constants.keys() if own.get(name) != constants.get(name))
        if other:
            raise UsageError(
                f"The exported graph was made with {other[0]} = {own.get(other[0])}, and not {constants.get(other[0])}",
                where=self.artifact.given,
                fix="Use an export of format dq, from which a graph is made for any value",
            )

    def _build(self, arguments: Mapping[str, Any], corrects: bool) -> Any:
        """Return the graph of dynamic shapes, traced from the packed network with these arguments."""
        manifest = self.artifact.manifest
        state = exported_tensors(self.artifact)
        network = packed_network(manifest.network.class_name, manifest.network.config, plans_of(manifest), state)
        set_correcting(network, corrects)
        try:
            return build_ir(network, self.family, arguments, saturates())
        except RuntimeError as e:
            raise UsageError(
                f"The network can't be traced with the arguments {', '.join(arguments)}: {str(e).strip().splitlines()[-1]:.200}",
                where="openvino runtime",
                fix="Leave out what the network was not made for, or use another runtime",
            ) from e

    def _write_ir(self, folder: Path, arguments: Mapping[str, Any], corrects: bool) -> None:
        folder.mkdir()
        model = self._build(arguments, corrects)
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


def with_or_without_snippets(compiled: Callable[[Mapping[str, Any]], Any], settings: Mapping[str, Any]) -> Any:
    """Return `compiled(settings)`; where OpenVINO's code for fused operations runs out of registers, without such code."""
    try:
        return compiled(settings)
    except RuntimeError as error:
        if "snippet" not in str(error):
            raise
    return compiled({**settings, "SNIPPETS_MODE": "DISABLE"})


def _input_name(port: Any, names: Collection[str]) -> str:
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


def _cache_folder(artifact: Artifact, core: Any) -> Path:
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


def _keep(path: Path, write: Callable[[Path], object], *, directory: bool = False) -> None:
    """Keep a file or directory in the cache; warn if that is impossible."""
    reason = keep_in_cache(path, write, directory=directory)
    if reason is not None:
        report.warn(f"the compiled graph can't be kept in {path.parent}: {reason}")


def _array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).contiguous().numpy()
