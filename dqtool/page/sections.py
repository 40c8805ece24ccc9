"""Sections of the page for one group of results of one model. Each part lists what it lacks."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from dqtool.metrics.frechet import minimum_samples
from dqtool.page.charts import Line, Point, bands, dots, heatmap, lines, ridges, scatter
from dqtool.page.comparison import REFERENCE
from dqtool.page.dilated_inputs import DilatedInput
from dqtool.page.document import Block, Charts, Note, Omission, Paragraph, Picture, Pictures, Section
from dqtool.page.figures import COSTS, extractors, figure, figures_of, quality_key
from dqtool.page.quantization_errors import Errors, Parts
from dqtool.page.results import Bench, Result, differences
from dqtool.page.svg import SERIES
from dqtool.page.tables import error_table, extractor_text, layer_table, result_table

__all__ = ["activations_section", "error_sections", "quality_section", "results_section", "samples_section"]

WORST = 20
"""Most layers that a chart of layers shows. The table below it has them all."""
HEATMAPS = 3
"""Most results that get a heat map."""
_DIMENSIONS = {"fid": 2048, "sfid": 2023}
"""Numbers of features of the Fréchet distances whose reports do not have them."""
RIDGES = 10
"""Most time steps whose histograms are drawn."""


def results_section(results: Sequence[Result], others: Sequence[Result] = ()) -> Section:
    """Return the section of a model with its table of results.

    The heading names what differs from `others`, results of the same model that have sections of their own.
    """
    model, sampling = results[0].manifest.network, results[0].manifest.sampling
    source = model.source.rstrip("/")
    parts = [f"{model.class_name} with {model.parameters / 1e6:.2f} M parameters"]
    if sampling is not None:
        steps = results[0].manifest.parameters.steps or sampling.steps
        parts.append(f"{sampling.scheduler['_class_name']}, {steps} steps, eta {sampling.eta:g}")
    title = ", ".join([source.removeprefix("zoo:").rsplit("/", 1)[-1], *differences(results[0], others)])
    section = Section(title, [Paragraph("; ".join(parts) + ".")], 2, "Models")
    section.blocks.append(result_table(results))
    features = extractor_text(results)
    if features is not None:
        section.blocks.append(Paragraph(features))
    section.blocks += _warnings(results)
    return section


def quality_section(results: Sequence[Result], benches: Sequence[Bench]) -> Section:
    """Plot quality against every known cost: the main figure as a ratio to full precision's, and PSNR."""
    section = Section("Quality against cost")
    key = quality_key(results)
    if key is None:
        section.blocks.append(Omission("no result has a figure of quality (eval ran without such a metric)"))
        return section
    quantized = results[0].quantized_reference
    reference = REFERENCE if quantized is None else "reference"
    measures = [_relative(results, key, reference)]
    if key != "psnr" and any("psnr" in figures_of(r.figures) for r in results):
        measures.append(_absolute(results, "psnr"))
    charts, missing = [], []
    for cost in COSTS:
        costs = [cost.of(result, benches) for result in results]
        if all(value is None for value in costs):
            missing.append(f"{cost.label.split(',')[0]} ({cost.hint})")
            continue
        of_reference = [cost.of_reference(result, benches) for result in results] if quantized is None else []
        float_cost = next((value for value in of_reference if value is not None), None)
        for label, values, base in measures:
            points = [
                Point(number, result.name, value, quality, number - 1)
                for number, (result, value, quality) in enumerate(zip(results, costs, values, strict=True), start=1)
                if value is not None and quality is not None
            ]
            if points:
                line = None if base is None else (reference, base, float_cost)
                svg = scatter(f"{label} against {cost.label}", cost.label, label, points, line)
                charts.append((f"{label} by {cost.label.split(',')[0]}", svg, ""))
    if charts:
        dashed = (
            f" The dashed line is {quantized or REFERENCE}." if any(base is not None for *_, base in measures) else ""
        )
        section.blocks += [Paragraph("Points are numbered as in the table." + dashed), Charts(charts)]
    if missing:
        section.blocks.append(Omission("; ".join(missing)))
    return section


Measure = tuple[str, list[float | None], float | None]
"""Label, values of the results, and value of the full-precision model."""


def _relative(results: Sequence[Result], key: str, reference: str) -> Measure:
    """Return a figure as a multiple of the full-precision model's, or absolute if a result lacks the latter.

    Ratios keep one bad result from pressing the others together.
    """
    found = [(figures_of(r.figures).get(key), figures_of(r.metrics.reference).get(key)) for r in results]
    if any(value is not None and not full for value, full in found):
        return _absolute(results, key)
    ratios = [value / full if value is not None and full else None for value, full in found]
    return f"{figure(key).label} / {reference}'s", ratios, 1.0


