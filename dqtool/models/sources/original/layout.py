"""The interface of layouts of original checkpoints, and the table of all layouts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from dqtool.artifacts.jsonvalues import ForeignConfig

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LAYOUTS", "Description", "Known", "Layout", "register"]

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Description:
    """The network in diffusers' terms: its config (with `_class_name`) and the noise schedule it was trained with.

    A schedule without `prediction_type` in a layout whose models differ in it is incomplete: `unknown_schedule` then says what is
    not known. `explicit`: the file or its YAML names the schedule, which then goes before a pipeline's.
    """

    config: ForeignConfig
    scheduler: ForeignConfig = field(default_factory=dict)
    unknown_schedule: str | None = None
    explicit: bool = False


@dataclass(frozen=True)
class Known:
    """Information on a checkpoint besides its shapes.

    It is the authors' YAML config `published`, or the network's diffusers config, and the user's prediction type, which
    takes precedence.
    """

    published: ForeignConfig | None = None
    config: ForeignConfig | None = None
    prediction_type: str | None = None


class Layout(ABC):
    """Layout of some authors' checkpoints: names and shapes of their tensors. Only `convert` reads tensors."""

    name: ClassVar[str]
    title: ClassVar[str]

    @abstractmethod
    def matches(self, shapes: Shapes) -> bool:
        """Return whether a checkpoint with these tensors has this layout."""

    def network(self, names: Iterable[str]) -> set[str]:
        """Return the names of the network's tensors among all names of a file."""
        return set(names)

    @abstractmethod
    def describe(self, shapes: Shapes, known: Known, where: str) -> Description:
        """Return config and schedule, from the shapes and from `known` for what shapes don't determine.

        Raises:
            ArtifactError: the information is not enough, or diffusers has no equivalent network.
        """

    @abstractmethod
    def convert(self, state: Mapping[str, Tensor], config: ForeignConfig, where: str) -> dict[str, Tensor]:
        """Return the network's tensors under diffusers' names, as views of the given ones where possible.

        Raises:
            ArtifactError: a tensor is missing or has another shape than the layout requires.
        """


LAYOUTS: dict[str, Layout] = {}
"""Layouts by name."""


def register(cls: type[Layout]) -> type[Layout]:
    """Add a layout to `LAYOUTS`. A class decorator."""
    LAYOUTS[cls.name] = cls()
    return cls
