"""Figures of one evaluated network: of its images, its cost, its layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dqtool import report
from dqtool.artifacts import Artifact
from dqtool.artifacts.jsonvalues import Json
from dqtool.artifacts.records import CostRecord
from dqtool.metrics import METRICS
from dqtool.models.components.export_layout import component_prefix

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dqtool.stages.evaluation.images import ImageMaker

__all__ = ["LAYERS_VERSION", "cost_figures", "image_figures", "layer_errors"]

LAYER_SAMPLES = 256
"""Points of the reference's trajectory that layers are compared at."""
LAYERS_VERSION = 2
"""Version of the errors of layers. Version 1 gave the two networks different conditions where there were more of them than images."""
LAYER_BYTES = 1 << 29
"""Bytes of the outputs of all layers that are held at once, unless those of a single image are larger."""


def image_figures(
    images: Tensor, expected: Tensor | None, metrics: tuple[str, ...], asked: Tensor | None = None
) -> dict[str, Json]:
    """Return the figures of `images` by those `metrics` that compare whole sets, with the `reference`'s own where there is
    one. `asked` is the digit that each image should show, where the model can be asked for one."""
    figures: dict[str, Json] = {"samples": len(images)}
    for name in METRICS:
        compare = METRICS[name].compare
        if name in metrics and compare is not None:
            figures |= compare(images, expected, asked)
    return figures


def cost_figures(artifact: Artifact) -> CostRecord:
    """Return the bytes of the weights' file and the bit operations, beside those of float32."""
    from dqtool.core.cost import bops, float_bops, size_ratio
    from dqtool.formats.shapes import network_shapes, predicted_bytes
    from dqtool.models.families import family_of

    manifest = artifact.manifest
    family = family_of(manifest.network.class_name, artifact.given)
    shapes = network_shapes(family, manifest.network.config, manifest.layers)
    full_bytes = predicted_bytes(shapes)
    used, full = bops(manifest.layers), float_bops(manifest.layers)
    if manifest.file is not None:
        size = manifest.file.bytes - artifact.attachment_bytes()
    else:
        prefix = component_prefix(manifest.pipeline)
        inside = {n: e for n, e in (manifest.files or {}).items() if n.startswith(prefix)}
        size = sum(e.bytes for name, e in inside.items() if name.endswith(".safetensors"))
        size = size or manifest.metrics.bytes or 0  # formats whose weights are in other files
    if artifact.stage in ("dilate", "calibrate"):
        size = full_bytes
    return CostRecord(size, full_bytes, size_ratio(full_bytes, size), used, full, full / used)


def layer_errors(reference: nn.Module, network: nn.Module, maker: ImageMaker, seed: int) -> dict[str, float]:
    """Return the relative squared error of each layer's output, |y' - y|² / |y|², at points of the reference's trajectory.

    Both networks run from the same (x_t, t), so a layer's figure holds its own error and what reached it. `seed` draws the
    noise that the trajectory starts from.
    """
    import torch

    from dqtool.graph.leaves import is_quantizable

    sampler, conditions = maker.sampler, maker.conditions
    images = max(1, LAYER_SAMPLES // (sampler.steps * sampler.inputs_per_image(conditions.guided)))
    chosen = conditions.evenly(images)
    seen: dict[str, Tensor] = {}
    error: dict[str, float] = {}
    power: dict[str, float] = {}
    names = [name for name, module in reference.named_modules() if is_quantizable(module)]

    def keep(name: str) -> Any:
        return lambda _m, _a, y: seen.__setitem__(name, y)

    def compare(name: str) -> Any:
        def hook(_m: nn.Module, _a: tuple[Any, ...], y: Tensor) -> None:
            error[name] = error.get(name, 0.0) + float((y - seen[name]).double().square().sum())
            power[name] = power.get(name, 0.0) + float(seen[name].double().square().sum())

        return hook

    handles = [reference.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    handles += [network.get_submodule(name).register_forward_hook(compare(name)) for name in names]
    try:
        with report.progress("eval: layers", images * sampler.steps, "point") as progress:
            first, together = 0, 1
            while first < images:
                stop = min(images, first + together)
                given = chosen.given(first, stop)
                if conditions.null is not None:
                    given = sampler.asked(given, conditions.null)

                def see(x: Tensor, timestep: Tensor, _p: Tensor, given: Any = given, count: int = stop - first) -> None:
                    with torch.no_grad():
                        sampler.family.predict(network, x, timestep, given)
                    progress.advance(count)

                for _ in sampler.batches(
                    reference,
                    maker.shape,
                    stop,
                    seed,
                    stop - first,
                    chosen.given,
                    see,
                    null=conditions.null,
                    first=first,
                ):
                    pass
                held = sum(y.nbytes for y in seen.values()) // (stop - first)  # the first image tells how many fit
                first, together = stop, max(1, LAYER_BYTES // max(1, held))
    finally:
        for handle in handles:
            handle.remove()
    return {name: error[name] / power[name] if power[name] else 0.0 for name in names if name in error}
