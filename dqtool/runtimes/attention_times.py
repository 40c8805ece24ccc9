"""Times of int8 and half-precision attention that the `cuda` runtime measured on this machine's GPUs, as `$DQTOOL_CACHE` keeps them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from dqtool.artifacts import cache_directory, keep_in_cache
from dqtool.artifacts.reading import load_json
from dqtool.errors import DqtoolError, EnvironmentFault

__all__ = ["Choice", "keep", "kept", "summary"]


@dataclass(frozen=True)
class Choice:
    """One size of attention on one device: `size` names it, times are seconds of a call."""

    device: str
    size: str
    int8: float
    half: float

    @property
    def taken(self) -> str:
        """Return the faster one."""
        return "half precision" if self.half < self.int8 else "int8"


def kept(device: str, versions: str) -> dict[str, Choice]:
    """Return what was timed on a device with these versions of its libraries, by size."""
    try:
        return {each.size: each for each in _read(_file(device, versions))}
    except EnvironmentFault:
        return {}


def keep(device: str, versions: str, found: Iterable[Choice]) -> None:
    """Keep what was timed. Without a cache each process times anew."""
    text = json.dumps({"choices": [asdict(each) for each in found]}, indent=1)
    try:
        path = _file(device, versions)
    except EnvironmentFault:
        return
    keep_in_cache(path, lambda new: new.write_text(text, encoding="utf-8"))


def summary() -> list[str]:
    """Return a line for each device on this machine that was timed: which sizes of attention run in half precision."""
    try:
        files = sorted(cache_directory("attention").glob("*.json"))
    except (EnvironmentFault, OSError):
        return []
    lines: dict[str, str] = {}
    for file in files:
        found = _read(file)
        half = [each for each in found if each.taken != "int8"]
        if found:
            named = "; ".join(f"{each.size} ({each.int8 / each.half:.2f}x)" for each in half[:4])
            more = ", ..." if len(half) > 4 else ""
            what = f", in half precision, which is faster there: {named}{more}" if half else ""
            lines[found[0].device] = (
                f"attention on {found[0].device}: {len(found) - len(half)} of {len(found)} sizes in int8{what}"
            )
    return list(lines.values())


def _read(path: Path) -> list[Choice]:
    try:
        rows = load_json(path)["choices"]
        return [Choice(str(r["device"]), str(r["size"]), float(r["int8"]), float(r["half"])) for r in rows]
    except (DqtoolError, OSError, ValueError, KeyError, TypeError):
        return []


def _file(device: str, versions: str) -> Path:
    identity = repr((1, device, versions))
    return cache_directory("attention") / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"
