"""Options of `dqtool inspect`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from dqtool.stages.options.declared import Option

__all__ = ["InspectOptions"]


@dataclass(frozen=True)
class InspectOptions:
    """Options of `dqtool inspect`."""

    anything: Annotated[
        str, Option("Artifact, exported directory, model or zoo:NAME to describe.", "ANY", positional=True)
    ]
