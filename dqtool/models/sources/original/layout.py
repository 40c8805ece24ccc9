"""What a layout of original checkpoints is, and the layouts that are known."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LAYOUTS", "Description", "Known", "Layout", "register"]

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Description:
    """The network in diffusers' terms: its config (with `_class_name`) and the noise schedule it was trained with.

    A schedule without `prediction_type` in a layout whose models differ in it is incomplete: `asks` then says what is
    not known. `explicit`: the file or its YAML names the schedule, which then goes before a pipeline's.
    """

    config: dict[str, Any]
    scheduler: dict[str, Any] = field(default_factory=dict)
    asks: str | None = None
    explicit: bool = False


@dataclass(frozen=True)
class Known:
    """What is known of a checkpoint beside its shapes: the authors' YAML config `published`, or the network's diffusers config,
    and what the user says that the network predicts, which wins."""

    published: Mapping[str, Any] | None = None
    config: Mapping[str, Any] | None = None
    prediction_type: str | None = None


class Layout(ABC):
    """Names and shapes under which some authors publish their checkpoints. Uses no tensor until `convert`."""

    name: ClassVar[str]
    title: ClassVar[str]

    @abstractmethod
    def matches(self, shapes: Shapes) -> bool:
        """Whether a checkpoint with these tensors is of this layout."""

    def network(self, names: Iterable[str]) -> set[str]:
        """Those of a file's tensors that belong to the network, not to a decoder or an encoder beside it."""
        return set(names)

    @abstractmethod
    def describe(self, shapes: Shapes, known: Known, where: str) -> Description:
        """Return config and schedule, from shapes and, where they don't tell, from what is known beside them.

        Raises:
            ArtifactError: shapes alone don't tell, or the network is one that diffusers has no equal of.
        """

    @abstractmethod
    def convert(self, state: Mapping[str, Tensor], config: Mapping[str, Any], where: str) -> dict[str, Tensor]:
        """The tensors of the network under diffusers' names; views of those given wherever that is possible.

        Raises:
            ArtifactError: a tensor is missing or not what the layout promises.
        """


LAYOUTS: dict[str, Layout] = {}
"""Layouts by name."""


def register(cls: type[Layout]) -> type[Layout]:
    """Class decorator: make a layout known."""
    LAYOUTS[cls.name] = cls()
    return cls
