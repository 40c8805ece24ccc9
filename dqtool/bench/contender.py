"""A contender of a benchmark: how its files are written and loaded, and what it looks like once it is ready to run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dqtool.bench.subject import Arguments, Subject

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Contender", "Loaded"]


@dataclass(frozen=True)
class Loaded:
    """A network ready to run: `adapt` converts arguments beforehand (dtype, layout: not timed), `run` is one step.

    `note` says what the table should add to the name.
    """

    run: Callable[[Arguments], Tensor]
    adapt: Callable[[Arguments], Arguments] = lambda arguments: arguments
    note: str = ""


@dataclass(frozen=True)
class Contender:
    """A way to run the network. `prepare` writes the files that `load` reads; `libraries` are imported before memory counts.

    `probed`: whether load time and memory are worth measuring (a memory format changes neither).
    """

    name: str
    load: Callable[[Subject], Loaded]
    prepare: Callable[[Subject], object] | None = None
    libraries: tuple[str, ...] = ("torch", "diffusers")
    probed: bool = True
