"""Artifacts: a safetensors file or a directory, with the manifest that says what it is. Imports no torch."""

from __future__ import annotations

from dqtool.artifacts.cache import cache_directory, keep_in_cache
from dqtool.artifacts.checkpoints import CallCheckpoints, Checkpoints
from dqtool.artifacts.committing import Written, commit, commit_directory, commit_report
from dqtool.artifacts.deferred import DeferredTensors
from dqtool.artifacts.files import sha256_file
from dqtool.artifacts.locking import clear_leftovers, lock, remove_pieces
from dqtool.artifacts.manifest import FORMAT, STAGES, Manifest, dqtool_version, environment
from dqtool.artifacts.outputs import OutputKind, check_outputs, check_outside, check_writable
from dqtool.artifacts.store import (
    ATTACHMENT,
    CARD,
    DIRECTORY_MANIFEST,
    Artifact,
    fingerprint,
    is_current,
    manifest_path,
    open_artifact,
    read_manifest,
)
from dqtool.artifacts.tensorfile import check_finite, read_header
from dqtool.artifacts.workspace import Workspace

__all__ = [
    "ATTACHMENT",
    "CARD",
    "DIRECTORY_MANIFEST",
    "FORMAT",
    "STAGES",
    "Artifact",
    "CallCheckpoints",
    "Checkpoints",
    "DeferredTensors",
    "Manifest",
    "OutputKind",
    "Workspace",
    "Written",
    "cache_directory",
    "check_finite",
    "check_outputs",
    "check_outside",
    "check_writable",
    "clear_leftovers",
    "commit",
    "commit_directory",
    "commit_report",
    "dqtool_version",
    "environment",
    "fingerprint",
    "is_current",
    "keep_in_cache",
    "lock",
    "manifest_path",
    "open_artifact",
    "read_header",
    "read_manifest",
    "remove_pieces",
    "sha256_file",
]