def _absolute(results: Sequence[Result], key: str) -> Measure:
    values = [figures_of(result.figures).get(key) for result in results]
    return figure(key).heading, [None if v is None else v * figure(key).scale for v in values], None


def samples_section(results: Sequence[Result]) -> Section:
    """Return the section with the sample grids side by side."""
    section = Section("Samples")
    pictures, notes, absent = [], [], []
    for number, result in enumerate(results, start=1):
        uri = result.picture_uri()
        if uri is None:
            absent.append(result.name if result.picture is None else f"{result.name} (its picture is too large)")
            continue
        seed = result.manifest.parameters.seed
        pictures.append(Picture(f"{number} {result.name}: the same noise (seed {seed}) in the same place", uri))
        notes += [result.picture_note] if result.picture_note else []
    if pictures:
        section.blocks.append(Pictures(pictures))
    section.blocks += [Note(text) for text in notes]
    if absent:
        section.blocks.append(Omission(f"no picture of {', '.join(absent)}; `dqtool eval --grid FILE.png` writes one"))
    return section


def error_sections(
    results: Sequence[Result], errors: Mapping[str, Errors], missing: Mapping[str, str]
) -> list[Section]:
    """Return the sections of errors by layer and by step. `errors` and `missing` (the reason) are by name of the result."""
    numbered = list(enumerate(results, start=1))
    drawn = numbered[:SERIES]
    layers = Section("Error by layer")
    charts = []
    recorded = [(n, r, r.metrics.layer_errors) for n, r in drawn]
    charts += _layer_chart(
        "Output of a layer",
        "|y' − y|² / |y|²",
        [(f"{n} {r.name}", n - 1, values) for n, r, values in recorded if values],
        "The quantized network against the full-precision one at the same points: a layer's own error plus that of its input.",
    )
    known = [(n, r, errors[r.name]) for n, r in drawn if r.name in errors]
    charts += _layer_chart(
        "Weights",
        "|W' − W|² / |W|²",
        [(f"{n} {r.name}", n - 1, {k: p.total for k, p in e.weights.items()}) for n, r, e in known],
        "Dequantized weights against dilated full-precision ones. Training moves them on purpose.",
    )
    charts += _layer_chart(
        "Activations",
        "|x' − x|² / |x|², mean over steps",
        [
            (f"{n} {r.name}", n - 1, {k: statistics.mean(p.total for p in v) for k, v in e.activations.items()})
            for n, r, e in known
        ],
        "Errors of the quantizers of inputs and attention operands on the calibrated histograms.",
    )
    if errors:
        layers.blocks.append(error_table(results, errors))
    if charts:
        layers.blocks.append(Charts(charts))
    layers.blocks += [layer_table(r, errors.get(r.name)) for _, r in drawn]
    layers.blocks += _left_out(results, missing)
    if len(numbered) > SERIES:
        layers.blocks.append(Note(f"Charts show the first {SERIES} of {len(numbered)} results."))
    steps = Section("Error by time step")
    if known:
        steps.blocks.append(Charts(_step_charts(known)))
    else:
        steps.blocks.append(Omission("needs the calibrated and the distilled artifact of a result"))
    return [layers, steps]


def activations_section(found: Sequence[tuple[str, Sequence[DilatedInput]]], missing: Sequence[str]) -> Section:
    """Return the section of histograms before and after dilation, over time steps, of calibrated artifacts (name, inputs)."""
    section = Section("Activations before and after dilation")
    for name, inputs in found:
        charts = []
        for each in inputs:
            count = len(each.timesteps)
            chosen = sorted(
                {round(i * (count - 1) / max(1, min(RIDGES, count) - 1)) for i in range(min(RIDGES, count))}
            )
            rows = [(f"{each.timesteps[i]:g}", each.before[i], each.after[i]) for i in chosen]
            before, after = "before", "after, x / s"
            title = f"Input of {each.name}"
            charts.append(
                (
                    title,
                    ridges(f"{title}: values by time step", "value", (each.lo, each.hi), rows, (before, after)),
                    "Share of the values; heights are square roots.",
                )
            )
            charts.append(
                (
                    f"{title}: range",
                    bands(
                        f"{title}: range by time step",
                        "timestep",
                        "smallest and largest value",
                        each.timesteps,
                        (before, each.range_before),
                        (after, each.range_after),
                    ),
                    f"Before: {each.samples} sample{'s' * (each.samples != 1)} a step; after: as calibrated.",
                )
            )
        section.blocks.append(
            Paragraph(
                f"{name}: the {len(inputs)} inputs whose range dilation narrows most. Steps run from top to bottom."
            )
        )
        section.blocks.append(Charts(charts))
    section.blocks += [Omission(text) for text in missing]
    return section


