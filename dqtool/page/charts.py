"""Charts of the page. Each function takes plain numbers and returns one SVG image as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dqtool.page.svg import SERIES, Axis, Canvas, Frame, compact, legend

__all__ = ["Line", "Point", "bands", "dots", "heatmap", "lines", "ridges", "scatter"]

WIDTH = 440.0
LEFT = 58.0
RIGHT = 14.0
ABOVE, BELOW = 26.0, 44.0
"""Space for the label of the y axis and for the labels of the x axis."""
CHARACTER_SMALL = 5.6
"""Mean width of a character of small text, in units."""
LEVELS = 9
"""Number of shades of a heat map."""


@dataclass(frozen=True)
class Point:
    """A result in a scatter plot. `number` is its number in the table; `series` selects colour and marker."""

    number: int
    name: str
    x: float
    y: float
    series: int


@dataclass(frozen=True)
class Line:
    """A line of y over x. `kind` 0 is drawn solid, 1 dashed."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    series: int
    kind: int = 0


def scatter(
    title: str, x_label: str, y_label: str, points: Sequence[Point], reference: tuple[str, float, float | None] | None
) -> str:
    """Plot points by cost and quality.

    `reference` (name, quality, cost) is drawn as a dashed line, and as a hollow point too if its cost is known.
    """
    xs = [p.x for p in points]
    ys = [p.y for p in points]
    if reference is not None:
        ys.append(reference[1])
        if reference[2] is not None:
            xs.append(reference[2])
    canvas = Canvas(WIDTH, ABOVE + 200 + BELOW)
    frame = Frame(
        canvas, Axis.over(x_label, xs), Axis.over(y_label, ys, wide=3.0), (LEFT, ABOVE, WIDTH - LEFT - RIGHT, 200)
    )
    frame.draw()
    if reference is not None:
        name, quality, cost = reference
        _, y = frame.at(frame.x.low, quality)
        canvas.path([(LEFT, y), (WIDTH - RIGHT, y)], "line ref dash", tip=f"{name}: {compact(quality)}")
        if cost is not None:
            x, y = frame.at(cost, quality)
            canvas.add("circle", css="ref hollow", cx=x, cy=y, r=5, tip=f"{name}: {compact(cost)}, {compact(quality)}")
            canvas.text(x - 9, y - 7, name, "t ref", "end")
        else:
            canvas.text(WIDTH - RIGHT, y - 6, name, "t ref", "end")
    taken: list[tuple[float, float]] = []
    for p in sorted(points, key=lambda p: p.y):
        x, y = frame.at(p.x, p.y)
        tip = f"{p.number} {p.name}: {x_label} {compact(p.x)}, {y_label} {compact(p.y)}"
        canvas.marker(p.series, x, y, f"mark s{p.series % SERIES}", tip)
        canvas.text(*_label_place(x, y, taken), str(p.number), "t strong")
    spoken = "; ".join(f"{p.name}: {compact(p.x)}, {compact(p.y)}" for p in points)
    return canvas.svg(title, f"{y_label} against {x_label}. {spoken}")


def _label_place(x: float, y: float, taken: list[tuple[float, float]]) -> tuple[float, float]:
    """Return the first free place for a label right, left, above or below a point, and add it to `taken`."""
    offsets = [(8, 4), (-16, 4), (-4, -9), (-4, 18), (8, -9), (8, 18), (-16, -9), (-16, 18)]
    places = [(x + dx, y + dy) for dx, dy in offsets if x + dx < WIDTH - 8]
    free = [(a, b) for a, b in places if all(abs(a - c) > 14 or abs(b - d) > 12 for c, d in taken)]
    chosen = (free or places)[0]
    taken.append(chosen)
    return chosen


def lines(title: str, x_label: str, y_label: str, series: Sequence[Line], reverse: bool = False) -> str:
    """Plot lines over a common x axis. With `reverse` it runs from high to low, as timesteps do while sampling."""
    canvas = Canvas(WIDTH, 10)
    entries = [
        (line.name, lambda x, y, line=line: canvas.path([(x - 7, y), (x + 7, y)], _stroke(line))) for line in series
    ]
    top = legend(canvas, entries, 12) + ABOVE
    canvas.height = top + 190 + BELOW
    xs = [x for line in series for x in line.x]
    sign = -1 if reverse else 1
    low, high = min(x * sign for x in xs), max(x * sign for x in xs)
    x_axis = Axis(x_label, low, high if high > low else low + 1)
    frame = Frame(
        canvas,
        x_axis,
        Axis.over(y_label, [y for line in series for y in line.y]),
        (LEFT, top, WIDTH - LEFT - RIGHT, 190),
    )
    frame.draw(form_x=lambda value: compact(abs(value)))
    for line in series:
        points = [frame.at(x * sign, y) for x, y in zip(line.x, line.y, strict=True)]
        canvas.path(points, _stroke(line), tip=f"{line.name}: {compact(min(line.y))} to {compact(max(line.y))}")
    spoken = "; ".join(f"{line.name}: from {compact(line.y[0])} to {compact(line.y[-1])}" for line in series)
    return canvas.svg(title, f"{y_label} over {x_label}. {spoken}")


