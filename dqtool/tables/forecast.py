"""Forecast of the time that cells take, from the times of finished ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dqtool.tables.cells import CellRecord, CellStore
from dqtool.tables.planning import Cell, Step

__all__ = ["Forecast", "forecast"]

PRIOR = {
    "dilate": 2.0,
    "calibrate": 90 / 5120,
    "distill": 0.75,
    "export": 1.0,
    "eval by cpu": 80 / (4096 * 20),
    "eval by simulate": 240 / (4096 * 20),
}
"""Seconds for each unit of work on `zoo:digits-ddpm` with one core, used until a cell was measured.

The unit is an artifact in dilate and export, a trajectory point in calibrate, an iteration (of a block and of the pass over
all blocks) in distill, and a sampling step of an image in eval."""


@dataclass(frozen=True)
class Forecast:
    """Numbers of cells, and the time that one worker needs for them.

    Attributes:
        cells: different cells.
        finished: finished cells.
        problems: cells that can't run.
        seconds: time of the cells that are left.
        whole_seconds: time of all cells.
    """

    cells: int
    finished: int
    problems: int
    seconds: float
    whole_seconds: float


def forecast(cells: Sequence[Cell], store: CellStore) -> Forecast:
    """Return the forecast for some cells; `store` holds the finished ones."""
    rates = _rates(store.every())
    unique = {cell.key: cell for cell in cells if cell.key}
    done = {key for key in unique if store.finished(key)}
    made = {step.key for key in done for step in unique[key].steps}
    left, whole = 0.0, 0.0
    counted: set[str] = set()
    for cell in unique.values():
        for step in cell.steps:
            if step.key in counted:
                continue
            counted.add(step.key)
            seconds = _seconds(step, _sampling_steps(step.parameters for step in cell.steps), rates)
            whole += seconds
            left += seconds if step.key not in made else 0.0
    return Forecast(len(unique), len(done), sum(bool(cell.problem) for cell in cells), left, whole)


def _seconds(step: Step, sampling_steps: int, rates: Mapping[tuple[str, ...], float]) -> float:
    """Return the expected seconds of a stage, by the rate of the most similar finished stages."""
    kind = _kind(step.stage, step.model, step.parameters)
    known = (rates[kind[:length]] for length in (3, 2, 1) if kind[:length] in rates)
    return next(known, PRIOR.get(kind[0], PRIOR["eval by simulate"])) * _work(
        step.stage, step.parameters, sampling_steps
    )


def _kind(stage: str, model: str, parameters: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the kind of a stage, from its widest part to its narrowest. Runtimes sample at different speeds."""
    if stage == "eval":
        return f"eval by {parameters.get('runtime')}", model, ""
    return stage, model, str(parameters.get("method"))


def _sampling_steps(parameters: Iterable[Mapping[str, Any]]) -> int:
    return next((int(each["steps"]) for each in parameters if each.get("steps")), 20)


def _work(stage: str, parameters: Mapping[str, Any], sampling_steps: int) -> float:
    if stage == "distill":
        recipe = parameters.get("recipe") or {}
        return 10.0 + sum(float(recipe.get(name) or 0) for name in ("iters", "refine_iters", "temporal_iters"))
    samples = float(parameters.get("samples", 1))
    return samples * sampling_steps if stage == "eval" else samples


def _rates(records: Iterable[CellRecord]) -> dict[tuple[str, ...], float]:
    """Return mean seconds for each unit of work, by each start of a kind (`_kind`)."""
    sums: dict[tuple[str, ...], tuple[float, float]] = {}
    for record in records:
        if record.environment.device != "cpu":
            continue
        steps = _sampling_steps(run.parameters for run in record.stages)
        for run in record.stages:
            seconds = run.cpu_seconds
            if seconds is None:
                continue
            work = _work(run.stage, run.parameters, steps)
            whole = _kind(run.stage, record.model, run.parameters)
            for kind in (whole, whole[:2], whole[:1]):
                before = sums.get(kind, (0.0, 0.0))
                sums[kind] = (before[0] + seconds, before[1] + work)
    return {kind: total / work for kind, (total, work) in sums.items() if work}
