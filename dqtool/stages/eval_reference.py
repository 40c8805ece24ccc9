"""What `dqtool eval` compares with: the full-precision model, or an exported directory in its simulation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqtool import report
from dqtool.artifacts import Artifact, manifest_path, open_artifact
from dqtool.errors import ArtifactError, DqtoolError
from dqtool.models.sources.resolve import ModelSource, resolve_recorded

if TYPE_CHECKING:
    from torch import nn

__all__ = ["ExportedReference", "Reference", "find_reference", "reference_network"]


@dataclass(frozen=True)
class ExportedReference:
    """An exported directory that the artifact's samples are compared with: in the `simulate` runtime, so that what is left is
    what the other runtime changes."""

    artifact: Artifact

    @property
    def given(self) -> str:
        """Its path as it was given."""
        return self.artifact.given

    def sha256(self) -> str:
        """Of its contents."""
        return self.artifact.sha256


Reference = ModelSource | ExportedReference


def find_reference(given: str | None, artifact: Artifact) -> Reference | None:
    """The full-precision model to compare with, or the exported directory that was named; None when nothing was named and
    the model is no longer where it was.

    Raises:
        ArtifactError: it is not the model the artifact was made from, or made from another one.
    """
    recorded = artifact.manifest.model
    if given is not None and not given.startswith("zoo:") and Path(given).is_dir() and manifest_path(given).is_file():
        exported = open_artifact(given, ["export"])
        if exported.manifest.model["source_sha256"] != recorded["source_sha256"]:
            raise ArtifactError(
                "The reference was not made from the same model as this artifact", where=f"{given} and {artifact.given}"
            )
        return ExportedReference(exported)
    named = given or recorded["source"]
    try:
        source = resolve_recorded(recorded, given)
        digest = source.sha256()
    except DqtoolError:
        if given is not None:
            raise
        report.warn(f"the reference {named} is not there: figures against it are left out (name it with --reference)")
        return None
    if digest != recorded["source_sha256"]:
        raise ArtifactError(
            "The reference is not the model this artifact was made from",
            where=f"{named} and {artifact.given}",
            fix="Name the right one with --reference",
        )
    return source


def reference_network(reference: Reference, model: Mapping[str, Any]) -> nn.Module:
    """Its network, where this process computes; `model` is the artifact's entry in the manifest."""
    from dqtool.core.device import place
    from dqtool.models.networks.loading import build_network, load_weights
    from dqtool.runtimes import load

    if isinstance(reference, ExportedReference):
        return place(load(reference.given, "simulate"))
    return place(build_network(model["class"], model["config"], load_weights(reference), reference.given))