def _stroke(line: Line) -> str:
    return f"line s{line.series % SERIES}" + (" dash" if line.kind else "")


def dots(
    title: str, x_label: str, names: Sequence[str], series: Sequence[tuple[str, int, Sequence[float | None]]]
) -> str:
    """Plot one row for each name, with a marker for each series on a common axis.

    A series is (name, colour, values), with a value or None for each row.
    """
    canvas = Canvas(WIDTH, 10)
    entries = [
        (name, lambda x, y, colour=colour: canvas.marker(colour, x, y, f"mark s{colour % SERIES}"))
        for name, colour, _ in series
    ]
    top, row = legend(canvas, entries, 12) + 8, 18.0
    left = min(240.0, max(len(name) for name in names) * CHARACTER_SMALL + 10)
    height = row * len(names)
    canvas.height = top + height + BELOW
    values = [v for _, _, column in series for v in column if v is not None]
    frame = Frame(canvas, Axis.over(x_label, values), Axis("", 0, 1), (left, top, WIDTH - left - RIGHT, height))
    for value in frame.x.ticks(5):
        x, _ = frame.at(value, 0)
        canvas.path([(x, top), (x, top + height)], "grid")
        canvas.text(x, top + height + 16, frame.x.text(value), anchor="middle")
    canvas.text((left + WIDTH - RIGHT) / 2, top + height + 35, x_label, "t label", "middle")
    for index, name in enumerate(names):
        y = top + (index + 0.5) * row
        canvas.text(left - 6, y + 3.5, _shortened(name, int((left - 8) / CHARACTER_SMALL)), "t small", "end")
        present = [(label, colour, v) for label, colour, column in series if (v := column[index]) is not None]
        if present:
            places = [frame.at(value, 0)[0] for _, _, value in present]
            canvas.path([(min(places), y), (max(places), y)], "axis")
        for label, colour, value in present:
            x, _ = frame.at(value, 0)
            canvas.marker(colour, x, y, f"mark s{colour % SERIES}", f"{name}, {label}: {compact(value)}")
    return canvas.svg(title, f"{x_label} of {len(names)} layers, largest first: {', '.join(names[:5])} …")


