"""`dqtool zoo`: the embedded models, and writing one as an ordinary diffusers pipeline directory.

Each model is a directory in the package: a diffusers pipeline with float16 weights and a `card.json` with its name's
`description`, what published model it is `like`, and its `figures`. A new directory is a new model.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from dqtool import report
from dqtool.artifacts import check_outside, lock, read_header
from dqtool.artifacts.files import fsync_path, os_fault, sha256_file, staging, swap_in, target_of
from dqtool.artifacts.reading import CONFIG_BYTES, load_json, read_file
from dqtool.errors import EnvironmentFault
from dqtool.models.components.companion_files import config_in_float32
from dqtool.models.sources import resolve
from dqtool.stages.options.zoo import ZooGetOptions
from dqtool.stages.shared.settings import Execution, RunSettings

__all__ = ["CARD", "get_model", "list_models", "plan_get", "render"]

CARD = "card.json"
HALVES = ("F16", "BF16")


def list_models() -> list[dict[str, Any]]:
    """Return each embedded model: name, class, parameters of all its networks, bytes as packaged, and its card."""
    models = []
    for directory in sorted(resolve.ZOO.iterdir()) if resolve.ZOO.is_dir() else []:
        if (directory / "model_index.json").is_file():
            source = resolve.resolve_model(f"zoo:{directory.name}")
            headers = [read_header(path) for path in directory.rglob("*.safetensors")]
            models.append(
                {
                    "name": directory.name,
                    "class": source.class_name,
                    "parameters": sum(prod(entry["shape"]) for header in headers for entry in header.values()),
                    "bytes": sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()),
                    **_card(directory),
                }
            )
    return models


def render(models: Sequence[dict[str, Any]]) -> list[str]:
    """Return the list as lines of text."""
    rows = [
        (m["name"], m["class"], f"{m['parameters']:,}", f"{m['bytes'] / 1e6:.2f} MB", m.get("description", ""))
        for m in models
    ]
    return report.table_lines(["name", "family", "parameters", "size", "description"], rows)


def get_model(options: ZooGetOptions, settings: RunSettings) -> str:
    """Write the model's pipeline directory, floats as float32; returns its path as given.

    Raises:
        EnvironmentFault: there is no such model, or the directory holds anything but this very model. With --overwrite
            its files may differ, as long as their names are the model's.
        UsageError: the directory lies in the packaged model, or holds it.
    """
    source = _find(options.name)
    target = target_of(options.path)
    check_outside(target, [source], options.path)
    try:
        with lock(target), staging(target) as area:
            new = area / "new"
            _write_pipeline(source, new)
            cached = not settings.force and _same_content(new, target)
            if not cached:
                _refuse_occupied(target, options.path, overwrite=settings.overwrite and _same_names(new, target))
                swap_in(area, [(new, target)])
    except OSError as error:
        raise os_fault(error, options.path) from error
    report.say(f"zoo: {'cached' if cached else 'wrote'} {options.path}")
    settings.log.append(Execution("zoo get", options.path, {"name": options.name}, [], cached))
    return options.path


def plan_get(options: ZooGetOptions) -> dict[str, Any]:
    """Return the files that `get_model` would write."""
    source = _find(options.name)
    target = target_of(options.path)
    files = [path.relative_to(source) for path in _files(source)]
    occupied = target.exists() and (not target.is_dir() or any(target.iterdir()))
    return {
        "model": f"zoo:{source.name}",
        "output": options.path,
        "files": ", ".join(path.as_posix() for path in files),
        "state": "there is something; only this very model may be" if occupied else "free",
    }


def _find(name: str) -> Path:
    source = resolve.resolve_model(f"zoo:{name.removeprefix('zoo:')}")
    assert source.pipeline is not None
    return source.pipeline


def _files(source: Path) -> list[Path]:
    return sorted(path for path in source.rglob("*") if path.is_file() and path.name != CARD)


def _write_pipeline(source: Path, new: Path) -> None:
    """Copy a pipeline directory, half-precision tensors as float32 under the name that needs no `variant`."""
    for path in _files(source):
        target = new / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            from dqtool.artifacts.tensorfile import load_tensors, save_tensors

            halves = {name for name, entry in read_header(path).items() if entry["dtype"] in HALVES}
            tensors = {name: t.float() if name in halves else t for name, t in load_tensors(path).items()}
            target = target.with_name(target.name.replace(".fp16.", "."))
            save_tensors(target, tensors)
        elif path.name == "config.json":
            target.write_bytes(config_in_float32(read_file(path, CONFIG_BYTES)))
        else:
            shutil.copyfile(path, target)
        os.chmod(target, 0o666 & ~_umask())  # safetensors makes its files private
        fsync_path(target)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _same_content(new: Path, target: Path) -> bool:
    return _same_names(new, target) and all(
        sha256_file(path) == sha256_file(target / path.relative_to(new)) for path in new.rglob("*") if path.is_file()
    )


def _same_names(new: Path, target: Path) -> bool:
    def names(directory: Path) -> set[str]:
        return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}

    return target.is_dir() and not target.is_symlink() and names(new) == names(target)


def _refuse_occupied(target: Path, given: str, *, overwrite: bool) -> None:
    if target.is_dir() and not target.is_symlink():
        if not any(target.iterdir()) or overwrite:
            return
        raise EnvironmentFault(
            "This directory is not empty and holds something else than this model",
            where=given,
            fix="Choose a new directory with -o, or empty this one",
        )
    if os.path.lexists(target):
        raise EnvironmentFault("This exists and is not a directory", where=given, fix="Choose another -o")


def _card(directory: Path) -> dict[str, Any]:
    path = directory / CARD
    return load_json(path) if path.is_file() else {}
