"""The step lookup: from the timestep that a sampler gives a network to the row of its step tables.

Every engine uses this lookup. A row is a tensor on the timestep's device, and looking it up does not wait for the device.
A timestep without a row of its own takes the nearest row. One warning reports how many there were, see `step_run`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import os
import warnings
import weakref
from collections.abc import Callable, Iterator, Set
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from dqtool.core.device import to_device
from dqtool.errors import DqtoolWarning, NumericError

__all__ = [
    "TIMESTEP_NAMES",
    "StepIndex",
    "StepRun",
    "calibrated_points",
    "look_up",
    "nearest_rows",
    "step_hook",
    "step_run",
    "time_argument",
]

TIMESTEP_NAMES = ("timestep", "timesteps", "t", "timestep_ratio")
"""Argument names under which networks take the time."""

HALF = (torch.float16, torch.bfloat16)

EXACT = 2.0**-21
"""Tolerance for timesteps of an integer type, float32 or float64, relative to the table's largest entry.

Tables are float32, and two libraries may round a timestep to float32 in different ways."""

UNIT = 1000.0
"""Timesteps per unit of time. Flow-matching pipelines divide by it after they round to a half type."""

PENDING = 16
"""Number of lookups on an accelerator, outside of a run, after which their results are read."""


def nearest_rows(timestep: Tensor, table: Tensor) -> Tensor:
    """Return the row `[n]` of `table` `[T]` that is nearest to each `timestep` `[n]` of the same dtype. Traceable."""
    return (timestep[:, None] - table).abs().argmin(1)


def look_up(timestep: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Return the row `[n]`, int64, of each `timestep` `[n]` in `table` `[T]`, and whether the table lacks it, `[n]`, bool.

    A timestep of an integer type, float32 or float64 is in the table when an entry differs by rounding alone. One of a half
    type is in it when exactly one entry rounds to it, directly or before the division by 1000. Every other timestep takes
    the nearest row, and so does NaN, which counts as missing. No operation waits for the device.
    """
    wide = torch.float32 if timestep.device.type == "mps" else torch.float64
    exact, rows = timestep.to(wide), table.to(timestep.device, wide)
    distance = (exact[:, None] - rows).abs()
    least, nearest = distance.min(1)
    if timestep.dtype not in HALF:
        return nearest, ~(least <= EXACT * rows.abs().max())
    dtype = timestep.dtype
    same = (rows.to(dtype) == timestep[:, None]) | ((rows * UNIT).to(dtype) / UNIT == timestep[:, None])
    known = same.sum(1) == 1
    return torch.where(known, same.to(torch.uint8).argmax(1), nearest), ~known


class StepRun:
    """Counts of the timesteps that networks received during one run: all of them, and the uncalibrated ones."""

    def __init__(self) -> None:
        self.asked: set[float] = set()
        self.missed: dict[float, float] = {}
        self.calibrated = 0
        self.indices: dict[int, StepIndex] = {}

    def warning(self) -> str | None:
        """Return the warning for the end of the run; None when every timestep was calibrated."""
        for index in self.indices.values():
            index.read_pending(self)
        if not self.missed:
            return None
        examples = ", ".join(f"{value:g}" for value in sorted(self.missed, reverse=True)[:4])
        more = ", ..." if len(self.missed) > 4 else ""
        return (
            f"{len(self.missed)} of the {len(self.asked)} timesteps of this run are not among the {self.calibrated} "
            f"calibrated ones ({examples}{more}), {_distance(max(self.missed.values()))}. {_COST}"
        )


_COST = (
    "Each takes the quantizers of the nearest calibrated step. Their ranges do not fit it, so images lose detail or "
    "contrast, more with the distance. Sample with the calibrated sampler and number of steps, or run `dqtool calibrate` "
    "with these."
)

_RUN: ContextVar[StepRun | None] = ContextVar("dqtool_step_run", default=None)


@contextlib.contextmanager
def step_run() -> Iterator[StepRun]:
    """Open a run of a sampler, such as a pipeline's call; one warning at its end reports all missed timesteps.

    A run inside another one belongs to it. Calls of a network outside of any run warn at the first missed timestep.
    """
    outer = _RUN.get()
    if outer is not None:
        yield outer
        return
    run = StepRun()
    token = _RUN.set(run)
    try:
        yield run
    finally:
        _RUN.reset(token)
        text = run.warning()
        if text is not None:
            warnings.warn(text, DqtoolWarning, stacklevel=4)


_CALIBRATED: ContextVar[bool] = ContextVar("dqtool_calibrated_points", default=False)


