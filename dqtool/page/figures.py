"""Figures and costs of a result: labels, direction, and values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dqtool.artifacts.jsonvalues import JsonObject
from dqtool.artifacts.records import EvalRecord, ExtractorRecord, RecipeRecord
from dqtool.metrics import CLASSIFIERS, FIGURES, Figure, value_of
from dqtool.page.results import Bench, Result
from dqtool.runtimes import RUNTIMES, runtime_name

__all__ = [
    "COSTS",
    "RATIO",
    "Cost",
    "extractors",
    "figure",
    "figures_of",
    "method_of",
    "quality_key",
    "seconds_of",
]


_NOT_FIGURES = ("samples", "missed_timesteps")
FROM_REFERENCE = "_from_reference"
"""Suffix of a distance to images of the reference model, rather than real images."""
OF_CLASSIFIERS = tuple(f".{name}" for name in CLASSIFIERS)
"""Suffixes of figures of the embedded models' classifiers."""
RATIO = "_ratio"
"""Suffix of a figure that gives another figure as a multiple of the reference's."""
_PARTS = ("reference", "cost", "layer_errors", "extractor", "extractors", "grid")


def figure(key: str) -> Figure:
    """Return the entry of a figure. A figure that no metric reports, say in a report of another version, has its key as label."""
    if key in FIGURES:
        return FIGURES[key]
    stem = key.split(".")[0]
    return Figure(key, key, -1 if stem in ("fd", "fid", "sfid") else 1 if stem in ("is", "psnr", "ssim", "clip") else 0)


def figures_of(metrics: JsonObject) -> dict[str, float]:
    """Return by key the figures that are numbers or have a mean. Those of the registry come first, in its order."""
    found: dict[str, float] = {}
    for key in metrics:
        value = value_of(metrics, key)
        if value is not None and key not in _NOT_FIGURES and key not in _PARTS and not key.endswith((".std", RATIO)):
            found[key] = value
    order = list(FIGURES)
    return dict(sorted(found.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def quality_key(results: Sequence[Result]) -> str | None:
    """Return the figure that plots of quality show: a Fréchet distance, else the first figure with a direction."""
    keys = list(dict.fromkeys(key for result in results for key in figures_of(result.figures)))
    preferred = [key for key in keys if key == "fid" or (key.startswith("fd.") and not key.endswith(FROM_REFERENCE))]
    return next(iter([*sorted(preferred, reverse=True), *[key for key in keys if figure(key).better]]), None)


def extractors(metrics: EvalRecord) -> Iterator[tuple[str, ExtractorRecord]]:
    """Yield (figure, description) for figures whose features a network extracted."""
    if metrics.extractor is not None:
        for key in figures_of(metrics.as_read):
            if key.removesuffix(FROM_REFERENCE).endswith(OF_CLASSIFIERS):
                yield key, metrics.extractor
    for key, each in metrics.extractors.items():
        if not key.endswith(".std"):
            yield key, each


def method_of(result: Result) -> tuple[str, str]:
    """Return (scaling and training method, like `wd + bkd`; details of the training)."""
    layers = result.manifest.layers
    scaling = sorted({layer.scaling.method for layer in layers if layer.scaling is not None and layer.scaling.method})
    parts = [" / ".join(scaling) or "no scaling"]
    known = result.manifests.get("distill")
    if known is None:
        quantized = any(layer.bits is not None for layer in layers)
        return parts[0], "training not recorded here" if quantized else "not quantized"
    given = known.parameters
    recipe = given.recipe or RecipeRecord()
    iters, refine = recipe.iters, recipe.refine_iters
    name = given.method or "?"
    trained = bool(iters or refine) or iters is None
    parts.append(name if trained else "ptq")
    details = []
    if iters:
        details.append(f"{iters} iterations" + ("" if "network_loss" in known.metrics.as_read else " a block"))
    if refine:
        details.append(f"{refine} over all")
    if given.train_samples:
        details.append(f"{given.train_samples} samples")
    if given.static:
        details.append("static ranges")
    if given.preset:
        details.append(f"{given.preset} preset")
    elif given.keep:
        details.append("keep " + ", ".join(given.keep))
    return " + ".join(parts), "; ".join(details)


def seconds_of(result: Result) -> float | None:
    """Return the seconds of dilate, calibrate and distill together; None if one of them is unknown."""
    stages = ("dilate", "calibrate", "distill")
    if not all(stage in result.manifests for stage in stages):
        return None
    return sum(float(result.manifests[stage].seconds) for stage in stages)


@dataclass(frozen=True)
class Cost:
    """A cost that quality is plotted against, with the label of its axis."""

    label: str
    key: str
    scale: float
    hint: str  # the reason if no result has it

    def of(self, result: Result, benches: Sequence[Bench]) -> float | None:
        """Return the cost of a result; None if it is unknown."""
        if self.key == "seconds":
            return seconds_of(result)
        if self.key == "step":
            return _milliseconds(result, benches, baseline=False)
        value = _cost(result, self.key)
        return None if value is None else value * self.scale

    def of_reference(self, result: Result, benches: Sequence[Bench]) -> float | None:
        """Return the cost of the full-precision model; None if it is unknown or there is no such cost."""
        if self.key == "step":
            return _milliseconds(result, benches, baseline=True)
        value = _cost(result, f"{self.key}_float32")
        return None if value is None else value * self.scale


COSTS = (
    Cost("size of the weights, MB", "bytes", 1e-6, "eval ran without its metric `cost`"),
    Cost("bit operations of a step, G", "bops", 1e-9, "eval ran without its metric `cost`"),
    Cost("time to quantize, s", "seconds", 1.0, "the artifacts of the chain were not found beside the results"),
    Cost("time of a step, ms", "step", 1.0, "no report of `dqtool bench -o FILE.json` on these exports was found"),
)


def _cost(result: Result, key: str) -> float | None:
    return None if result.metrics.cost is None else value_of(result.metrics.cost.to_json(), key)


def _milliseconds(result: Result, benches: Sequence[Bench], baseline: bool) -> float | None:
    """Return the median time of a step at the smallest batch, of the float baseline or the fastest of dqtool's runtimes."""
    for bench in benches:
        if bench.sha256 != result.measured_sha256:
            continue
        speed = bench.report.speed
        rows = speed[min(speed, key=int)] if speed else []
        wanted = [
            row.median
            for row in rows
            if (row.baseline if baseline else runtime_name(row.contender) in ("auto", *RUNTIMES))
        ]
        if wanted:
            return 1000 * min(wanted)
    return None
