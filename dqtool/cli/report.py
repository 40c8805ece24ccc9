"""`dqtool report`: a page of eval results."""

from __future__ import annotations

from dqtool.cli.app import command
from dqtool.cli.output import on_standard_error, print_report, print_result
from dqtool.stages.options.report import ReportOptions
from dqtool.stages.shared.settings import RunSettings


@command(
    ReportOptions,
    "dqtool report results",
    "dqtool report results/w4a4 results/w8a8/eval.json -o report.md",
    name="report",
)
def report_page(options: ReportOptions, settings: RunSettings) -> None:
    """Write eval results as one page.

    The page has tables, quality against cost, errors by layer and step, activations and samples. Artifacts in the same
    directories add to it.
    """
    from dqtool.stages.report_page import plan_report, render_plan, write_report

    if settings.dry_run:
        plan = plan_report(options, settings)
        print_report(plan, render_plan(plan), settings)
        return
    with on_standard_error():
        path = write_report(options, settings)
    print_result(path, settings)
