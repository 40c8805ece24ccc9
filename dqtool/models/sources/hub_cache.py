"""Models named by Hub id, read from the local cache of huggingface_hub or downloaded. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from dqtool.errors import ArtifactError, EnvironmentFault

__all__ = ["cached_file", "hub_snapshot", "is_hub_id"]

T = TypeVar("T")

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".json")
_PATTERNS = ["*.json", "*/*.json", "*/*.txt", "*/*.model", "*.safetensors", "*/*.safetensors"]
_NEVER = ["*/*.onnx*", "*flax*", "safety_checker/*"]
_NOT = ["*.fp16.*", "*.bf16.*", "*non_ema*", *_NEVER]


def is_hub_id(given: str) -> bool:
    """Return whether `given` has the form of a Hub id, `org/name` or `org/name@revision`; the Hub is not asked."""
    return _ID.fullmatch(given) is not None and not given.endswith(_FILES)


def hub_snapshot(given: str, variant: str | None, use: Callable[[Path], T]) -> T:
    """Return `use(directory)` for the model's files: cached ones where `use` accepts them, else downloaded ones.

    The download holds the weights without a variant, or those of `variant`; where `use` rejects them, all weights.

    `HF_HUB_CACHE` or `HF_HOME` set the place of the cache; `HF_HUB_OFFLINE=1` forbids downloads.

    Raises:
        EnvironmentFault: the model is not in the cache and can't be downloaded.
        ArtifactError: the files are no model that dqtool reads.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = given.partition("@")
    where: dict[str, Any] = {"repo_id": name, "revision": revision or None, "cache_dir": _cache()}
    incomplete: ArtifactError | None = None
    try:
        return use(Path(snapshot_download(**where, local_files_only=True)))
    except (LocalEntryNotFoundError, HFValidationError):
        pass
    except ArtifactError as error:  # a snapshot may lack some of the files
        incomplete = error
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        raise incomplete or _absent(given, "and HF_HUB_OFFLINE forbids downloads")
    try:
        # Prefer the diffusers form of a repository that also has single-file checkpoints at its root.
        top = Path(snapshot_download(**where, allow_patterns=["*.json"]))
        single = ["*.safetensors"] if not (top / "model_index.json").exists() else []
        patterns = [pattern for pattern in _PATTERNS if pattern != "*.safetensors"] + single
        unwanted = _NOT if variant is None else [pattern for pattern in _NOT if variant not in pattern]
        path = Path(snapshot_download(**where, allow_patterns=patterns, ignore_patterns=unwanted))
        try:
            return use(path)
        except ArtifactError:
            path = Path(snapshot_download(**where, allow_patterns=[*patterns, "*/*.bin"], ignore_patterns=_NEVER))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise incomplete or _absent(given, f"and the download from the Hub failed: {reason[:200]}") from error
    return use(path)


def cached_file(name: str, file: str) -> Path | None:
    """Return the path of a model's file in the local cache; None where it is not cached."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, file, cache_dir=_cache())
    return Path(found) if isinstance(found, str) else None


def _cache() -> str | None:
    """Return the cache's directory by huggingface_hub's rules, with the environment read at the time of the call."""
    if os.environ.get("HF_HUB_CACHE"):
        return os.environ["HF_HUB_CACHE"]
    home = os.environ.get("HF_HOME")
    return os.path.join(os.path.expanduser(home), "hub") if home else None


def _absent(given: str, why: str) -> EnvironmentFault:
    return EnvironmentFault(
        f"There is no such file or directory, the local Hub cache has no model of this name, {why}",
        where=given,
        fix="Check the spelling, give a path, or download the model first (`hf download` on a machine with network)",
    )
