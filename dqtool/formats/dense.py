"""`dense`: an ordinary float32 diffusers model whose weights have the quantized values; activations stay float."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dqtool.artifacts import Artifact, Manifest
from dqtool.artifacts.tensorfile import save_tensors
from dqtool.core.cost import file_bytes
from dqtool.core.dilation import broadcast_scale
from dqtool.formats import Exported
from dqtool.formats.shapes import network_shapes, swapped
from dqtool.graph.tied_modules import restore_copies
from dqtool.models.components.export_layout import WEIGHTS
from dqtool.models.families import family_of
from dqtool.models.networks.packed import packed_network, plans_of
from dqtool.nn.prediction import NAME as PREDICTION
from dqtool.nn.surgery import quant_layers

__all__ = ["dense_state", "prepare"]


def prepare(distilled: Artifact) -> Exported:
    """Dequantized weights; as the manifest says, nothing in it runs at low bits."""
    manifest = distilled.manifest
    family = family_of(manifest.model["class"], distilled.given)
    shapes = network_shapes(family, manifest.model["config"])
    layers = [{**layer, "bits": [32, 32]} for layer in manifest.layers]
    # diffusers' plain classes know nothing of modules that are stored once.
    state = restore_copies(dense_state(manifest, distilled.tensors()), family.tied_modules(manifest.model["config"]))

    def write(directory: Path) -> None:
        save_tensors(directory / WEIGHTS, state)

    return Exported(dict(manifest.model["config"]), layers, write, file_bytes(swapped(shapes)))


def dense_state(manifest: Manifest, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The float network's state with every quantized weight dequantized and its dilation undone: weights keep their
    4-bit values, activations are no longer quantized."""
    network = packed_network(manifest.model["class"], manifest.model["config"], plans_of(manifest), tensors)
    layers = quant_layers(network)
    owned = {f"{name}.{key}" for name, layer in layers.items() for key in layer.state_dict()}
    tables = {f"{plan.info.name}." for plan in plans_of(manifest) if plan.info.kind == "attention"}
    state = {
        name: value
        for name, value in tensors.items()
        if name not in owned
        and name != "timesteps"
        and not name.startswith(f"{PREDICTION}.")  # what quantized activations did to predictions is not there
        and not (name.endswith(("_scale", "_zero_point")) and name.startswith(tuple(tables)))
    }
    for name, layer in layers.items():
        weight = layer.quantized_weight()
        if layer.dilation is not None:
            weight = weight / broadcast_scale(layer.dilation, weight, layer.groups)
        state[f"{name}.weight"] = weight
        if layer.bias is not None:
            state[f"{name}.bias"] = layer.bias
    return state
