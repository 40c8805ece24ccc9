"""`dqtool zoo`: the embedded models."""

from __future__ import annotations

from typing import Annotated

import typer

from dqtool.cli.app import app, command
from dqtool.cli.output import on_standard_error, print_report, print_result
from dqtool.stages.options.declared import INPUT
from dqtool.stages.shared.settings import RunSettings

zoo_app = typer.Typer(
    help="List and write the embedded models.", rich_markup_mode=None, epilog="Example: dqtool zoo list"
)
app.add_typer(zoo_app, name="zoo")


@command("dqtool zoo list", group=zoo_app, name="list")
def zoo_list(settings: RunSettings) -> None:
    """List the embedded models and their sizes."""
    from dqtool.stages.zoo import list_models, render

    models = list_models()
    print_report({"models": models}, render(models), settings)


@command("dqtool zoo get digits-ddpm -o model", group=zoo_app, name="get")
def zoo_get(
    name: Annotated[str, typer.Argument(help="Name from `dqtool zoo list`.")],
    settings: RunSettings,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Directory to write. Default: the model's name.",
            rich_help_panel=INPUT,
        ),
    ] = None,
) -> None:
    """Write an embedded model as a diffusers pipeline directory.

    Its weights are written as float32.
    """
    from dqtool.stages.zoo import ZooGetOptions, get_model, plan_get

    options = ZooGetOptions(name, output or name.removeprefix("zoo:"))
    if settings.dry_run:
        plan = plan_get(options)
        print_report(plan, [f"{key:<10}{value}" for key, value in plan.items()], settings)
        return
    with on_standard_error():
        path = get_model(options, settings)
    print_result(path, settings)
