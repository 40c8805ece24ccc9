"""Names of the results of a changed table. They differ from the table's own, so that no run overwrites another's results."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace

from dqtool.artifacts.manifest import canonical_json
from dqtool.errors import DqtoolError
from dqtool.models.sources.original.checkpoint import PICKLES
from dqtool.tables.planning import Cell, Step, Target, model_digest, plan_table
from dqtool.tables.spec import Table

__all__ = ["variant_of"]

WEIGHTS = (*PICKLES, ".safetensors")


def variant_of(table: Table, target: Target, cells: Sequence[Cell]) -> str:
    """Return the suffix of the table's name for a target whose cells are `cells`; "" for the table as it is in its file.

    The suffix names the published model, a changed schedule, and a hash of the options that `--set` changes.
    """
    parts = []
    if target.model is not None:
        first = next((cell.steps[0] for cell in cells if cell.steps), None)
        parts += ["published", _short(target.model), *([] if first is None else [_digest(first)[:8]])]
    own = table.schedule if target.model is None else None
    if target.schedule is not None and target.schedule != own:
        parts.append(target.schedule)
    if target.overrides and _changed(table, target, cells):
        parts += ["set", hashlib.sha256(canonical_json(target.overrides).encode()).hexdigest()[:8]]
    return "-".join(parts)


def _short(model: str) -> str:
    """Return the last part of a model's name, as a part of a file name."""
    name = re.split(r"[/:]", model.rstrip("/"))[-1]
    ending = next((suffix for suffix in WEIGHTS if name.lower().endswith(suffix)), "")
    return re.sub(r"[^\w.]+", "-", name[: len(name) - len(ending)], flags=re.ASCII).strip("-.") or "model"


def _digest(step: Step) -> str:
    """Return the sha256 of the model that the first step reads. Many checkpoints have the name model.ckpt."""
    return model_digest(step.model, step.values)


def _changed(table: Table, target: Target, cells: Sequence[Cell]) -> bool:
    """Return True if the overrides change a cell of the table."""
    try:
        plain = plan_table(table, replace(target, overrides={}))
    except DqtoolError:  # a model that can't be read without them
        return True
    return [(cell.key, cell.problem) for cell in plain] != [(cell.key, cell.problem) for cell in cells]
