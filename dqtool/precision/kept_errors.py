"""Cache of measured errors: every choice of bits for one calibrated artifact needs the same measurement."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from dqtool import distributed, report
from dqtool.artifacts import cache_directory, dqtool_version, keep_in_cache
from dqtool.artifacts.reading import MANIFEST_BYTES, load_json
from dqtool.core.device import chosen_device
from dqtool.errors import DqtoolError, EnvironmentFault
from dqtool.precision.sensitivity import Errors

__all__ = ["kept_errors"]

VERSION = 1
"""Version of the measurement. Another one makes errors be measured again."""


def kept_errors(about: Mapping[str, Any], make: Callable[[], Errors]) -> Errors:
    """Return the errors of `make()`, from the cache if it holds those of an equal `about` and of the same versions.

    `about` identifies the measurement. Where several processes share a command, all of them return those of the main one,
    and so choose the same bits. A cache that can't be read or written costs time and nothing else.
    """
    versions = {
        "version": VERSION,
        "dqtool": dqtool_version(),
        "torch": torch.__version__,
        "device": str(chosen_device()),
    }
    identity = json.dumps({**about, **versions}, sort_keys=True)
    name = f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"
    try:
        path = cache_directory("errors") / name
    except EnvironmentFault:
        path = None
    found = distributed.broadcast(_read(path) if distributed.is_main() and path is not None else None)
    if found is not None:
        report.say("sensitivity: errors from the cache")
        return found
    errors = distributed.broadcast(make())
    if path is not None:
        rows = [[layer, operand, by_bits] for (layer, operand), by_bits in errors.items()]
        keep_in_cache(path, lambda new: new.write_text(json.dumps({"errors": rows}), encoding="utf-8"))
    return errors


def _read(path: Path) -> Errors | None:
    """Return the errors that a file holds; None where it is missing or can't be read."""
    if not path.is_file():
        return None
    try:
        return _from_json(load_json(path, MANIFEST_BYTES)["errors"])
    except (DqtoolError, OSError, ValueError, KeyError, TypeError):
        report.warn(f"the cached errors {path} can't be read and are measured again")
        return None


def _from_json(rows: Any) -> Errors:
    """Return errors from their JSON form; raises `ValueError` or `TypeError` for another one."""
    return {
        (str(layer), str(operand)): {int(bits): float(error) for bits, error in dict(by_bits).items()}
        for layer, operand, by_bits in rows
    }
