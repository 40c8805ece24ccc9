"""`dqtool zoo`: the embedded models."""

from __future__ import annotations

import typer

from dqtool.cli.app import app, command
from dqtool.cli.output import on_standard_error, print_report, print_result
from dqtool.stages.options.zoo import ZooGetOptions, ZooListOptions
from dqtool.stages.shared.settings import RunSettings

zoo_app = typer.Typer(
    help="List and write the embedded models.", rich_markup_mode=None, epilog="Example: dqtool zoo list"
)
app.add_typer(zoo_app, name="zoo")


@command(ZooListOptions, "dqtool zoo list", group=zoo_app, name="list")
def zoo_list(options: ZooListOptions, settings: RunSettings) -> None:
    """List the embedded models and their sizes."""
    from dqtool.stages.zoo import list_models, render

    models = list_models()
    print_report({"models": models}, render(models), settings)


@command(ZooGetOptions, "dqtool zoo get digits-ddpm -o model", group=zoo_app, name="get")
def zoo_get(options: ZooGetOptions, settings: RunSettings) -> None:
    """Write an embedded model as a diffusers pipeline directory.

    Its weights are written as float32.
    """
    from dqtool.stages.zoo import get_model, plan_get

    if settings.dry_run:
        plan = plan_get(options)
        print_report(plan, [f"{key:<10}{value}" for key, value in plan.items()], settings)
        return
    with on_standard_error():
        path = get_model(options, settings)
    print_result(path, settings)
