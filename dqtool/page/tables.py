"""Tables of the page: results, sources of the error, layers, speed, and parameters and versions of each result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dqtool.artifacts.jsonvalues import JsonObject
from dqtool.artifacts.records import CostRecord, ScalingRecord
from dqtool.metrics import value_of
from dqtool.page.comparison import REFERENCE
from dqtool.page.document import Cell, Table
from dqtool.page.figures import RATIO, extractors, figure, figures_of, method_of, seconds_of
from dqtool.page.quantization_errors import Errors, Parts
from dqtool.page.results import Bench, Result
from dqtool.page.svg import compact
from dqtool.report import format_seconds
from dqtool.runtimes import runtime_name

__all__ = ["bench_tables", "error_table", "extractor_text", "layer_table", "making_tables", "result_table"]

NOTHING = Cell("–")


def result_table(results: Sequence[Result]) -> Table:
    """Return the results of one model, the reference first: method, bits, figures, size, bit operations, time to quantize."""
    keys = list(dict.fromkeys(key for result in results for key in figures_of(result.figures)))
    best = {key: _best(key, results) for key in keys}
    columns = ["#", "result", "bits", "method", "images", *(figure(key).heading for key in keys)]
    columns += ["size, MB ↓", "bit operations, G ↓", "quantized in"]
    rows = [_reference_row(result, keys) for result in _with_own_reference(results)]
    for number, result in enumerate(results, start=1):
        values = figures_of(result.figures)
        method, detail = method_of(result)
        seconds = seconds_of(result)
        row = [
            Cell(str(number)),
            Cell(result.name),
            Cell(result.bits),
            Cell(method, detail),
            _images(result.metrics.samples),
        ]
        row += [_figure_cell(result.figures, key, best[key] is result) if key in values else NOTHING for key in keys]
        row += _costs(result.metrics.cost)
        rows.append([*row, NOTHING if seconds is None else Cell(format_seconds(seconds))])
    quantized = results[0].quantized_reference
    compared = "× and ÷ compare" if quantized is None else f"× compares with {quantized}, ÷"
    caption = (
        f"{compared} with full precision. Size is that of the network's weights; bit operations are those of one step"
    )
    return Table(caption, columns, rows, heads=2)


def extractor_text(results: Sequence[Result]) -> str | None:
    """Return a sentence with the networks whose features the figures use, and their hashes; None if eval named none."""
    named: dict[str, dict[str, None]] = {}
    for result in results:
        for key, each in extractors(result.metrics):
            features = "" if each.features is None else f"{each.features} features, "
            network = f"{each.name or '?'} ({features}sha256 {(each.sha256 or '?')[:12]}…)"
            named.setdefault(network, {})[figure(key).label] = None
    parts = [f"{', '.join(labels)}: {network}" for network, labels in named.items()]
    return f"Features of {'; '.join(parts)}." if parts else None


def error_table(results: Sequence[Result], errors: Mapping[str, Errors]) -> Table:
    """Return the errors of weights and activations of each result, with the share of clipping (Appendix F of the paper)."""
    rows = []
    for number, result in enumerate(results, start=1):
        known = errors.get(result.name)
        if known is not None:
            weights = list(known.weights.values())
            activations = [part for parts in known.activations.values() for part in parts]
            rows.append(
                [
                    Cell(str(number)),
                    Cell(result.name),
                    Cell(result.bits),
                    *_error_cells(weights),
                    *_error_cells(activations),
                ]
            )
    columns = ["#", "result", "bits", "weights: error ↓", "clipped, %", "activations: error ↓", "clipped, %"]
    return Table(
        "Error relative to the energy of the values, mean over layers (and steps), with the share of clipping; the rest is rounding",
        columns,
        rows,
        heads=2,
    )


def layer_table(result: Result, errors: Errors | None) -> Table:
    """Return every layer of one result, with its bits and errors."""
    recorded = result.metrics.layer_errors
    rows = []
    for layer in result.manifest.layers:
        name = layer.name
        weights = None if errors is None else errors.weights.get(name)
        inputs = None if errors is None else errors.activations.get(name)
        scaling = layer.scaling or ScalingRecord()
        rows.append(
            [
                Cell(name),
                Cell("float" if layer.bits is None else "/".join(map(str, layer.bits))),
                Cell(f"{layer.macs / 1e6:.2f}"),
                NOTHING if scaling.unsaturated_share is None else Cell(f"{100 * scaling.unsaturated_share:.0f}"),
                NOTHING if scaling.max is None else Cell(f"{scaling.max:.2f}"),
                Cell(compact(recorded[name])) if name in recorded else NOTHING,
                Cell(compact(weights.total)) if weights else NOTHING,
                Cell(compact(sum(p.total for p in inputs) / len(inputs))) if inputs else NOTHING,
            ]
        )
    columns = ["layer", "bits", "MMACs", "dilated, %", "largest s", "output error", "weight error", "input error"]
    return Table(f"All {len(rows)} layers of {result.name}", columns, rows, folded=True)


def bench_tables(bench: Bench) -> list[Table]:
    """Return the times of a step for each batch size, and memory, from one report of `dqtool bench`."""
    tables = []
    for batch, speed in bench.report.speed.items():
        rows = [
            [
                Cell(row.contender, row.note or ""),
                *(Cell(f"{1000 * seconds:.1f}") for seconds in (row.median, row.p10, row.p90)),
                Cell(str(row.calls)),
                NOTHING if row.ratio is None else Cell(f"{row.ratio:.2f}×"),
            ]
            for row in speed
        ]
        columns = ["contender", "median, ms ↓", "10 %, ms", "90 %, ms", "calls", "times faster ↑"]
        tables.append(Table(f"One step at batch {batch}", columns, rows))
    probes = bench.report.load
    if probes:
        rows = [
            [
                Cell(probe.contender),
                *(Cell(f"{seconds:.2f}") for seconds in (probe.load, probe.ready)),
                *(
                    NOTHING if size is None else Cell(f"{size / 2**20:.0f}")
                    for size in (probe.peak_bytes, probe.private_bytes)
                ),
            ]
            for probe in probes
        ]
        columns = ["contender", "load, s ↓", "with first step, s ↓", "peak, MiB ↓", "without mapped files, MiB ↓"]
        tables.append(Table("Loading and memory, each in a fresh process", columns, rows))
    return tables


def making_tables(results: Sequence[Result]) -> list[Table]:
    """Return the artifacts that were measured, with versions of packages, and the parameters of every known stage."""
    rows, parameters = [], []
    for result in results:
        manifest, given = result.manifest, result.manifest.parameters
        stage = (manifest.inputs[0].stage if manifest.inputs else None) or "model"
        versions, sampling = manifest.environment.versions, manifest.sampling
        scheduler = "?" if sampling is None else sampling.scheduler.get("_class_name", "?")
        steps = given.steps or ("?" if sampling is None else sampling.steps)
        runtime = result.metrics.runtime or given.runtime or "–"
        times = [f"{s} {format_seconds(m.seconds)}" for s, m in reversed(result.manifests.items()) if s != "export"]
        rows.append(
            [
                Cell(result.name),
                Cell(f"{stage} {result.measured_sha256[:12]}…"),
                Cell("?" if manifest.model is None else manifest.model.source),
                Cell(f"{scheduler}, {steps} steps"),
                Cell("–" if given.seed is None else str(given.seed)),
                Cell(runtime_name(runtime)),
                Cell(f"{manifest.environment.device or '?'}, {manifest.environment.threads or '?'} threads"),
                Cell(", ".join([*times, f"eval {format_seconds(manifest.seconds)}"])),
                Cell(" ".join(f"{name} {version}" for name, version in sorted(versions.items()))),
            ]
        )
        stages = [*reversed(result.manifests.items()), ("eval", manifest)]
        parameters += [
            [Cell(result.name), Cell(stage), Cell(_flat(known.parameters.as_read))] for stage, known in stages
        ]
    columns = ["result", "measured", "model", "sampler", "seed", "runtime", "device", "time", "versions"]
    return [
        Table("Measured artifacts, and the software that measured them", columns, rows),
        Table("Parameters of every stage", ["result", "stage", "parameters"], parameters, heads=2, folded=True),
    ]


def _with_own_reference(results: Sequence[Result]) -> list[Result]:
    """Return one result for each different reference. Its figures depend on the number of images and their seed."""
    found: dict[tuple[Any, Any], Result] = {}
    for result in results:
        if result.metrics.reference or result.metrics.cost is not None:
            images = result.metrics.reference.get("samples")
            found.setdefault((images, result.manifest.parameters.seed), result)
    several = [result for (images, _), result in found.items() if images is not None]
    return several or [result for result in found.values() if result.quantized_reference is None][:1]


def _reference_row(result: Result, keys: Sequence[str]) -> list[Cell]:
    reference, cost = result.metrics.reference, result.metrics.cost
    values = figures_of(reference)
    quantized = result.quantized_reference
    named = [Cell(REFERENCE), Cell("32/32")] if quantized is None else [Cell(quantized), NOTHING]
    row = [Cell(""), *named, NOTHING, _images(reference.get("samples"))]
    row += [_figure_cell(reference, key, False) if key in values else NOTHING for key in keys]
    if cost is None or quantized is not None:
        return [*row, NOTHING, NOTHING, NOTHING]
    return [*row, Cell(f"{cost.bytes_float32 / 1e6:.2f}"), Cell(f"{cost.bops_float32 / 1e9:.2f}"), NOTHING]


def _costs(cost: CostRecord | None) -> list[Cell]:
    if cost is None:
        return [NOTHING, NOTHING]
    return [
        Cell(f"{cost.bytes / 1e6:.2f}", f"÷{cost.size_ratio:.1f}"),
        Cell(f"{cost.bops / 1e9:.2f}", f"÷{cost.bops_ratio:.1f}"),
    ]


def _images(count: int | None) -> Cell:
    return NOTHING if count is None else Cell(str(count))


def _figure_cell(metrics: JsonObject, key: str, best: bool) -> Cell:
    deviation, ratio = value_of(metrics, f"{key}.std"), metrics.get(key + RATIO)
    detail = f"×{ratio:.2f}" if isinstance(ratio, float) else ""
    return Cell(figure(key).text(figures_of(metrics)[key], deviation), detail, best)


def _best(key: str, results: Sequence[Result]) -> Result | None:
    """Return the best of at least two results; None if the figure has no better direction."""
    better = figure(key).better
    having = [result for result in results if key in figures_of(result.figures)]
    if not better or len(having) < 2:
        return None
    return max(having, key=lambda result: better * figures_of(result.figures)[key])


def _error_cells(parts: Sequence[Parts]) -> list[Cell]:
    if not parts:
        return [NOTHING, NOTHING]
    clipping, rounding = sum(p.clipping for p in parts), sum(p.rounding for p in parts)
    total = sum(p.total for p in parts) / len(parts)
    share = clipping / (clipping + rounding) if clipping + rounding else 0.0
    return [Cell(compact(total)), Cell(f"{100 * share:.1f}")]


def _flat(values: JsonObject, prefix: str = "") -> str:
    """Return nested parameters as `a=1 b.c=2`."""
    parts = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            parts.append(_flat(value, f"{prefix}{key}."))
        else:
            shown = ",".join(map(str, value)) if isinstance(value, list) else "–" if value is None else str(value)
            parts.append(f"{prefix}{key}={shown}")
    return " ".join(parts)