def heatmap(
    title: str, columns: str, rows: Sequence[tuple[str, Sequence[float]]], labels: Sequence[str], unit: str
) -> str:
    """Plot rows of values as shades on a logarithmic scale. The first and last of `labels` are written below the columns.

    The lightest shade stands for the smallest tenth of the values. Otherwise a few 8-bit layers take up most of the scale.
    """
    values = sorted(v for _, row in rows for v in row if v > 0) or [1.0]
    low, high = values[len(values) // 10], values[-1]
    cell = max(5.0, min(12.0, 520.0 / len(rows)))
    left, top = 118.0, 44.0
    count = len(rows[0][1])
    step = (WIDTH - left - RIGHT) / count
    canvas = Canvas(WIDTH, top + cell * len(rows) + BELOW)
    cells: list[list[str]] = [[] for _ in range(LEVELS)]
    span = math.log(high / low) or 1.0
    for r, (_, row) in enumerate(rows):
        for c, value in enumerate(row):
            share = math.log(min(max(value, low), high) / low) / span if value > 0 else 0.0
            cells[min(LEVELS - 1, int(share * LEVELS))].append(
                f"M{left + c * step:.1f} {top + r * cell:.1f}h{step:.1f}v{cell:.1f}h-{step:.1f}z"
            )
    for level, drawn in enumerate(cells):
        canvas.add("rect", css=f"h{level}", x=left + level * 22, y=10, width=22, height=10)
        if drawn:
            canvas.add("path", css=f"h{level}", d="".join(drawn))
    canvas.text(left - 8, 19, unit, anchor="end")
    canvas.text(left, 34, f"≤ {compact(low)}", "t small")
    canvas.text(left + LEVELS * 22, 34, compact(high), "t small", "end")
    group = ""
    for r, (name, row) in enumerate(rows):
        y = top + r * cell
        canvas.add(
            "rect",
            css="probe",
            x=0,
            y=y,
            width=WIDTH,
            height=cell,
            tip=f"{name}: {compact(min(row))} to {compact(max(row))}",
        )
        own = ".".join(name.split(".")[:2]) if "." in name else name
        if own != group:
            canvas.path([(left - 4, y), (WIDTH - RIGHT, y)], "grid")
            length = next((i for i, (n, _) in enumerate(rows[r:]) if not _within(n, own)), len(rows) - r)
            if length * cell >= 9:
                canvas.text(left - 8, y + min(length * cell / 2 + 4, 11), _shortened(own, 19), "t small", "end")
            group = own
    bottom = top + cell * len(rows)
    canvas.text(left, bottom + 16, labels[0])
    canvas.text(WIDTH - RIGHT, bottom + 16, labels[-1], anchor="end")
    canvas.text((left + WIDTH - RIGHT) / 2, bottom + 16, columns, "t label", "middle")
    worst = max(rows, key=lambda item: max(item[1]))
    return canvas.svg(title, f"{unit}, {len(rows)} rows by {count} steps; largest in {worst[0]}: {compact(high)}")


def _within(name: str, group: str) -> bool:
    return name == group or name.startswith(group + ".")


def ridges(
    title: str,
    x_label: str,
    span: tuple[float, float],
    rows: Sequence[tuple[str, Sequence[float], Sequence[float]]],
    names: tuple[str, str],
) -> str:
    """Plot pairs of histograms (label, first, second) over one range, row under row. The second is filled.

    Heights are square roots of the shares, so that tails are visible next to the peak.
    """
    canvas = Canvas(WIDTH, 10)
    entries: list[tuple[str, Callable[[float, float], None]]] = [
        (names[0], lambda x, y: canvas.path([(x - 7, y), (x + 7, y)], "line s1")),
        (names[1], lambda x, y: canvas.add("rect", css="area s0", x=x - 7, y=y - 5, width=14, height=10)),
    ]
    left, row, overlap = 50.0, 26.0, 1.5
    top = legend(canvas, entries, 12) + 24
    height = row * len(rows)
    canvas.height = top + height + BELOW
    frame = Frame(canvas, Axis(x_label, *span), Axis("", 0, 1), (left, top, WIDTH - left - RIGHT, height))
    for value in frame.x.ticks():
        x, _ = frame.at(value, 0)
        canvas.path([(x, top - 8), (x, top + height)], "grid")
        canvas.text(x, top + height + 16, frame.x.text(value), anchor="middle")
    canvas.text((left + WIDTH - RIGHT) / 2, top + height + 35, x_label, "t label", "middle")
    canvas.text(8, top - 12, "timestep", "t label")
    for index, (label, first, second) in enumerate(rows):
        base = top + (index + 1) * row
        canvas.text(left - 8, base, label, anchor="end")
        tallest = math.sqrt(max(*first, *second) or 1)

        def outline(shares: Sequence[float], base: float = base, tallest: float = tallest) -> list[tuple[float, float]]:
            width = (WIDTH - left - RIGHT) / len(shares)
            return [
                (left + (i + 0.5) * width, base - math.sqrt(max(share, 0)) / tallest * row * overlap)
                for i, share in enumerate(shares)
            ]

        closed = outline(second)
        canvas.path([(closed[0][0], base), *closed, (closed[-1][0], base)], "area s0", close=True)
        canvas.path(outline(first), "line thin s1")
    return canvas.svg(title, f"Distribution over {x_label} at {len(rows)} timesteps, {names[0]} and {names[1]}")


def bands(
    title: str,
    x_label: str,
    y_label: str,
    x: Sequence[float],
    outer: tuple[str, Sequence[tuple[float, float]]],
    inner: tuple[str, Sequence[tuple[float, float]]],
) -> str:
    """Plot two ranges (name, (low, high) for each x) over a reversed x axis. The inner one is filled."""
    canvas = Canvas(WIDTH, 10)
    entries: list[tuple[str, Callable[[float, float], None]]] = [
        (outer[0], lambda x, y: canvas.path([(x - 7, y), (x + 7, y)], "line s1")),
        (inner[0], lambda x, y: canvas.add("rect", css="area s0", x=x - 7, y=y - 5, width=14, height=10)),
    ]
    top = legend(canvas, entries, 12) + ABOVE
    canvas.height = top + 190 + BELOW
    ends = [v for _, pairs in (outer, inner) for pair in pairs for v in pair]
    frame = Frame(
        canvas,
        Axis(x_label, -max(x), -min(x) if len(x) > 1 else 1 - max(x)),
        Axis.over(y_label, [*ends, 0.0]),
        (LEFT, top, WIDTH - LEFT - RIGHT, 190),
    )
    frame.draw(form_x=lambda value: compact(abs(value)))
    low = [frame.at(-t, pair[0]) for t, pair in zip(x, inner[1], strict=True)]
    high = [frame.at(-t, pair[1]) for t, pair in zip(x, inner[1], strict=True)]
    canvas.path([*low, *reversed(high)], "area s0", close=True, tip=inner[0])
    for side in (0, 1):
        canvas.path([frame.at(-t, pair[side]) for t, pair in zip(x, outer[1], strict=True)], "line s1", tip=outer[0])
    return canvas.svg(title, f"{y_label} over {x_label}: {outer[0]} and {inner[0]}")


def _shortened(name: str, most: int) -> str:
    """Shorten a name to `most` characters. Its end is kept, because names of layers differ there."""
    return name if len(name) <= most else "…" + name[-(most - 1) :]
