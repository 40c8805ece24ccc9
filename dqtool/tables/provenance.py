"""Provenance of a cell: the commands that make it, its seeds, its training method and passes, and its correction."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from dqtool.tables.planning import Cell, Step

__all__ = ["THEIRS", "commands", "iterations", "provenance"]

THEIRS = {
    "adaround": "20,000 a block",
    "per-step": "20,000 a block",
    "lora-qat": "16,000",
    "lsq": "90 epochs of ImageNet",
}
"""Iterations of the training methods in their own papers, where these say so."""

_PASSES = {"iters": "blocks", "refine_iters": "all blocks", "temporal_iters": "steps"}
_WHOLE = ("lsq", "lora-qat", "on-policy", "qat-partial")
"""Methods whose `iters` count iterations of the whole network."""


def provenance(cell: Cell) -> dict[str, Any]:
    """Return how a cell is made, as JSON values.

    `seeds` by stage, `method`, `passes` (iterations of each pass of the training), `correction` (True if the evaluated
    network corrects its predictions), and `commands`, which make the cell in an empty directory.
    """
    by_stage = {step.stage: step for step in cell.steps}
    found: dict[str, Any] = {
        "seeds": {stage: step.parameters["seed"] for stage, step in by_stage.items() if "seed" in step.parameters},
        "commands": commands(cell),
    }
    distill = by_stage.get("distill")
    if distill is not None:
        recipe = distill.parameters.get("recipe") or {}
        found["method"] = distill.parameters.get("method")
        found["passes"] = {word: recipe[key] for key, word in _PASSES.items() if recipe.get(key)}
        found["correction"] = "correct_images" in distill.parameters and _evaluates_corrected(by_stage)
    return found


def iterations(cell: Cell) -> str:
    """Return the iterations of a cell's training and those of the method's own paper: `60 a block (20,000 a block)`."""
    distill = next((step for step in cell.steps if step.stage == "distill"), None)
    recipe = {} if distill is None else distill.parameters.get("recipe") or {}
    if distill is None or not any(recipe.get(key) for key in _PASSES):
        return ""
    method = str(distill.parameters.get("method"))
    here = str(recipe.get("iters") or 0) + ("" if method in _WHOLE else " a block")
    if recipe.get("refine_iters"):
        here += f" and {recipe['refine_iters']} of all blocks"
    return f"{here} ({THEIRS[method]})" if method in THEIRS else here


def commands(cell: Cell) -> list[str]:
    """Return the command of each stage, in order. Each reads what the one before wrote under its default name."""
    return [shlex.join(_words(step)) for step in cell.steps]


def _words(step: Step) -> list[str]:
    words = ["dqtool", step.stage, *([step.model] if step.source is None else [])]
    for name, value in sorted(step.values.items()):
        words += _option(name.replace("_", "-"), value)
    return words


def _option(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}"] if value else [] if name in ("floor", "static", "low-memory") else [f"--no-{name}"]
    if isinstance(value, list | tuple):
        return [f"--{name}", ",".join(map(str, value))] if name in ("metrics", "timesteps") else _each(name, value)
    return [] if value is None else [f"--{name}", str(value)]


def _each(name: str, values: Any) -> list[str]:
    return [word for value in values for word in (f"--{name}", str(value))]


def _evaluates_corrected(by_stage: Mapping[str, Step]) -> bool:
    evaluated = by_stage.get("eval")
    return evaluated is None or evaluated.parameters.get("correction") != "off"
