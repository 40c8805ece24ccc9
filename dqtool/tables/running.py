"""Runner of cells. A stage that cells share runs once, and several workers share the cells of a table."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dqtool.artifacts import dqtool_version, environment
from dqtool.core.device import resolve_device
from dqtool.errors import NumericError
from dqtool.stages.registry import make_options, stage_function
from dqtool.stages.shared.settings import RunSettings
from dqtool.tables.cell_figures import FIGURES_VERSION, cell_figures
from dqtool.tables.cells import CellRecord, CellStore, StageRun, claim
from dqtool.tables.planning import Cell, Step
from dqtool.tables.provenance import provenance

__all__ = ["Runner"]

POLL = 5.0
"""Seconds between checks of cells that another worker runs."""


def log(text: str) -> None:
    """Print a line to standard error, even if stages are quiet."""
    print(text, file=sys.stderr, flush=True)


@dataclass
class Runner:
    """A worker that runs cells: artifacts go to `work`, finished cells to `store`; stages get `settings`."""

    work: Path
    store: CellStore
    settings: RunSettings

    def run(self, cells: Sequence[Cell], after: Callable[[], object]) -> int:
        """Run every cell that is not finished, and return the number of cells that this worker ran.

        `after` is called whenever cells were finished, by this worker or another one.

        Raises:
            DqtoolError: a stage failed. A training that diverges does not raise: it is the result of its cell.
        """
        pending = {cell.key: cell for cell in cells if cell.key}
        total, ran = len(pending), 0
        while True:
            pending = {key: cell for key, cell in pending.items() if not self.store.finished(key)}
            if not pending:
                return ran
            progressed = False
            for key, cell in list(pending.items()):
                with claim(self.work / f".{key[:32]}.cell", wait=False) as mine:
                    if not mine:
                        continue
                    if not self.store.finished(key):
                        left = len(pending)
                        label = " · ".join(filter(None, (cell.group, cell.row, f"seed {cell.seed}")))
                        log(f"cell {total - left + 1} of {total}: {label}")
                        self._finish(cell)
                        ran += 1
                    progressed = True
                    del pending[key]
                after()
            if not progressed:
                time.sleep(POLL)

    def _finish(self, cell: Cell) -> None:
        import torch

        start = time.perf_counter()
        artifacts: dict[str, Path] = {}
        runs = [StageRun(step.stage, dict(step.parameters), step.key) for step in cell.steps]
        metrics: dict[str, Any] | None = None
        failed: str | None = None
        try:
            for number, step in enumerate(cell.steps):
                artifacts[step.stage], seconds = self._make(step)
                if seconds is not None:
                    runs[number] = replace(runs[number], cpu_seconds=round(seconds, 1))
            bits = next((str(step.parameters["bits"]) for step in cell.steps if step.stage == "distill"), "4/4")
            metrics = {**cell_figures(artifacts, bits)}
            runs = self._with_earlier_times(cell.key, _with_earlier_runs(runs, metrics))
        except NumericError as error:
            failed = str(error)
            log(f"  the numbers failed: {error}")
        record = CellRecord(
            stages=runs,
            model=cell.steps[0].model,
            environment=environment(str(resolve_device(self.settings.device)), torch.get_num_threads()),
            dqtool=dqtool_version(),
            measures=FIGURES_VERSION,
            metrics=metrics,
            failed=failed,
            seconds=round(time.perf_counter() - start, 1),
            as_read=provenance(cell),
        )
        self.store.save(cell.key, record)

    def _with_earlier_times(self, key: str, runs: Sequence[StageRun]) -> list[StageRun]:
        """Return the runs with the times of cached stages that the earlier record of the cell holds."""
        earlier = self.store.load(key)
        known = {} if earlier is None else {run.key: run.cpu_seconds for run in earlier.stages}
        return [replace(run, cpu_seconds=known.get(run.key)) if run.cpu_seconds is None else run for run in runs]

    def _make(self, step: Step) -> tuple[Path, float | None]:
        """Run a step unless its artifact exists. Return its path and processor seconds; None for one that existed."""
        path = self.path(step)
        self.work.mkdir(parents=True, exist_ok=True)
        values = dict(step.values) | {"output": str(path)}
        if step.source is None:
            values["model"] = step.model
        else:
            values["artifact"] = str(self._at(str(step.before), step.source))
        if step.stage == "eval":
            values["reference"] = step.model
        with claim(path.with_name(f".{path.name}.claim"), wait=True):
            start, used = time.perf_counter(), time.process_time()
            stage_function(step.stage)(make_options(step.stage, values), self.settings)
            taken, used = time.perf_counter() - start, time.process_time() - used
        cached = self.settings.log[-1].cached
        log(f"  {step.stage}: " + ("exists already" if cached else f"{taken:.0f} s ({used:.0f} s of processor)"))
        return path, None if cached else used

    def path(self, step: Step) -> Path:
        """Return the path of a step's artifact."""
        return self._at(step.stage, step.key)

    def _at(self, stage: str, key: str) -> Path:
        suffix = {"eval": ".json", "export": ""}.get(stage, ".safetensors")
        return self.work / f"{stage}-{key[:20]}{suffix}"


def _with_earlier_runs(runs: Sequence[StageRun], metrics: Mapping[str, Any]) -> list[StageRun]:
    """Return the runs; an interrupted training gets the processor time of its metrics, which add up all its runs."""
    whole = float(metrics.get("distill", {}).get("training_cpu_seconds", 0.0))
    return [
        replace(run, cpu_seconds=round(max(run.cpu_seconds, whole), 1))
        if run.stage == "distill" and run.cpu_seconds is not None
        else run
        for run in runs
    ]
