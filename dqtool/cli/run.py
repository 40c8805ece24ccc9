"""`dqtool run`: the stages of a recipe."""

from __future__ import annotations

from dqtool.cli.app import command
from dqtool.cli.output import on_standard_error, print_report, print_result
from dqtool.stages.options.run import RunOptions
from dqtool.stages.shared.settings import RunSettings


@command(
    RunOptions,
    "dqtool run recipes/digits-ddpm-w4a4.yaml",
    "dqtool run recipes/digits-ddpm-w4a4.yaml --set distill.iters=0 --set distill.output=ptq.safetensors",
)
def run(options: RunOptions, settings: RunSettings) -> None:
    """Run the stages that a recipe describes.

    Each stage works on the output of the one before. Stages whose output is up to date are not run again.
    """
    from dqtool.stages.planning.plan import plan_recipe, render
    from dqtool.stages.run import run as run_recipe

    if settings.dry_run:
        plan = plan_recipe(options.recipe, options.overrides, settings, options.output)
        print_report(plan, render(plan), settings)
        return
    with on_standard_error():
        path = run_recipe(options.recipe, options.overrides, settings, options.output)
    print_result(path, settings)
