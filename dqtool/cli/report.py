"""`dqtool report`: a page of eval results."""

from __future__ import annotations

from typing import Annotated

import typer

from dqtool.cli.app import command
from dqtool.cli.output import on_standard_error, print_report, print_result
from dqtool.stages.options.declared import INPUT
from dqtool.stages.shared.settings import RunSettings


@command("dqtool report results", "dqtool report results/w4a4 results/w8a8/eval.json -o report.md", name="report")
def report_page(
    settings: RunSettings,
    places: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[DIR]...",
            help="Directories with eval results, or their JSON files. Default: eval.json.",
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Page to write. Default: report.html, or report.md.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            metavar="html|md",
            help="Format of the page. Default: the one of the file's name, else html.",
            rich_help_panel=INPUT,
        ),
    ] = None,
) -> None:
    """Write eval results as one page.

    The page has tables, quality against cost, errors by layer and step, activations and samples. Artifacts in the same
    directories add to it.
    """
    from dqtool.stages.report_page import ReportOptions, plan_report, render_plan, write_report

    options = ReportOptions(tuple(places or ()), output, format)
    if settings.dry_run:
        plan = plan_report(options, settings)
        print_report(plan, render_plan(plan), settings)
        return
    with on_standard_error():
        path = write_report(options, settings)
    print_result(path, settings)
