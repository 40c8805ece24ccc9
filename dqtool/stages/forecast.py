"""What quantizing a network will give, from its config alone: layers with their bits, bytes, bit operations.

The network is built and run on shapes (the `meta` device), so a forecast of Stable Diffusion takes seconds and no weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

__all__ = ["forecast"]


def forecast(
    class_name: str,
    config: Mapping[str, Any],
    bits: str,
    steps: int,
    keep: Sequence[str] = (),
    softmax_bits: int = 8,
    dilated: bool = True,
    preset: str = "standard",
    corrected: bool = False,
) -> dict[str, Any]:
    """Counts of the network that `distill --bits W/A` and `export` would make, with tables for `steps` steps; `corrected`: of
    its predictions too.

    `parameters` are those of the float network, what the class builds repeatedly counted once; `bops` and `macs` are of
    one forward pass of one sample. `bytes` is exact when every layer is `dilated`, an upper bound when some are not.

    Raises:
        ArtifactError: no family serves the class, or diffusers refuses the config.
        UsageError: bits or `keep` patterns that don't exist.
    """
    import torch

    from dqtool.core.bits import parse_bits, parse_keep
    from dqtool.core.cost import bops, file_bytes
    from dqtool.formats.shapes import swapped
    from dqtool.graph.repeats import tie_repeats
    from dqtool.models.families import family_of
    from dqtool.nn.prediction import row_shapes
    from dqtool.nn.surgery import assign_bits, state_shapes
    from dqtool.stages.presets import kept_layers

    family = family_of(class_name, "model config, key _class_name")
    with torch.device("meta"):
        network = family.build(config)
    copies = tuple(f"{copy}." for copy, _ in family.repeats(config))
    names = [name for name in network.state_dict() if not (copies and name.startswith(copies))]
    tie_repeats(network, names, family.repeats(config))
    graph = family.graph(network, config)
    layers = graph.trace.layers
    if preset != "standard":
        keep = (*kept_layers(layers, graph.roles), *keep)
    scaled = [info.name for info in layers if info.kind != "attention"] if dilated else []
    plans = assign_bits(layers, parse_bits(bits), [parse_keep(text) for text in keep], softmax_bits, dilated=scaled)
    shapes = {n: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in network.state_dict().items()}
    tables = row_shapes(family.prediction_row(config)) if corrected else None
    rows = [
        {"name": p.info.name, "shape": p.info.shape, "bits": [p.bits.weight, p.bits.input], "macs": p.info.macs}
        for p in plans
    ]
    return {
        "network": class_name,
        "parameters": sum(prod(shape) for shape, _ in shapes.values()),
        "bytes": file_bytes(swapped(state_shapes(shapes, plans, steps, tables))),
        "bytes_float32": file_bytes(swapped(shapes)),
        "bops": bops({"kind": p.info.kind, "macs": p.info.macs, "bits": [p.bits.weight, p.bits.input]} for p in plans),
        "bops_float32": bops({"macs": info.macs, "bits": None} for info in layers),
        "macs": sum(info.macs for info in layers),
        "layers": rows,
    }