def _layer_chart(
    heading: str, unit: str, series: Sequence[tuple[str, int, Mapping[str, float]]], caption: str
) -> list[tuple[str, str, str]]:
    """Return a chart of the layers with the largest values in any series; no chart without values."""
    largest: dict[str, float] = {}
    for _, _, values in series:
        for name, value in values.items():
            largest[name] = max(largest.get(name, 0.0), value)
    names = sorted(largest, key=lambda name: -largest[name])[:WORST]
    if not names:
        return []
    columns = [(label, colour, [values.get(name) for name in names]) for label, colour, values in series]
    shown = f" The {len(names)} largest of {len(largest)}." if len(names) < len(largest) else ""
    return [(heading, dots(f"{heading}: error by layer", unit, names, columns), caption + shown)]


def _step_charts(known: Sequence[tuple[int, Result, Errors]]) -> list[tuple[str, str, str]]:
    together, parts = [], []
    for number, result, errors in known:
        activations = list(errors.activations.values())
        if not activations:
            continue
        label, t = f"{number} {result.name}", errors.timesteps

        def mean(part: str, rows: Sequence[Sequence[Parts]] = activations, steps: int = len(t)) -> list[float]:
            return [statistics.mean(getattr(row[i], part) for row in rows) for i in range(steps)]

        together.append(Line(label, t, mean("total"), number - 1))
        parts += [
            Line(f"{number} rounding", t, mean("rounding"), number - 1),
            Line(f"{number} clipping", t, mean("clipping"), number - 1, kind=1),
        ]
    if not together:
        return []
    unit = "|x' − x|² / |x|²"
    charts = [
        (
            "Activations, mean over quantizers",
            lines("Error of activations by time step", "timestep", unit, together, reverse=True),
            "Sampling runs from left to right.",
        ),
        (
            "Rounding and clipping",
            lines("Rounding and clipping by time step", "timestep", unit, parts, reverse=True),
            "Errors of values between two levels, and of values beyond the range.",
        ),
    ]
    for number, result, errors in known[:HEATMAPS]:
        rows = [(name, [part.total for part in parts]) for name, parts in errors.activations.items()]
        t = errors.timesteps
        if rows:
            image = heatmap(
                f"Error of every activation by time step, {result.name}",
                "timestep",
                rows,
                (f"{t[0]:g}", f"{t[-1]:g}"),
                unit,
            )
            charts.append((f"Every quantizer, {number} {result.name}", image, "Layers in the order they run."))
    return charts


def _warnings(results: Sequence[Result]) -> list[Block]:
    notes: list[Block] = []
    few = []
    for number, result in enumerate(results, start=1):
        images = result.metrics.samples
        for key, each in extractors(result.metrics):
            features = _DIMENSIONS.get(key, each.features if key.startswith("fd.") else None)
            if features is not None and images is not None and images < minimum_samples(features):
                few.append((str(number), minimum_samples(features)))
        missed = result.metrics.missed_timesteps
        if missed:
            notes.append(Note(f"{number}: {len(missed)} sampled timesteps are not among the calibrated ones."))
    if few:
        which = ", ".join(dict.fromkeys(number for number, _ in few))
        notes.insert(
            0,
            Note(
                f"Fréchet distances of {which} are from fewer than {max(n for _, n in few)} images: they are biased upwards and only "
                "comparable at equal numbers of images."
            ),
        )
    return notes


def _left_out(results: Sequence[Result], missing: Mapping[str, str]) -> list[Block]:
    """Return the reasons why results have no errors of weights and activations, one omission for each reason."""
    reasons: dict[str, list[str]] = {}
    for result in results:
        if result.name in missing:
            reasons.setdefault(missing[result.name], []).append(result.name)
    blocks: list[Block] = [
        Omission(f"errors of weights and activations of {', '.join(names)}: {reason}")
        for reason, names in reasons.items()
    ]
    without = [r.name for r in results if not r.metrics.layer_errors]
    if without:
        blocks.append(Omission(f"errors of layers' outputs of {', '.join(without)}: eval did not record them"))
    return blocks
