"""`dqtool run`: the stages of a recipe."""

from __future__ import annotations

from typing import Annotated

import typer

from dqtool.cli.app import command
from dqtool.cli.output import on_standard_error, print_report, print_result
from dqtool.stages.options.declared import INPUT
from dqtool.stages.shared.settings import RunSettings


@command(
    "dqtool run recipes/digits-ddpm-w4a4.yaml",
    "dqtool run recipes/digits-ddpm-w4a4.yaml --set distill.iters=0 --set distill.output=ptq.safetensors",
)
def run(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE.yaml", help="Recipe to run: a YAML file with a model and, stage by stage, options."
        ),
    ],
    settings: RunSettings,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="STAGE.OPTION=VALUE",
            help="Option to set or override in the recipe. May be repeated.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Directory to write to. Default: results/NAME, after the recipe.",
            rich_help_panel=INPUT,
        ),
    ] = None,
) -> None:
    """Run the stages that a recipe describes.

    Each stage works on the output of the one before. Stages whose output is up to date are not run again.
    """
    from dqtool.stages.planning.plan import plan_recipe, render
    from dqtool.stages.run import run as run_recipe

    if settings.dry_run:
        plan = plan_recipe(recipe, overrides or [], settings, output)
        print_report(plan, render(plan), settings)
        return
    with on_standard_error():
        path = run_recipe(recipe, overrides or [], settings, output)
    print_result(path, settings)
