"""Float fake quantization, the reference of the other runtimes.

Weights are packed on disk and in memory, with a float32 copy from the first use on.
"""

from __future__ import annotations

from torch import nn

from dqtool.artifacts import Artifact
from dqtool.models.networks.loading import build_network
from dqtool.models.networks.packed import exported_tensors, is_static, packed_network, plans_of
from dqtool.models.networks.packed_checks import step_count
from dqtool.nn.call_lock import one_call_at_a_time

__all__ = ["available", "load"]


def load(artifact: Artifact) -> nn.Module:
    """Load the network of an exported directory; a dense export gives the plain float network."""
    manifest = artifact.manifest
    state = exported_tensors(artifact)
    if manifest.parameters.format == "dense":
        return build_network(manifest.network.class_name, manifest.network.config, state, artifact.given)
    return one_call_at_a_time(
        packed_network(
            manifest.network.class_name,
            manifest.network.config,
            plans_of(manifest),
            state,
            is_static(manifest, step_count(state)),
        )
    )


def available() -> str | None:
    """Return None: this runtime runs everywhere."""
    return None
