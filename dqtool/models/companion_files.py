"""Which files of a pipeline directory belong to the components beside the quantized network. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dqtool.artifacts import sha256_file
from dqtool.artifacts.reading import json_object

__all__ = ["CARD", "companion_digest", "companion_files", "config_in_float32"]

CARD = "sampling.json"
"""File beside `model_index.json` that says how to sample: `{"guidance": 1.5, "prompts": [["a handwritten seven", 7]]}`."""

OTHER_WEIGHTS = (".bin", ".msgpack", ".h5", ".onnx", ".onnx_data", ".ckpt", ".pt", ".pth", ".xml")


def companion_files(pipeline: Path, index: Mapping[str, Any], component: str) -> dict[str, Path]:
    """Relative name to path of every file of the other components (not the scheduler), and of the card of a pipeline
    that has any. Of weights stored in several forms only the safetensors without a variant."""
    found: dict[str, Path] = {}
    for name, entry in index.items():
        if not isinstance(entry, list) or name in (component, "scheduler"):
            continue
        files = [path for path in sorted((pipeline / name).rglob("*")) if path.is_file() and path.name[0] != "."]
        tensors = {path.name for path in files if path.suffix == ".safetensors"}
        for path in files:
            parts = path.name.split(".")
            plain = f"{parts[0]}.{parts[-1]}"
            if tensors and path.name.endswith(OTHER_WEIGHTS):
                continue
            if path.name in tensors and len(parts) > 2 and plain in tensors:
                continue
            found[path.relative_to(pipeline).as_posix()] = path
    if found:
        found |= {CARD: pipeline / CARD} if (pipeline / CARD).is_file() else {}
    return found


def companion_digest(pipeline: Path, index: Mapping[str, Any], component: str) -> str:
    """Hex digest over those files; "" for a pipeline without any."""
    files = companion_files(pipeline, index, component)
    if not files:
        return ""
    lines = [f"{name} {sha256_file(path)}" for name, path in sorted(files.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def config_in_float32(content: bytes) -> bytes:
    """A config.json that names no other precision than float32 for its weights; as it is where it names none."""
    config = json_object(content, "config.json")
    changed = {key: "float32" for key in ("dtype", "torch_dtype") if config.get(key, "float32") != "float32"}
    return json.dumps(config | changed, indent=2).encode() + b"\n" if changed else content
