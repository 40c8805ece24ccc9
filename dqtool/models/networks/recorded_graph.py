"""Graph of an artifact's network, recorded at most once per process."""

from __future__ import annotations

import json
from functools import lru_cache

import torch

from dqtool.artifacts import Manifest
from dqtool.graph.network import NetworkGraph
from dqtool.graph.tied_modules import tie_modules
from dqtool.models.families import family_of
from dqtool.models.networks.loading import materialise

__all__ = ["graph_of"]


def graph_of(manifest: Manifest) -> NetworkGraph:
    """Return the graph of the float network that a manifest describes, without its weights.

    Raises:
        ArtifactError: the network's class has no family, or diffusers refuses its config.
    """
    config = json.dumps(manifest.network.config, sort_keys=True)
    return _graph(manifest.network.class_name, config, tuple(layer.name for layer in manifest.layers))


@lru_cache(maxsize=2)
def _graph(class_name: str, config_text: str, layers: tuple[str, ...]) -> NetworkGraph:
    config = json.loads(config_text)
    family = family_of(class_name, "manifest, key model.class", config)
    with torch.device("meta"):
        network = tie_modules(family.build(config), [f"{name}.weight" for name in layers], family.tied_modules(config))
    if family.name == "generic":  # its forward may look at positions
        materialise(network, family, config)
    return family.graph(network, config)
