"""Options of `dqtool zoo list` and `dqtool zoo get`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from dqtool.stages.options.declared import INPUT, Option

__all__ = ["ZooGetOptions", "ZooListOptions"]


@dataclass(frozen=True)
class ZooListOptions:
    """Options of `dqtool zoo list`: only those that every command takes."""


@dataclass(frozen=True)
class ZooGetOptions:
    """Options of `dqtool zoo get`. `name` may have `zoo:` in front."""

    name: Annotated[str, Option("Name from `dqtool zoo list`.", positional=True)]
    output: Annotated[
        str | None, Option("Directory to write. Default: the model's name.", "DIR", short="-o", panel=INPUT)
    ] = None

    @property
    def path(self) -> str:
        """Directory to write."""
        return self.output or self.name.removeprefix("zoo:")
