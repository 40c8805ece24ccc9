"""What `dqtool export --format` writes. One file each, one interface: `prepare(distilled) -> Exported`.

`prepare` refuses what the format can not hold before anything long happens; `Exported.write` then writes the network's
files. Everything around them (config, pipeline, manifest) is the same for all formats and the stage's work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqtool.errors import EnvironmentFault

if TYPE_CHECKING:
    from dqtool.artifacts import Artifact

__all__ = ["FORMATS", "Exported", "prepare", "require"]

FORMATS = {
    "dq": "dqtool.formats.dq",
    "dense": "dqtool.formats.dense",
    "openvino": "dqtool.formats.openvino",
    "onnx": "dqtool.formats.onnx",
    "compressed-tensors": "dqtool.formats.compressed_tensors",
}
"""Name on the command line, and the module that implements it (imported on use)."""


@dataclass
class Exported:
    """A network in some format, not yet written.

    `config` is the content of its `config.json`, `layers` what the manifest lists, `write(directory)` puts the weights
    (and graph) into the component's directory, `predicted` is their size in bytes where it is known beforehand, `notes`
    go to the manifest's metrics.
    """

    config: dict[str, Any]
    layers: list[dict[str, Any]]
    write: Callable[[Path], object]
    predicted: int | None = None
    notes: dict[str, Any] = field(default_factory=dict)


def prepare(name: str, distilled: Artifact) -> Exported:
    """The network of a distilled artifact in the format `name`.

    Raises:
        ArtifactError: the format can not hold this network.
        EnvironmentFault: the format needs an extra that is not installed.
    """
    return import_module(FORMATS[name]).prepare(distilled)


def require(package: str, extra: str) -> None:
    """Raise `EnvironmentFault` unless `package`, which the extra brings, can be imported."""
    try:
        import_module(package)
    except ImportError as e:
        raise EnvironmentFault(
            f"This needs the package {package}, which can't be imported: {e}", fix=f'pip install "dqtool[{extra}]"'
        ) from e
