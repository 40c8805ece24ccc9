"""Run a stage for a command and print its result: the result to standard output, the rest to standard error."""

from __future__ import annotations

import contextlib
import json as json_format
import sys
from collections.abc import Sequence
from typing import Any

from dqtool.errors import shown
from dqtool.stages.shared.settings import RunSettings

__all__ = ["on_standard_error", "print_report", "print_result", "run_stage"]


def run_stage(name: str, options: Any, settings: RunSettings) -> None:
    """Run a stage and print its result; in a dry run, print the plan."""
    from dqtool.stages.registry import plan_function, stage_function

    planner = plan_function(name)
    if settings.dry_run and planner is not None:
        from dqtool.stages.planning.plan import render

        with on_standard_error():
            plan = planner(options, settings)
        print_report(plan, render(plan), settings)
        return
    with on_standard_error():
        path = stage_function(name)(options, settings)
    if settings.dry_run:
        from dqtool.stages.planning.plan import plan_stage, render

        with on_standard_error():
            plan = plan_stage(settings.log[-1], options)
        print_report(plan, render(plan), settings)
    else:
        print_result(path, settings)


@contextlib.contextmanager
def on_standard_error() -> Any:
    """Send everything that is printed inside to standard error, which keeps standard output for the result."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def print_result(path: str, settings: RunSettings) -> None:
    """Print the path, or with --json the manifest with the path and the stages that were cached."""
    if not settings.json:
        print(path)
        return
    from dqtool.artifacts import manifest_path
    from dqtool.artifacts.reading import MANIFEST_BYTES, load_json

    last = settings.log[-1] if settings.log else None
    found: dict[str, Any] = {}
    if last is not None and manifest_path(path).is_file():
        found = load_json(manifest_path(path), MANIFEST_BYTES)
    if len(settings.log) > 1:
        found["stages"] = [{"stage": e.stage, "path": e.output, "cached": e.cached} for e in settings.log]
    if settings.summary:
        found["summary"] = settings.summary
    print(json_format.dumps(found | {"path": path, "cached": last is not None and last.cached}, sort_keys=True))


def print_report(content: Any, lines: Sequence[str], settings: RunSettings) -> None:
    """Print a report: its lines, with control characters escaped, or with --json its content."""
    if settings.json:
        print(json_format.dumps(content, sort_keys=True))
    else:
        print("\n".join(map(shown, lines)))
