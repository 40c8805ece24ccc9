"""Formats of `dqtool export --format`, one file each with one interface: `prepare(distilled) -> Exported`.

`prepare` refuses a network that the format can't hold before anything long happens. `Exported.write` then writes the
network's files. The stage writes everything around them (config, pipeline, manifest), which is the same in all formats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from dqtool.artifacts.jsonvalues import ForeignConfig, Json
from dqtool.artifacts.records import LayerRecord
from dqtool.errors import EnvironmentFault

if TYPE_CHECKING:
    from dqtool.artifacts import Artifact

__all__ = ["FORMATS", "Exported", "prepare", "require"]

FORMATS = {
    "dq": "dqtool.formats.dq",
    "dense": "dqtool.formats.dense",
    "openvino": "dqtool.formats.openvino",
    "onnx": "dqtool.formats.onnx",
    "onnx-qdq": "dqtool.formats.onnx_qdq",
    "compressed-tensors": "dqtool.formats.compressed_tensors",
}
"""Modules that implement the formats, by their name on the command line. They are imported on use."""


@dataclass
class Exported:
    """A network in some format, not yet written.

    Attributes:
        config: content of the network's `config.json`.
        layers: layers as the manifest lists them.
        write: called as `write(directory)`, writes the weights (and graph) into the component's directory.
        predicted: size of the weights in bytes, if it is known beforehand.
        notes: entries to add to the manifest's metrics.
    """

    config: ForeignConfig
    layers: list[LayerRecord]
    write: Callable[[Path], object]
    predicted: int | None = None
    notes: dict[str, Json] = field(default_factory=dict)


def prepare(name: str, distilled: Artifact) -> Exported:
    """Prepare the network of a distilled artifact in the format `name`.

    Raises:
        ArtifactError: the format can't hold this network.
        EnvironmentFault: the format needs an extra that is not installed.
    """
    result: Exported = import_module(FORMATS[name]).prepare(distilled)
    return result


def require(package: str, extra: str) -> None:
    """Raise `EnvironmentFault` unless `package`, which `extra` brings, can be imported."""
    try:
        import_module(package)
    except ImportError as e:
        raise EnvironmentFault(
            f"This needs the package {package}, which can't be imported: {e}", fix=f'pip install "dqtool[{extra}]"'
        ) from e
