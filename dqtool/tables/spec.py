"""Reader of tables in YAML. Every unknown key, option, column or value is an error with its line."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqtool.errors import UsageError
from dqtool.stages.registry import chained_stages, option_types
from dqtool.tables.columns import COLUMNS
from dqtool.tables.schedules import SCHEDULES
from dqtool.yamltree import compose, convert, entries, items, listed, nearest, read_text, text_of

if TYPE_CHECKING:
    from yaml.nodes import Node

__all__ = ["CORRECTED", "STAGES", "Group", "Options", "PublishedVariant", "Row", "Table", "load_table"]

STAGES = tuple(name for name in chained_stages() if name != "export")
"""Stages of a cell, in order. Cells measure the distilled artifact, because exporting it changes no figure."""

Options = dict[str, dict[str, Any]]
"""Values of options, by stage and field name."""

_TOP = (
    "title",
    "source",
    "about",
    "model",
    "stands-for",
    "schedule",
    "seeds",
    "stages",
    "columns",
    "baseline",
    "curve",
    "options",
    "corrections",
    "published",
    "groups",
    "rows",
    "paper-columns",
    "paper-reference",
)
_GROUP = ("name", "model", "stands-for", "seeds", "options", "published", "published-only", "paper-reference")
_ROW = ("name", "options", "groups", "paper", "paper-only", "note")


@dataclass(frozen=True)
class Group:
    """Rows that belong together: a bit width, a sampler or a model.

    None stands for the table's value. A group with `published_only` is not run on embedded models.
    """

    name: str
    model: str | None = None
    stands_for: str | None = None
    seeds: tuple[int, ...] | None = None
    options: Options = field(default_factory=dict)
    published: Options = field(default_factory=dict)
    published_only: bool = False
    paper_reference: str = ""


@dataclass(frozen=True)
class Row:
    """A row of the groups in `groups`; None stands for all groups.

    `paper` holds the paper's numbers by name of the group. A row with `paper_only` has these alone and is not run.
    """

    name: str
    options: Options = field(default_factory=dict)
    groups: tuple[str, ...] | None = None
    paper: Mapping[str, str] = field(default_factory=dict)
    paper_only: bool = False
    note: str = ""


@dataclass(frozen=True)
class PublishedVariant:
    """Changes of a table that runs on a published model.

    Attributes:
        options: options of the stages.
        columns: columns, if they differ.
        needs: options of files, as `stage.option`, without which the table can't be run.
    """

    options: Options = field(default_factory=dict)
    columns: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """A table, checked. Fields are named as its keys in YAML."""

    name: str
    path: Path
    title: str
    source: str
    about: str
    model: str
    stands_for: str
    schedule: str
    seeds: tuple[int, ...]
    stages: tuple[str, ...]
    columns: tuple[str, ...]
    baseline: str | None
    curve: str | None
    options: Options
    published: PublishedVariant
    groups: tuple[Group, ...]
    rows: tuple[Row, ...]
    paper_columns: str


def load_table(path: str | os.PathLike[str]) -> Table:
    """Read a table.

    Raises:
        EnvironmentFault: there is no such file.
        UsageError: the file is not a table; the message has the line.
    """
    given = os.fspath(path)
    root = compose(read_text(path, "table"), given)
    if root is None:
        raise UsageError("This table is empty", where=given)
    top = entries(root, given, _TOP, "key")
    for key in ("title", "model", "columns", "rows"):
        if key not in top:
            raise UsageError(
                f"The table has no {key}", where=given, fix=f"A table needs {listed(_TOP[:1])}, model, ..."
            )
    text = {k: _text(top, k, given) for k in ("title", "source", "about", "model", "stands-for", "paper-columns")}
    stages = _names(top, "stages", STAGES, "stage", given) or STAGES
    groups = tuple(_group(node, given) for node in _list(top, "groups", given)) or (
        Group("", paper_reference=_text(top, "paper-reference", given)),
    )
    known = [group.name for group in groups]
    rows = tuple(_row(node, given, known) for node in _list(top, "rows", given))
    if _flag(top, "corrections", given):
        rows = _with_corrections(rows)
    names = [row.name for row in rows]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"Two rows are called {name}", where=given)
    baseline = _text(top, "baseline", given) or None
    if baseline is not None and baseline not in names:
        raise UsageError(
            f"No row is called {baseline}", where=_where(top, "baseline", given), fix=nearest(baseline, names)
        )
    schedule = _text(top, "schedule", given) or "short"
    if schedule not in SCHEDULES:
        raise UsageError(
            f"Unknown schedule: {schedule}", where=_where(top, "schedule", given), fix=nearest(schedule, SCHEDULES)
        )
    return Table(
        name=Path(path).stem,
        path=Path(path),
        title=text["title"],
        source=text["source"],
        about=text["about"],
        model=text["model"],
        stands_for=text["stands-for"],
        schedule=schedule,
        seeds=_seeds(top, given) or (0,),
        stages=stages,
        columns=_names(top, "columns", COLUMNS, "column", given),
        baseline=baseline,
        curve=_text(top, "curve", given) or None,
        options=_options(top, given),
        published=_published(top, given),
        groups=groups,
        rows=rows,
        paper_columns=text["paper-columns"],
    )


Entries = Mapping[str, "tuple[int, Node]"]


def _group(node: Node, given: str) -> Group:
    found = entries(node, given, _GROUP, "key of a group")
    return Group(
        name=_needed(found, "name", node, given),
        model=_text(found, "model", given) or None,
        stands_for=_text(found, "stands-for", given) or None,
        seeds=_seeds(found, given) or None,
        options=_options(found, given),
        published=_published(found, given).options,
        published_only=_flag(found, "published-only", given),
        paper_reference=_text(found, "paper-reference", given),
    )


def _row(node: Node, given: str, groups: list[str]) -> Row:
    found = entries(node, given, _ROW, "key of a row")
    paper: dict[str, str] = {}
    if "paper" in found:
        line, value = found["paper"]
        if groups == [""]:
            paper[""] = text_of(value, f"{given}:{line}", "paper")
        else:
            for group, (at, numbers) in entries(value, given, groups, "group").items():
                paper[group] = text_of(numbers, f"{given}:{at}", group)
    only = _names(found, "groups", groups, "group", given) or None
    return Row(
        name=_needed(found, "name", node, given),
        options=_options(found, given),
        groups=only,
        paper=paper,
        paper_only=_flag(found, "paper-only", given),
        note=_text(found, "note", given),
    )


CORRECTED = ", corrected"
"""End of the names of rows whose predictions are corrected at every step."""


def _with_corrections(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """Return all rows without the correction of predictions, then all rows with it, named NAME, corrected.

    Both rows of a pair have one training: the tables are fitted after it, and the first row is evaluated with them
    switched off. Static quantizers have no steps to correct and are in the first part alone, and so are rows of the
    paper's numbers.
    """
    plain = [row if row.paper_only else replace(row, options=_uncorrected(row.options)) for row in rows]
    able = [row for row in rows if not row.paper_only and not row.options.get("distill", {}).get("static")]
    corrected = [replace(row, name=row.name + CORRECTED, options=_corrected(row.options), paper={}) for row in able]
    return (*plain, *corrected)


def _uncorrected(options: Options) -> Options:
    """Return options of a row that is evaluated with its correction off. The preset `paper` fits none."""
    distill = options.get("distill", {})
    if distill.get("preset") == "paper" or distill.get("static"):
        return options
    return {**_corrected(options), "eval": {**options.get("eval", {}), "correction": "off"}}


def _corrected(options: Options) -> Options:
    """Return options with the correction on. With the preset `paper`, which has none, its other parts are spelled out."""
    distill = dict(options.get("distill", {}))
    if distill.get("preset") == "paper":
        del distill["preset"]
        distill |= {"method": "bkd", "refine_iters": 0}
    return {**options, "distill": distill | {"correct_noise": True}}


def _flag(found: Entries, key: str, given: str) -> bool:
    return key in found and convert(found[key][1], bool, _where(found, key, given), key)


def _published(found: Entries, given: str) -> PublishedVariant:
    if "published" not in found:
        return PublishedVariant()
    inner = entries(found["published"][1], given, ("columns", "options", "needs"), "key of published")
    known = [f"{stage}.{option}" for stage in STAGES for option in option_types(stage)]
    return PublishedVariant(
        _options(inner, given),
        _names(inner, "columns", COLUMNS, "column", given),
        _names(inner, "needs", known, "option", given),
    )


def _options(found: Entries, given: str) -> Options:
    if "options" not in found:
        return {}
    result: Options = {}
    for stage, (_, node) in entries(found["options"][1], given, STAGES, "stage").items():
        types = option_types(stage)
        result[stage] = {
            option.replace("-", "_"): convert(value, types[option], f"{given}:{line}", option)
            for option, (line, value) in entries(node, given, tuple(types), f"option of {stage}").items()
            if _allowed(option, stage, f"{given}:{line}")
        }
    return result


_SET_BY_RUNNER = ("seed", "output", "reference", "grid", "save-samples")


def _allowed(option: str, stage: str, where: str) -> bool:
    if option in _SET_BY_RUNNER:
        raise UsageError(f"{option} of {stage} is set by the runner", where=where, fix="Leave it out")
    return True


def _seeds(found: Entries, given: str) -> tuple[int, ...]:
    nodes = _list(found, "seeds", given)
    return tuple(convert(node, int, f"{given}:{node.start_mark.line + 1}", "seeds") for node in nodes)


def _names(found: Entries, key: str, known: Any, kind: str, given: str) -> tuple[str, ...]:
    names = []
    for node in _list(found, key, given):
        where = f"{given}:{node.start_mark.line + 1}"
        name = text_of(node, where, key)
        if name not in known:
            raise UsageError(f"Unknown {kind}: {name}", where=where, fix=nearest(name, known))
        names.append(name)
    return tuple(names)


def _list(found: Entries, key: str, given: str) -> list[Node]:
    return items(found[key][1], given, key) if key in found else []


def _text(found: Entries, key: str, given: str) -> str:
    return " ".join(text_of(found[key][1], _where(found, key, given), key).split()) if key in found else ""


def _needed(found: Entries, key: str, node: Node, given: str) -> str:
    if key not in found:
        raise UsageError(f"The key {key} is missing here", where=f"{given}:{node.start_mark.line + 1}")
    return _text(found, key, given)


def _where(found: Entries, key: str, given: str) -> str:
    return f"{given}:{found[key][0]}"
