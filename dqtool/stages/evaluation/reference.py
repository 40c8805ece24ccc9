"""Reference of `dqtool eval`: the full-precision model, or an exported directory in the `simulate` runtime."""

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
    """Exported directory as the reference. It runs in `simulate`, so that figures show the effect of the artifact's runtime."""

    artifact: Artifact

    @property
    def given(self) -> str:
        """Path as the user typed it."""
        return self.artifact.given

    def sha256(self) -> str:
        """Return the digest of the directory's contents."""
        return self.artifact.sha256


Reference = ModelSource | ExportedReference


def find_reference(given: str | None, artifact: Artifact) -> Reference | None:
    """Return the full-precision model or the exported directory to compare with. None if `given` is None and the model is no
    longer at its recorded place.

    Raises:
        ArtifactError: the artifact was not made from this model.
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
    """Return the network of a reference on the chosen device. `model` is the entry of the artifact's manifest."""
    from dqtool.core.device import place
    from dqtool.models.networks.loading import build_network, load_weights
    from dqtool.runtimes import load

    if isinstance(reference, ExportedReference):
        return place(load(reference.given, "simulate"))
    return place(build_network(model["class"], model["config"], load_weights(reference), reference.given))
