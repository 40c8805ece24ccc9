"""Reference of `dqtool eval`: the full-precision model, or an exported directory in the `simulate` runtime."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dqtool import report
from dqtool.artifacts import Artifact, manifest_path, open_artifact
from dqtool.artifacts.named import may_read
from dqtool.artifacts.records import ModelRecord
from dqtool.errors import ArtifactError, DqtoolError
from dqtool.models.sources.resolve import ModelSource, recorded_parts, resolve_recorded

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
    """Return the full-precision model or the exported directory to compare with.

    Without `given` it is the recorded model, if that lies beside the artifact or the user named it before on this machine
    (`dqtool.artifacts.named`); else None. An artifact from elsewhere chooses no path that is read.

    Raises:
        ArtifactError: the artifact was not made from this model, or records a part of it (a LoRA, a config) in a place that
            the user never named.
    """
    recorded = artifact.manifest.network
    if given is not None and not given.startswith("zoo:") and Path(given).is_dir() and manifest_path(given).is_file():
        exported = open_artifact(given, ["export"])
        if exported.manifest.network.source_sha256 != recorded.source_sha256:
            raise ArtifactError(
                "The reference was not made from the same model as this artifact", where=f"{given} and {artifact.given}"
            )
        return ExportedReference(exported)
    named = given or recorded.source
    beside = [artifact.given] if given is None else [artifact.given, given, os.path.join(given, "x")]
    parts = recorded_parts(recorded) if given is not None else [named, *recorded_parts(recorded)]
    strange = next((part for part in parts if not may_read(part, beside)), None)
    if strange is not None and given is not None:
        raise ArtifactError(
            f"The artifact names {strange!a:.200} as a part of its model, which was not named on this machine",
            where=artifact.given,
            fix="Copy that file beside the artifact, or run `dqtool dilate` with it here",
        )
    if strange is not None:
        report.warn(
            f"the artifact names {strange!a:.200} as its reference, which was not named on this machine: figures against it "
            "are left out (name it with --reference)"
        )
        return None
    try:
        source = resolve_recorded(recorded, given)
        digest = source.sha256()
    except DqtoolError:
        if given is not None:
            raise
        report.warn(f"the reference {named} is not there: figures against it are left out (name it with --reference)")
        return None
    if digest != recorded.source_sha256:
        raise ArtifactError(
            "The reference is not the model this artifact was made from",
            where=f"{named} and {artifact.given}",
            fix="Name the right one with --reference",
        )
    return source


def reference_network(reference: Reference, model: ModelRecord) -> nn.Module:
    """Return the network of a reference on the chosen device. `model` is the entry of the artifact's manifest."""
    from dqtool.core.device import place
    from dqtool.models.networks.loading import build_network, load_weights
    from dqtool.runtimes import load

    if isinstance(reference, ExportedReference):
        return place(load(reference.given, "simulate"))
    return place(build_network(model.class_name, model.config, load_weights(reference), reference.given))
