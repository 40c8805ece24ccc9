"""Style sheets of charts and of the whole page. Colours have a contrast of 4.5:1 with the light and the dark background."""

from __future__ import annotations

__all__ = ["CHART_STYLE", "STYLE"]

_LIGHT = """
--ground: #ffffff; --panel: #f7f8fa; --ink: #1b2026; --soft: #5a6470; --rule: #d9dee4; --grid: #e6e9ee;
--c0: #1f5fa8; --c1: #bf4a0a; --c2: #0b7264; --c3: #8b2fa0; --c4: #8a6100; --c5: #b3205f; --c6: #467008; --c7: #4a5a70;
--h0: #eef3f8; --h1: #d6e4f1; --h2: #b9d2e9; --h3: #95bbdd; --h4: #6c9fce; --h5: #4683bb; --h6: #2a679f; --h7: #174b7c;
--h8: #0b3157; --warn: #8a4b00;
"""
_DARK = """
--ground: #14181d; --panel: #1b2027; --ink: #e4e8ed; --soft: #9ca7b4; --rule: #343c46; --grid: #272e36;
--c0: #79b4f2; --c1: #f79a5e; --c2: #55cdb8; --c3: #d5a0ef; --c4: #dcba4a; --c5: #f48ab4; --c6: #a6d05c; --c7: #a9b6c8;
--h0: #1d252f; --h1: #203247; --h2: #244363; --h3: #2b5783; --h4: #386fa5; --h5: #4f8bc4; --h6: #75a9dc; --h7: #a3c9ee;
--h8: #d8ebff; --warn: #f0b35c;
"""

_THEME = (
    f":root {{ color-scheme: light dark; {_LIGHT} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}\n"
)

_SERIES = "\n".join(f".s{i} {{ --c: var(--c{i}); }} .h{i} {{ fill: var(--h{i}); }}" for i in range(8))

_CHARTS = f"""
{_SERIES}
.h8 {{ fill: var(--h8); }}
svg text {{ font: 12px system-ui, -apple-system, "Segoe UI", sans-serif; fill: var(--soft); }}
svg .small {{ font-size: 10.5px; }}
svg .label {{ fill: var(--ink); }}
svg .strong {{ fill: var(--ink); font-weight: 600; }}
.grid {{ stroke: var(--grid); fill: none; }}
.axis {{ stroke: var(--rule); fill: none; }}
.line {{ stroke: var(--c); stroke-width: 1.8; fill: none; stroke-linejoin: round; }}
.thin {{ stroke-width: 1.2; }}
.dash {{ stroke-dasharray: 5 4; }}
.mark {{ fill: var(--c); stroke: var(--ground); stroke-width: 1; }}
.area {{ fill: var(--c); fill-opacity: 0.4; }}
.ref {{ --c: var(--soft); }}
.hollow {{ fill: var(--ground); stroke: var(--c); stroke-width: 1.6; }}
.probe {{ fill: transparent; }}
.probe:hover {{ stroke: var(--ink); }}
"""

CHART_STYLE = _THEME + _CHARTS
"""Style sheet of a chart that is an image of its own."""

STYLE = (
    _THEME
    + """
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); overflow-wrap: anywhere;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 1.25rem; margin: 44px 0 0; padding-top: 18px; border-top: 2px solid var(--rule); }
h3 { font-size: 1rem; margin: 30px 0 0; }
p { max-width: 78ch; margin: 8px 0; }
.lead { color: var(--soft); }
.note { color: var(--warn); font-size: 0.9rem; border-left: 3px solid currentColor; padding-left: 10px; }
nav { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); gap: 4px 32px; margin: 18px 0 0; }
nav h2 { font-size: 0.95rem; margin: 10px 0 4px; padding: 0; border: 0; }
nav ol { list-style: none; padding: 0; margin: 0; font-size: 0.92rem; }
a { color: var(--c0); }
.scroll { overflow-x: auto; margin: 12px 0; position: relative; }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--c0); outline-offset: 2px; }
table { border-collapse: collapse; font-size: 0.87rem; font-variant-numeric: tabular-nums; min-width: min(100%, 480px); }
.caption { color: var(--soft); font-size: 0.87rem; margin: 12px 0 0; }
.caption + .scroll { margin-top: 2px; }
caption.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
th, td { padding: 5px 12px 5px 0; text-align: left; vertical-align: baseline; border-bottom: 1px solid var(--grid);
  white-space: nowrap; overflow-wrap: normal; }
thead th { color: var(--soft); font-weight: 500; border-bottom-color: var(--rule); white-space: normal; vertical-align: bottom; }
tbody th { font-weight: 600; }
th.n, td.n { text-align: right; padding: 5px 0 5px 14px; }
.n + :not(.n) { padding-left: 18px; }
small { color: var(--soft); }
.arrow { text-decoration: none; }
details { margin: 10px 0; }
summary { cursor: pointer; color: var(--soft); font-size: 0.9rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); gap: 18px 24px; margin: 12px 0; }
figure { margin: 0; min-width: 0; }
.charts figure { background: var(--panel); border-radius: 8px; padding: 12px 12px 8px; align-self: start; }
.charts figcaption span { display: block; color: var(--soft); font-size: 0.85rem; }
.charts svg { display: block; width: 100%; height: auto; margin-top: 8px; }
.charts .hollow, .charts .mark { --ground: var(--panel); }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 16px 24px; margin: 12px 0; }
.pictures figure { max-width: 820px; }
.pictures img { display: block; max-width: 100%; height: auto; border-radius: 6px; background: #fff; }
.pictures figcaption { color: var(--soft); font-size: 0.87rem; margin-top: 4px; }
@media (max-width: 520px) { main { padding: 16px 14px 40px; } .charts figure { padding: 10px 6px 6px; } }
@media print { details > *:not(summary) { display: block; } .charts figure { break-inside: avoid; } }
"""
    + _CHARTS
)
"""Style sheet of the page, charts included."""
