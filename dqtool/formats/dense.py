"""`dense`: an ordinary float32 diffusers model whose weights have the quantized values. Activations stay float."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from dqtool.artifacts import Artifact, Manifest
from dqtool.artifacts.tensorfile import save_tensors
from dqtool.formats import Exported
from dqtool.formats.shapes import network_shapes, predicted_bytes
from dqtool.graph.tied_modules import restore_copies
from dqtool.models.components.export_layout import WEIGHTS
from dqtool.models.families import family_of
from dqtool.models.networks.checked_artifacts import checked_tensors
from dqtool.models.networks.packed import packed_network, plans_of
from dqtool.nn.prediction import NAME as PREDICTION
from dqtool.nn.surgery import quant_layers

__all__ = ["dense_state", "prepare"]


def prepare(distilled: Artifact) -> Exported:
    """Prepare dequantized weights. The manifest lists all layers as 32/32, because nothing runs at low bits."""
    manifest = distilled.manifest
    family = family_of(manifest.network.class_name, distilled.given)
    shapes = network_shapes(family, manifest.network.config)
    layers = [replace(layer, bits=(32, 32)) for layer in manifest.layers]
    # diffusers' classes expect a shared module under each of its names.
    state = restore_copies(
        dense_state(manifest, checked_tensors(distilled)), family.tied_modules(manifest.network.config)
    )

    def write(directory: Path) -> None:
        save_tensors(directory / WEIGHTS, state)

    return Exported(dict(manifest.network.config), layers, write, predicted_bytes(shapes))


def dense_state(manifest: Manifest, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the float network's state with every quantized weight dequantized and its dilation undone.

    Weights keep their quantized values; activations are no longer quantized.
    """
    network = packed_network(manifest.network.class_name, manifest.network.config, plans_of(manifest), tensors)
    layers = quant_layers(network)
    owned = {f"{name}.{key}" for name, layer in layers.items() for key in layer.state_dict()}
    tables = {f"{plan.info.name}." for plan in plans_of(manifest) if plan.info.kind == "attention"}
    state = {
        name: value
        for name, value in tensors.items()
        if name not in owned
        and name != "timesteps"
        and not name.startswith(f"{PREDICTION}.")  # corrections belong to quantized activations
        and not (name.endswith(("_scale", "_zero_point")) and name.startswith(tuple(tables)))
    }
    for name, layer in layers.items():
        state[f"{name}.weight"] = layer.float_weight()
        if layer.bias is not None:
            state[f"{name}.bias"] = layer.bias
    return state
