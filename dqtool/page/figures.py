"""What a result's figures are called, which way is better, and how they are written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dqtool.metrics import FIGURES, Figure, value_of
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
"""Ends the key of a distance to the reference's images in place of real ones."""
RATIO = "_ratio"
"""Ends the key of a figure that stands beside another one: how many times the reference's it is."""
_PARTS = ("reference", "cost", "layer_errors", "extractor", "extractors", "grid")


def figure(key: str) -> Figure:
    """Return how a figure is shown. One that no metric of the registry reports, in a report of another version, is shown under its key."""
    if key in FIGURES:
        return FIGURES[key]
    stem = key.split(".")[0]
    return Figure(key, key, -1 if stem in ("fd", "fid", "sfid") else 1 if stem in ("is", "psnr", "ssim", "clip") else 0)


def figures_of(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return every figure that is one number, or has a mean, by key: known ones first, in the order of the registry."""
    found: dict[str, float] = {}
    for key in metrics:
        value = value_of(metrics, key)
        if value is not None and key not in _NOT_FIGURES and key not in _PARTS and not key.endswith((".std", RATIO)):
            found[key] = value
    order = list(FIGURES)
    return dict(sorted(found.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def quality_key(results: Sequence[Result]) -> str | None:
    """The metric that quality-against-cost plots show: the first that knows a direction, Fréchet distances before all."""
    keys = list(dict.fromkeys(key for result in results for key in figures_of(result.metrics)))
    preferred = [key for key in keys if key == "fid" or (key.startswith("fd.") and not key.endswith(FROM_REFERENCE))]
    return next(iter([*sorted(preferred, reverse=True), *[key for key in keys if figure(key).better]]), None)


def extractors(metrics: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Which network made the features behind a figure: (figure, {name, sha256, perhaps features}), as eval recorded it."""
    digits = metrics.get("extractor")
    if isinstance(digits, Mapping):
        for key in figures_of(metrics):
            if key.removesuffix(FROM_REFERENCE).endswith(".digits"):
                yield key, digits
    several = metrics.get("extractors")
    for key, each in several.items() if isinstance(several, Mapping) else ():
        if isinstance(each, Mapping) and not key.endswith(".std"):
            yield key, each


def method_of(result: Result) -> tuple[str, str]:
    """How a result was quantized, (`wd + bkd`, what else there is to say)."""
    layers = result.manifest.layers
    scaling = sorted({(layer.get("scaling") or {}).get("method", "") for layer in layers} - {""})
    parts = [" / ".join(scaling) or "no scaling"]
    known = result.manifests.get("distill")
    if known is None:
        quantized = any("bits" in layer for layer in layers)
        return parts[0], "training not recorded here" if quantized else "not quantized"
    given = known.parameters
    recipe = given.get("recipe") or {}
    iters, refine = recipe.get("iters"), recipe.get("refine_iters")
    name = str(given.get("method", "?"))
    trained = bool(iters or refine) or iters is None
    parts.append(name if trained else "ptq")
    details = []
    if iters:
        details.append(f"{iters} iterations" + ("" if "network_loss" in known.metrics else " a block"))
    if refine:
        details.append(f"{refine} over all")
    if given.get("train_samples"):
        details.append(f"{given['train_samples']} samples")
    if given.get("static"):
        details.append("static ranges")
    if given.get("preset"):
        details.append(f"{given['preset']} preset")
    elif given.get("keep"):
        details.append("keep " + ", ".join(given["keep"]))
    return " + ".join(parts), "; ".join(details)


def seconds_of(result: Result) -> float | None:
    """Seconds that quantizing took: dilate, calibrate and distill; None when one of them is not known."""
    stages = ("dilate", "calibrate", "distill")
    if not all(stage in result.manifests for stage in stages):
        return None
    return sum(float(result.manifests[stage].seconds) for stage in stages)


@dataclass(frozen=True)
class Cost:
    """What quality is plotted against: the axis' label, and how a result and the full-precision model get their value."""

    label: str
    key: str
    scale: float
    hint: str  # where it would come from

    def of(self, result: Result, benches: Sequence[Bench]) -> float | None:
        """The cost of a result, None when it is not known."""
        if self.key == "seconds":
            return seconds_of(result)
        if self.key == "step":
            return _milliseconds(result, benches, baseline=False)
        value = result.metrics.get("cost", {}).get(self.key)
        return None if value is None else value * self.scale

    def of_reference(self, result: Result, benches: Sequence[Bench]) -> float | None:
        """The cost of the full-precision model, None when it is not known or there is none."""
        if self.key == "step":
            return _milliseconds(result, benches, baseline=True)
        value = result.metrics.get("cost", {}).get(f"{self.key}_float32")
        return None if value is None else value * self.scale


COSTS = (
    Cost("size of the weights, MB", "bytes", 1e-6, "eval ran without its metric `cost`"),
    Cost("bit operations of a step, G", "bops", 1e-9, "eval ran without its metric `cost`"),
    Cost("time to quantize, s", "seconds", 1.0, "the artifacts of the chain were not found beside the results"),
    Cost("time of a step, ms", "step", 1.0, "no report of `dqtool bench -o FILE.json` on these exports was found"),
)


def _milliseconds(result: Result, benches: Sequence[Bench], baseline: bool) -> float | None:
    """Median time of a step at the smallest batch: of the fastest dqtool runtime, or of the float baseline."""
    for bench in benches:
        if bench.sha256 != result.measured_sha256:
            continue
        speed: Mapping[str, Sequence[Mapping[str, Any]]] = bench.report["speed"]
        rows = speed[min(speed, key=int)] if speed else []
        wanted = [
            row["median"]
            for row in rows
            if (row["baseline"] if baseline else runtime_name(row["contender"]) in ("auto", *RUNTIMES))
        ]
        if wanted:
            return 1000 * min(wanted)
    return None
