"""Parts of a chart as SVG text: scales, ticks, axes and legends.

Colours are CSS variables, so that a chart follows the page into dark mode. Sizes are in units of the view box, which the
page scales to the available width. Matplotlib's SVG has neither dark mode nor titles on
points, and needs a plotting library in every installation, so that these few shapes are drawn here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["SERIES", "Axis", "Canvas", "Frame", "compact", "legend"]

SERIES = 8
"""Number of colours. Each series has its own marker or dash too, so that colour alone never identifies one."""
CHARACTER = 6.4
"""Mean width of a character of normal text, in units."""


def compact(value: float) -> str:
    """Return a value with three significant digits, without an exponent if that is readable: `0.013`, `4500`, `2.1e-06`."""
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def number(value: float) -> str:
    """Return a coordinate as text, with two decimals at most."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if value else "0"


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic scale of values, with its label. `log` needs positive values."""

    label: str
    low: float
    high: float
    log: bool = False

    @classmethod
    def over(
        cls, label: str, values: Sequence[float], zero: bool = False, margin: float = 0.06, wide: float = 20.0
    ) -> Axis:
        """Return an axis over finite values with a margin.

        It starts at zero if `zero` is set, and is logarithmic if the values span more than a factor of `wide`.
        """
        positive = [v for v in values if v > 0]
        if not values:
            return cls(label, 0, 1)
        low, high = min(values), max(values)
        if not zero and len(positive) == len(values) and high / low > wide:
            room = (high / low) ** margin
            return cls(label, low / room, high * room, log=True)
        room = (high - low) * margin or abs(high) * 0.1 or 1.0
        return cls(label, 0.0 if zero or 0 <= low < room else low - room, high + room)

    def place(self, value: float) -> float:
        """Return the place of a value, from 0 at `low` to 1 at `high`. Values outside are clipped."""
        if self.log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return min(1.0, max(0.0, share))

    def ticks(self, most: int = 6) -> list[float]:
        """Return about `most` round values on the axis."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1, 2, 5), (1, 3), (1,)):
                marks = [m * 10.0**d for d in decades for m in steps]
                marks = [m for m in marks if self.low <= m <= self.high]
                if len(marks) <= most:
                    return marks
            return marks[:: -(-len(marks) // most)]
        raw = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]

    def text(self, value: float) -> str:
        """Return the label of a tick, with enough decimals to differ from the next one."""
        marks = self.ticks()
        if self.log or len(marks) < 2:
            return compact(value)
        step = marks[1] - marks[0]
        if step < 1e-4 or max(abs(self.low), abs(self.high)) >= 1e5:
            return compact(value)
        return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}" if abs(value) > step / 2 else "0"


class Canvas:
    """Collector of the elements of one SVG image."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.parts: list[str] = []

    def add(self, tag: str, text: str | None = None, tip: str | None = None, **attributes: object) -> None:
        """Add an element. `css` is its class, `_` in other names stands for `-`, and `tip` is shown under the pointer."""
        written = []
        for key, value in attributes.items():
            name = "class" if key == "css" else key.replace("_", "-")
            shown = number(float(value)) if isinstance(value, float | int) else escape(str(value))
            written.append(f' {name}="{shown}"')
        inner = (f"<title>{escape(tip)}</title>" if tip else "") + (escape(text) if text is not None else "")
        self.parts.append(f"<{tag}{''.join(written)}>{inner}</{tag}>")

    def path(
        self, points: Sequence[tuple[float, float]], css: str, close: bool = False, tip: str | None = None
    ) -> None:
        """Add a line through points, or with `close` the area inside them."""
        if points:
            d = "M" + "L".join(f"{number(x)} {number(y)}" for x, y in points) + ("Z" if close else "")
            self.add("path", css=css, d=d, tip=tip)

    def marker(self, series: int, x: float, y: float, css: str, tip: str | None = None) -> None:
        """Add the marker of a series: a circle, square, diamond or triangle."""
        kind, r = series % 4, 4.5
        if kind == 0:
            self.add("circle", css=css, cx=x, cy=y, r=r, tip=tip)
        elif kind == 1:
            self.add("rect", css=css, x=x - r * 0.9, y=y - r * 0.9, width=1.8 * r, height=1.8 * r, tip=tip)
        else:
            top = 1.25 * r
            corners = [(x, y - top), (x + top, y), (x, y + top), (x - top, y)]
            if kind == 3:
                corners = [(x, y - top), (x + top, y + r), (x - top, y + r)]
            self.path(corners, css, close=True, tip=tip)

    def text(self, x: float, y: float, text: str, css: str = "t", anchor: str = "start") -> None:
        """Add text. `y` is its baseline."""
        self.add("text", text, css=css, x=x, y=y, text_anchor=anchor)

    def svg(self, title: str, description: str) -> str:
        """Return the image, with a title and a description for screen readers."""
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {number(self.width)} {number(self.height)}" role="img">'
            f"<title>{escape(title)}</title><desc>{escape(description)}</desc>{''.join(self.parts)}</svg>"
        )


class Frame:
    """A plot area with a horizontal and a vertical axis on a canvas."""

    def __init__(self, canvas: Canvas, x: Axis, y: Axis, box: tuple[float, float, float, float]) -> None:
        """Take the canvas, two axes and the area inside them: left, top, width, height."""
        self.canvas, self.x, self.y, self.box = canvas, x, y, box

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return the place of a point on the canvas."""
        left, top, width, height = self.box
        return left + self.x.place(x) * width, top + (1 - self.y.place(y)) * height

    def draw(
        self,
        form_x: Callable[[float], str] | None = None,
    ) -> None:
        """Draw grid lines, tick labels and axis labels. `form_x` turns a value of the x axis into its label."""
        left, top, width, height = self.box
        canvas, bottom = self.canvas, top + height
        for value in self.y.ticks():
            _, y = self.at(self.x.low, value)
            canvas.path([(left, y), (left + width, y)], "grid")
            canvas.text(left - 6, y + 4, self.y.text(value), anchor="end")
        end = -math.inf
        for value in self.x.ticks():
            x, _ = self.at(value, self.y.low)
            text = (form_x or self.x.text)(value)
            half = len(text) * CHARACTER / 2
            canvas.path([(x, bottom), (x, bottom + 4)], "axis")
            if x - half > end + 4:
                canvas.text(x, bottom + 17, text, anchor="middle")
                end = x + half
        canvas.path([(left, top), (left, bottom), (left + width, bottom)], "axis")
        canvas.text(left + width / 2, bottom + 35, self.x.label, "t label", "middle")
        canvas.text(left - 34, top - 9, self.y.label, "t label")


def legend(canvas: Canvas, entries: Sequence[tuple[str, Callable[[float, float], None]]], top: float) -> float:
    """Draw a legend of entries (text, function that draws the sign at x, y) and return the y where it ends."""
    x, y = 12.0, top
    for text, sign in entries:
        needed = 20 + len(text) * CHARACTER + 14
        if x > 12 and x + needed > canvas.width:
            x, y = 12.0, y + 18
        sign(x + 6, y)
        canvas.text(x + 18, y + 4, text)
        x += needed
    return y + 12 if entries else top
