"""Options of `dqtool run`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from dqtool.stages.options.declared import INPUT, Option

__all__ = ["RunOptions"]


@dataclass(frozen=True)
class RunOptions:
    """Options of `dqtool run`. `output` None is `results/NAME`, after the recipe."""

    recipe: Annotated[
        str,
        Option("Recipe to run: a YAML file with a model and, stage by stage, options.", "RECIPE.yaml", positional=True),
    ]
    overrides: Annotated[
        tuple[str, ...],
        Option(
            "Option of a stage to set in place of the recipe's, such as distill.iters=0. May be repeated.",
            "STAGE.OPTION=VALUE",
            flag="--set",
            panel=INPUT,
        ),
    ] = ()
    output: Annotated[
        str | None,
        Option("Directory to write to. Default: results/NAME, after the recipe.", "DIR", short="-o", panel=INPUT),
    ] = None