@contextlib.contextmanager
def calibrated_points() -> Iterator[None]:
    """Call networks at calibrated points alone, such as those of a trajectory. No lookup is noted, so that none is read."""
    token = _CALIBRATED.set(True)
    try:
        yield
    finally:
        _CALIBRATED.reset(token)


class StepIndex:
    """Row of the step tables for each sample of the current batch. All layers of a network share one index.

    `timesteps` is `[T]`, in any order, each value once. The first row is used until `set` or `select` is called. `missed`
    holds every timestep that was looked up and is not in the table. With `static` the tables have one row that serves
    all timesteps, and none is missed.
    """

    def __init__(self, timesteps: Tensor, static: bool = False) -> None:
        self.static = static
        self._rows = torch.zeros(1, dtype=torch.long)
        self._moved = self._rows
        self._missed: set[float] = set()
        self._warned = False
        self._pending: list[tuple[Tensor, Tensor]] = []
        self.load(timesteps)
        self._key = _register(self)

    def load(self, timesteps: Tensor) -> None:
        """Set the table to `timesteps` `[T]`."""
        self.timesteps = timesteps.detach().double().cpu()
        self._tables: dict[torch.device, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to copy or pickle, without locks and other parts of this object alone."""
        return {**self.__dict__, "_key": None, "_tables": {}, "_pending": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state of another index as an independent copy."""
        self.__dict__.update(state)
        self._missed = set(self._missed)
        self._key = _register(self)

    def set(self, timestep: Tensor | float | int, table: Tensor | None = None) -> None:
        """Look up `timestep`: a scalar, or `[N]` for a batch of mixed steps.

        `table` is the same table as a buffer of the network, which moves with it. A graph reads it where it is on the device of
        the timestep: a table in main memory would be copied, and waited for, in each call.

        Raises:
            NumericError: a timestep is NaN or infinite. Not raised on an accelerator, where reading it would wait.
        """
        if isinstance(timestep, float):
            timestep = torch.tensor(timestep, dtype=torch.float64)
        asked = torch.as_tensor(timestep).detach()
        asked = asked.reshape(1) if asked.dim() == 0 else asked[:1] if _is_expanded(asked) else asked.reshape(-1)
        if torch.compiler.is_compiling():
            # Without `table_on`, whose memory changes: what a graph reads of it, it is compiled for.
            if table is None or table.device != asked.device or table.dtype in HALF:
                table = self.timesteps.to(asked.device)
            self.select(torch.ops.dqtool.step_rows(asked, table, self._key))
            return
        rows = self.find(asked)
        if rows.device.type == "cpu" and len(rows) > 1 and bool((rows == rows[:1]).all()):
            rows = rows[:1]
        self.select(rows)

    def find(self, timestep: Tensor) -> Tensor:
        """Return the rows `[n]` of `timestep` `[n]`, and note which of them are missing from the table."""
        if timestep.device.type == "cpu" and not bool(timestep.isfinite().all()):
            raise NumericError(
                "The timestep is not a finite number", where="the network's argument timestep", fix="Check the sampler"
            )
        rows, missed = look_up(timestep, self.table_on(timestep.device))
        if self.static or _CALIBRATED.get():
            return rows
        run = _RUN.get()
        if run is not None:
            run.calibrated = len(self.timesteps)
            run.indices[id(self)] = self
        if _capturing():  # the graph owns this memory, and overwrites it in each replay
            return rows
        self._pending.append((timestep, missed))
        if timestep.device.type == "cpu" or (run is None and len(self._pending) >= PENDING):
            self.read_pending(run)
        return rows

    def read_pending(self, run: StepRun | None = None) -> None:
        """Read the results of all pending lookups and report missed timesteps to `run`, or warn where there is none."""
        pending, self._pending = self._pending, []
        for values, is_missed in _read_together(pending):
            lost = [value for value, missed in zip(values, is_missed, strict=True) if missed]
            self._missed.update(lost)
            if run is not None:
                run.asked.update(values)
                run.missed.update({value: self._steps_away(value) for value in lost})
            elif lost and not self._warned:
                self._warned = True
                warnings.warn(
                    f"timestep {lost[0]:g} is not among the {len(self.timesteps)} calibrated ones, "
                    f"{_distance(self._steps_away(lost[0]))}. {_COST}",
                    DqtoolWarning,
                    stacklevel=4,
                )

    @property
    def missed(self) -> Set[float]:
        """Timesteps that were looked up and are not in the table."""
        self.read_pending(_RUN.get())
        return self._missed

    def table_on(self, device: torch.device) -> Tensor:
        """Return the table `[T]` on `device`, moved there once, in float64 (float32 on devices without float64)."""
        found = self._tables.get(device)
        if found is None:
            with torch.inference_mode(False):
                found = self.timesteps.to(device, torch.float32 if device.type == "mps" else torch.float64)
            self._tables[device] = found
        return found

    def select(self, rows: Tensor) -> None:
        """Use these rows of the tables, `[N]` (or `[1]` for all samples)."""
        self._rows = self._moved = rows

    @property
    def rows(self) -> Tensor:
        """The rows in use, on the device where they were looked up."""
        return self._rows

    def rows_for(self, x: Tensor) -> Tensor:
        """Return the rows in use on the device of `x`. They move once for all layers."""
        if self._moved.device != x.device:
            # A graph would keep the pinned memory of such a copy, and replay its numbers.
            fixed = torch.compiler.is_compiling() or _capturing()
            self._moved = self._rows.to(x.device) if fixed else to_device(self._rows, x.device)
        return self._moved

    def _steps_away(self, value: float) -> float:
        """Return the distance of `value` from the nearest entry, in units of the local step; infinite for a single entry."""
        distance = (self.timesteps - value).abs()
        row = int(distance.argmin())
        others = (self.timesteps - self.timesteps[row]).abs()
        others = others[others > 0]
        return float(distance[row] / others.min()) if len(others) else float("inf")


_INDICES: weakref.WeakValueDictionary[int, StepIndex] = weakref.WeakValueDictionary()
_COUNT = itertools.count()
_PROCESS = int.from_bytes(os.urandom(4), "little") >> 1 << 32


def _register(index: StepIndex) -> int:
    """Return a number under which a compiled graph of this process finds `index`."""
    key = _PROCESS + next(_COUNT)
    _INDICES[key] = index
    return key


@torch.library.custom_op("dqtool::step_rows", mutates_args=())
def _step_rows(timestep: Tensor, table: Tensor, key: int) -> Tensor:
    """Run `StepIndex.find` as one operation of a compiled graph.

    On an accelerator missed timesteps are not noted: `torch.compile(mode="reduce-overhead")` gives the operation memory that a CUDA
    graph owns, and refuses to go on while someone keeps some of it.
    """
    index = _INDICES.get(key)
    if index is None or timestep.device.type != "cpu":
        return look_up(timestep, table)[0]
    return index.find(timestep)


@_step_rows.register_fake
def _(timestep: Tensor, table: Tensor, key: int) -> Tensor:
    return torch.empty_like(timestep, dtype=torch.long)


def step_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Pass the root's timestep argument to its `StepIndex`. A forward pre-hook (`with_kwargs=True`).

    The index is looked up on the module, not captured, so that a deep copy of the network keeps its own.
    """
    name, position = time_argument(type(module).forward)
    timestep = kwargs[name] if name in kwargs else args[position]
    module.__dict__["_dqtool_steps"].set(timestep, getattr(module, "timesteps", None))


@functools.cache
def time_argument(forward: Callable[..., Any]) -> tuple[str, int]:
    """Return name and position, `self` not counted, of the time among the arguments of a network's forward."""
    names = list(inspect.signature(forward).parameters)
    found = next((name for name in TIMESTEP_NAMES if name in names), None)
    return ("timestep", 1) if found is None else (found, names.index(found) - 1)


def _read_together(pending: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[list[float], list[bool]]]:
    """Yield timesteps and whether each is missed, lookup by lookup. What lies on one device is copied, and waited for, at once."""
    for _, group in itertools.groupby(pending, lambda each: each[0].device):
        entries = list(group)
        wide = torch.float32 if entries[0][0].device.type == "mps" else torch.float64
        both = [torch.stack([timestep.to(wide), missed.to(wide)]) for timestep, missed in entries]
        values, missed = torch.cat(both, 1).cpu().tolist()
        first = 0
        for timestep, _ in entries:
            last = first + len(timestep)
            yield values[first:last], [bool(each) for each in missed[first:last]]
            first = last


def _is_expanded(timestep: Tensor) -> bool:
    """Return whether `timestep` `[N]` is one expanded value, as pipelines pass it."""
    return timestep.dim() == 1 and timestep.shape[0] > 1 and timestep.stride(0) == 0


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _distance(steps: float) -> str:
    if steps == float("inf"):
        return "and one step alone was calibrated"
    return f"{steps:.2g} calibrated steps away from the nearest one at most"
