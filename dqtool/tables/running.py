"""Runs cells: every stage once however many cells share it, one worker to a cell, nothing twice."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dqtool.artifacts import dqtool_version, environment
from dqtool.core.device import resolve_device
from dqtool.errors import NumericError
from dqtool.stages.common import Common
from dqtool.stages.registry import make_options, stage_function
from dqtool.tables.cells import CellStore, claim
from dqtool.tables.measures import MEASURES_VERSION, measure
from dqtool.tables.planning import Cell, Step
from dqtool.tables.spec import STAGES

__all__ = ["Runner"]

POLL = 5.0
"""Seconds between looks at the cells that another worker has."""


def tell(text: str) -> None:
    """One line on standard error, whether or not stages are quiet."""
    print(text, file=sys.stderr, flush=True)


@dataclass
class Runner:
    """Where artifacts (`work`) and results (`store`) go, and what every stage is told. `verbose` shows stages' progress."""

    work: Path
    store: CellStore
    common: Common

    def run(self, cells: Sequence[Cell], after: Callable[[], object]) -> int:
        """Finish every cell that isn't; `after` is called whenever one is, here or by another worker. Returns how many were
        run here.

        Raises:
            DqtoolError: what a stage raises; but numbers that fail (a diverged training) are a cell's result.
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
                        tell(f"cell {total - left + 1} of {total}: {label}")
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
        record: dict[str, Any] = {
            "stages": [
                {"stage": step.stage, "parameters": dict(step.parameters), "key": step.key} for step in cell.steps
            ],
            "model": cell.steps[0].model,
            "environment": environment(str(resolve_device(self.common.device)), torch.get_num_threads()),
            "dqtool": dqtool_version(),
            "measures": MEASURES_VERSION,
        }
        try:
            for step, entry in zip(cell.steps, record["stages"], strict=True):
                artifacts[step.stage], seconds = self._make(step)
                if seconds is not None:
                    entry["cpu_seconds"] = round(seconds, 1)
            bits = next((str(step.parameters["bits"]) for step in cell.steps if step.stage == "distill"), "4/4")
            record["metrics"] = measure(artifacts, bits)
            self._count_earlier_runs(record)
            self._keep_times(cell.key, record)
        except NumericError as error:
            record["failed"] = str(error)
            tell(f"  the numbers failed: {error}")
        record["seconds"] = round(time.perf_counter() - start, 1)
        self.store.save(cell.key, record)

    @staticmethod
    def _count_earlier_runs(record: dict[str, Any]) -> None:
        """A training that was interrupted knows what all its runs took."""
        whole = record["metrics"].get("distill", {}).get("training_cpu_seconds", 0.0)
        for entry in record["stages"]:
            if entry["stage"] == "distill" and "cpu_seconds" in entry:
                entry["cpu_seconds"] = round(max(entry["cpu_seconds"], whole), 1)

    def _keep_times(self, key: str, record: dict[str, Any]) -> None:
        """What stages took that were there already, from the cell that is made again."""
        earlier = {entry["key"]: entry for entry in (self.store.load(key) or {}).get("stages", ())}
        for entry in record["stages"]:
            known = earlier.get(entry["key"], {})
            if "cpu_seconds" not in entry and "cpu_seconds" in known:
                entry["cpu_seconds"] = known["cpu_seconds"]

    def _make(self, step: Step) -> tuple[Path, float | None]:
        """The artifact of a step, made unless it is there, and the processor's seconds it took (None: it was there)."""
        path = self.path(step)
        self.work.mkdir(parents=True, exist_ok=True)
        values = dict(step.values) | {"output": str(path)}
        if step.source is None:
            values["model"] = step.model
        else:
            before = STAGES[STAGES.index(step.stage) - 1]
            values["artifact"] = str(self._at(before, step.source))
        if step.stage == "eval":
            values["reference"] = step.model
        with claim(path.with_name(f".{path.name}.claim"), wait=True):
            start, used = time.perf_counter(), time.process_time()
            stage_function(step.stage)(make_options(step.stage, values), self.common)
            taken, used = time.perf_counter() - start, time.process_time() - used
        cached = self.common.log[-1].cached
        tell(f"  {step.stage}: " + ("was there" if cached else f"{taken:.0f} s ({used:.0f} s of processor)"))
        return path, None if cached else used

    def path(self, step: Step) -> Path:
        """Where a step's artifact is."""
        return self._at(step.stage, step.key)

    def _at(self, stage: str, key: str) -> Path:
        return self.work / f"{stage}-{key[:20]}{'.json' if stage == 'eval' else '.safetensors'}"
