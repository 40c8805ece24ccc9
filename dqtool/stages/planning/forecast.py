"""Forecast of a quantized network from its config alone: layers with their bits, bytes, bit operations.

The network is built and run on shapes (the `meta` device), so a forecast of Stable Diffusion takes seconds and no weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from dqtool.artifacts.jsonvalues import ForeignConfig
from dqtool.artifacts.schema import Record
from dqtool.core.quantization import QuantizationSpec
from dqtool.stages.planning.records import PlannedLayer

__all__ = ["Forecast", "forecast"]


@dataclass(frozen=True)
class Forecast(Record):
    """Counts of a network that is yet to be quantized; `bops` and `macs` are of one forward pass of one sample."""

    network: str
    parameters: int
    bytes: int
    bytes_float32: int
    bops: int
    bops_float32: int
    macs: int
    layers: list[PlannedLayer]


def forecast(
    class_name: str,
    config: ForeignConfig,
    spec: QuantizationSpec,
    steps: int,
    dilated: bool = True,
    corrected: bool = False,
    low_rank: int = 0,
) -> Forecast:
    """Return counts of the network that `distill --bits W/A` and `export` would make, with tables for `steps` steps.

    `corrected` adds the tables that correct predictions, `low_rank` branches of that rank.

    `parameters` are those of the float network, what the class builds repeatedly counted once; `bops` and `macs` are of
    one forward pass of one sample. `bytes` is exact when every layer is `dilated`, an upper bound when some are not.

    Raises:
        ArtifactError: no family serves the class, or diffusers refuses the config.
        UsageError: a `--keep` pattern matches no layer.
    """
    import torch

    from dqtool.core.cost import bops, float_bops
    from dqtool.formats.shapes import predicted_bytes
    from dqtool.graph.tied_modules import tie_modules
    from dqtool.models.families import family_of
    from dqtool.models.networks.packed import layer_record, planned_record
    from dqtool.nn.assignment import apply_preset, assign_bits, with_branches
    from dqtool.nn.prediction import row_shapes
    from dqtool.nn.surgery import state_shapes

    family = family_of(class_name, "model config, key _class_name")
    with torch.device("meta"):
        network = family.build(config)
    copies = tuple(f"{copy}." for copy, _ in family.tied_modules(config))
    names = [name for name in network.state_dict() if not (copies and name.startswith(copies))]
    tie_modules(network, names, family.tied_modules(config))
    graph = family.graph(network, config)
    layers = graph.trace.layers
    spec = apply_preset(spec, layers, lambda: graph.roles)
    scaled = [info.name for info in layers if info.kind != "attention"] if dilated else []
    plans = with_branches(assign_bits(layers, spec, scaled), low_rank)
    shapes = {n: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in network.state_dict().items()}
    tables = row_shapes(family.prediction_row(config)) if corrected else None
    return Forecast(
        network=class_name,
        parameters=sum(prod(shape) for shape, _ in shapes.values()),
        bytes=predicted_bytes(state_shapes(shapes, plans, steps, tables)),
        bytes_float32=predicted_bytes(shapes),
        bops=bops(map(planned_record, plans)),
        bops_float32=float_bops(map(layer_record, layers)),
        macs=sum(info.macs for info in layers),
        layers=[PlannedLayer.of(plan) for plan in plans],
    )
