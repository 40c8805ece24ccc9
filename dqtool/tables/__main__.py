"""`python -m dqtool.tables FILE...`: run the missing cells of tables and write the tables. Several may run at once."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from dqtool import report
from dqtool.artifacts.files import write_text
from dqtool.artifacts.outputs import check_results
from dqtool.artifacts.reading import TEXT_BYTES, read_text_file
from dqtool.errors import DqtoolError, UsageError
from dqtool.stages.registry import option_types
from dqtool.stages.shared.settings import RunSettings
from dqtool.tables.cell_figures import FIGURES_VERSION
from dqtool.tables.cells import CellStore
from dqtool.tables.forecast import Forecast, forecast
from dqtool.tables.naming import variant_of
from dqtool.tables.planning import Cell, Target, plan_table
from dqtool.tables.rendering import curve_figure, render_markdown, summarise, table_name
from dqtool.tables.running import Runner, log
from dqtool.tables.schedules import SCHEDULES
from dqtool.tables.spec import STAGES, Options, Table, load_table
from dqtool.yamltree import compose, convert, nearest

__all__ = ["WORKERS", "main"]

WORKERS = 2
"""Workers of one thread each that `make bench-all` starts."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code, which means the same as `dqtool`'s."""
    args = _parser().parse_args(arguments)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs with SIGINT ignored
    try:
        return _run(args)
    except DqtoolError as error:
        log(f"tables: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        log("tables: interrupted; finished cells are kept, and the same command goes on from there")
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dqtool.tables", description=__doc__)
    parser.add_argument("files", nargs="+", metavar="TABLE.yaml")
    parser.add_argument(
        "--dry-run", action="store_true", help="Print the number of cells and the expected hours; run nothing."
    )
    parser.add_argument("--render", action="store_true", help="Write the tables from finished cells; run nothing.")
    parser.add_argument("--refresh", action="store_true", help="Run finished cells again that lack newer figures.")
    parser.add_argument("--model", help="Published model to use, in place of the embedded one.")
    parser.add_argument(
        "--set", action="append", default=[], metavar="STAGE.OPTION=VALUE", help="Option to set in all rows."
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="Seeds to run, in place of the table's.")
    parser.add_argument("--schedule", choices=SCHEDULES, help="Schedule, in place of the table's.")
    parser.add_argument("--groups", nargs="+", help="Groups to run. The table is written with all its groups.")
    parser.add_argument(
        "--results", type=Path, default=Path("recipes/results"), help="Directory of finished cells and tables."
    )
    parser.add_argument("--work", type=Path, default=Path("results/tables"), help="Directory of artifacts.")
    parser.add_argument("--verbose", action="store_true", help="Show the progress of every stage.")
    return parser


def _run(args: argparse.Namespace) -> int:
    seeds = None if args.seeds is None else tuple(args.seeds)
    target = Target(args.model, _overrides(args.set), schedule=args.schedule)
    chosen = Target(args.model, target.overrides, seeds, args.schedule)
    store = CellStore(args.results / "cells", FIGURES_VERSION if args.refresh else 0)
    tables = [load_table(file) for file in args.files]
    asked = [plan_table(table, chosen) for table in tables]
    _check_groups(args.groups, asked)
    wanted = [[cell for cell in cells if args.groups is None or cell.group in args.groups] for cells in asked]
    # Tables are written with all their own groups and seeds, plus those that the command line asks for.
    planned = [(table, plan_table(table, target)) for table in tables]
    plans = [
        (table, _with_others(cells, mine), variant_of(table, target, cells))
        for (table, cells), mine in zip(planned, wanted, strict=True)
    ]
    if args.dry_run:
        _print_plan(tables, wanted, store)
        return 0
    if args.results.is_dir():  # before the hours of work, not after them
        for table, _, variant in plans:
            path = args.results / f"{table_name(table, variant)}.md"
            check_results(path.with_suffix(".json"), [path, path.with_suffix(".svg")])
    if not args.render:
        report.set_quiet(not args.verbose)
        runner = Runner(args.work, store, RunSettings(quiet=not args.verbose))
        everything = [cell for cells in wanted for cell in cells]
        for text in dict.fromkeys(cell.problem for cell in everything if cell.problem):
            log(f"warning: some rows can't be run here: {text}")
        runner.run(everything, lambda: _write(plans, target, store, args))
    for path in _write(plans, target, store, args):
        print(path)
    return 2 if any(cell.problem for cells in wanted for cell in cells) else 0


def _with_others(cells: list[Cell], others: list[Cell]) -> list[Cell]:
    known = {(cell.row, cell.group, cell.seed) for cell in cells}
    return cells + [cell for cell in others if (cell.row, cell.group, cell.seed) not in known]


def _check_groups(asked: Sequence[str] | None, plans: Sequence[Sequence[Cell]]) -> None:
    known = sorted({cell.group for cells in plans for cell in cells})
    for name in asked or ():
        if name not in known:
            raise UsageError(f"No group is called {name}", where="--groups", fix=nearest(name, known))


def _write(
    plans: Sequence[tuple[Table, list[Cell], str]], target: Target, store: CellStore, args: argparse.Namespace
) -> list[Path]:
    """Write every table that has a finished cell; return the paths of the Markdown files."""
    written = []
    for table, cells, variant in plans:
        summary = summarise(table, target, cells, store, _command(table, args), variant)
        if not summary["cells"]["finished"]:
            continue
        path = args.results / f"{summary['name']}.md"
        figure = curve_figure(summary)
        check_results(path.with_suffix(".json"), [path, *([] if figure is None else [path.with_suffix(".svg")])])
        _write_if_changed(path.with_suffix(".json"), json.dumps(summary, indent=1, sort_keys=True) + "\n")
        _write_if_changed(path, render_markdown(summary))
        if figure is not None:
            _write_if_changed(path.with_suffix(".svg"), figure)
        written.append(path)
    return written


def _write_if_changed(path: Path, text: str) -> None:
    if not path.is_file() or read_text_file(path, TEXT_BYTES) != text:
        write_text(path, text)


def _command(table: Table, args: argparse.Namespace) -> str:
    words = ["python", "-m", "dqtool.tables", table.path.as_posix()]
    words += ["--model", args.model] if args.model else []
    words += [word for each in args.set for word in ("--set", each)]
    words += ["--schedule", args.schedule] if args.schedule else []
    return shlex.join(words)


def _overrides(given: Sequence[str]) -> Options:
    """Parse `--set stage.option=value`, which takes the values that recipes take."""
    found: Options = {}
    for text in given:
        key, equals, value = text.partition("=")
        stage, _, option = key.partition(".")
        where = f"--set {text}"
        node = compose(value, where) if equals else None
        if stage not in STAGES or node is None:
            raise UsageError("This is not STAGE.OPTION=VALUE", where=where, fix=f"Stages: {', '.join(STAGES)}")
        types = option_types(stage)
        if option not in types:
            raise UsageError(f"Unknown option of {stage}: {option}", where=where, fix=nearest(option, types))
        found.setdefault(stage, {})[option.replace("-", "_")] = convert(node, types[option], where, option)
    return found


def _print_plan(tables: Sequence[Table], plans: Sequence[Sequence[Cell]], store: CellStore) -> None:
    rows = []
    for table, cells in zip(tables, plans, strict=True):
        found = forecast(cells, store)
        rows.append(_plan_row(table.name, found))
    everything = forecast([cell for cells in plans for cell in cells], store)
    rows.append(_plan_row("all (shared cells once)", everything))
    print("\n".join(report.table_lines(["table", "cells", "finished", "can't run", "core hours left", "in all"], rows)))
    left, whole = (each / 3600 / WORKERS for each in (everything.seconds, everything.whole_seconds))
    print(f"`make bench-all` on {WORKERS} cores: {left:.1f} hours left, {whole:.1f} in all")
    for text in sorted({cell.problem for cells in plans for cell in cells if cell.problem}):
        print(f"can't run: {text}")


def _plan_row(name: str, found: Forecast) -> tuple[object, ...]:
    hours = (f"{each / 3600:.2f}" for each in (found.seconds, found.whole_seconds))
    return (name, found.cells, found.finished, found.problems, *hours)


if __name__ == "__main__":
    sys.exit(main())
