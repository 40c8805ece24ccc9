"""`dqtool report`: a page of results."""

from __future__ import annotations

from typing import Annotated

import typer

from dqtool.cli.app import command
from dqtool.cli.output import on_standard_error, print_report, print_result
from dqtool.stages.common import Common


@command("dqtool report results", "dqtool report results/w4a4 results/w8a8/eval.json -o report.md", name="report")
def report_page(
    common: Common,
    places: Annotated[
        list[str] | None,
        typer.Argument(metavar="[DIR]...", help="Directories of eval results, or their JSONs; left out: eval.json."),
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="Left out: report.html or report.md.")
    ] = None,
    format: Annotated[
        str | None, typer.Option(metavar="html|md", help="Left out: by the file's name, else html.")
    ] = None,
) -> None:
    """Make one page of eval results.

    Tables, quality against cost, errors by layer and step, activations, samples. Artifacts found beside add to it.
    """
    from dqtool.stages.report_page import ReportOptions, plan_report, render_plan, write_report

    options = ReportOptions(tuple(places or ()), output, format)
    if common.dry_run:
        plan = plan_report(options, common)
        print_report(plan, render_plan(plan), common)
        return
    with on_standard_error():
        path = write_report(options, common)
    print_result(path, common)
