"""A contender of a benchmark: the functions that write and load its files, and the loaded network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqtool.bench.subject import Arguments, Subject

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Contender", "Loaded"]


@dataclass(frozen=True)
class Loaded:
    """A network ready to run.

    Attributes:
        run: runs one step and returns the prediction.
        adapt: converts the arguments to the network's dtype and layout before the timing starts.
        note: a remark that the table adds to the contender's name.
    """

    run: Callable[[Arguments], Tensor]
    adapt: Callable[[Arguments], Arguments] = lambda arguments: arguments
    note: str = ""


@dataclass(frozen=True)
class Contender:
    """One way to run the network.

    Attributes:
        name: name in `--against`, or the name of a runtime.
        load: loads the network from its files.
        prepare: writes the files that `load` reads, if they are not the exported directory.
        libraries: packages to import before memory is measured.
        probed: load time and memory are measured. False for a memory format, which changes neither.
        alone: timed in a process of its own only, never in turns with others.
        measure: measures the contender where it is no network in this process: returns the fields of `alone.Alone`.
        file: path of what `load` reads, a file or a folder; None stands for the exported directory.
        require: checks that its package is installed, before anything is written.
    """

    name: str
    load: Callable[[Subject], Loaded]
    prepare: Callable[[Subject], object] | None = None
    libraries: tuple[str, ...] = ("torch", "diffusers")
    probed: bool = True
    alone: bool = False
    measure: Callable[[Subject, int, float], dict[str, Any]] | None = None
    file: Callable[[Subject], Path] | None = None
    require: Callable[[], object] | None = None
