"""Figures of height maps, and the table and picture of recipes/results/terrain.*."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["figures_of", "write_results"]

BANDS = ((0.0, 0.125), (0.125, 0.25), (0.25, 0.5), (0.5, 1.0))
"""Bands of the spectrum, in units of the highest frequency along an axis."""
SHOWN = (0, 40, 80)
"""Maps in the picture."""
PICTURED = (
    "8/8 default",
    "4/8 default",
    "4/4 default",
    "4/4 trained",
    "onnxruntime static",
    "onnxruntime dynamic",
    "NNCF",
)


def figures_of(maps: Tensor, reference: Tensor) -> dict[str, Any]:
    """Return PSNR in dB, height range, mean slope and power by band of maps `[N, 1, H, W]` in [-1, 1]; the last two as
    ratios to those of `reference`, the same maps in full precision."""
    from dqtool.metrics.similarity import psnr

    each = psnr(maps, reference, 2.0)
    ours, theirs = spectrum(maps), spectrum(reference)
    return {
        "maps": len(maps),
        "psnr": float(each.mean()),
        "psnr_least": float(each.min()),
        "height": [float(maps.min()), float(maps.max())],
        "height_range": float(spread(maps) / spread(reference)),
        "slope": float(slope(maps) / slope(reference)),
        "spectrum": [a / b for a, b in zip(ours, theirs, strict=True)],
    }


def spread(maps: Tensor) -> Tensor:
    """Return the mean over maps of highest minus lowest point."""
    heights = maps.flatten(1)
    return (heights.amax(1) - heights.amin(1)).mean()


def slope(maps: Tensor) -> Tensor:
    """Return the mean difference of neighbouring points."""
    return torch.stack([torch.diff(maps, dim=dim).abs().mean() for dim in (2, 3)]).mean()


def spectrum(maps: Tensor) -> list[float]:
    """Return the mean power in each of `BANDS`."""
    power = torch.fft.rfft2(maps[:, 0]).abs().square().mean(0)
    rows, columns = torch.fft.fftfreq(maps.shape[2]), torch.fft.rfftfreq(maps.shape[3])
    radius = (rows[:, None].square() + columns.square()).sqrt() * 2
    return [float(power[(radius > low) & (radius <= high)].mean()) for low, high in BANDS]


def write_results(rows: Sequence[Any], given: argparse.Namespace) -> None:
    """Write the rows that were measured as JSON and as a table, and the picture of some of them."""
    found = []
    for row in rows:
        record = given.work / f"{row.file}.row.json"
        if record.is_file():
            found.append(json.loads(record.read_text()))
    about = {
        "format": "dqtool-result/1",
        "title": "Terrain: a consistency model that others trained",
        "command": "make terrain",
        "calibration_samples": given.samples,
        "passes": given.passes,
    }
    (given.results / "terrain.json").write_text(json.dumps({**about, "rows": found}, indent=1) + "\n")
    lines = [
        "# Terrain: a consistency model that others trained",
        "",
        f"`make terrain`: height maps of 128x128 of noise that calibration did not see, over all difficulties; "
        f"{given.samples} calibration samples for one step and 128 for each of several, {given.passes} backward passes to measure errors. PSNR is the mean over maps, to "
        "full precision of the same seeds; lowest is the worst map. Range, slope and spectrum are ratios to full "
        "precision's; the spectrum has four bands, from coarse to fine. Size is that of the file. Rows of "
        "fewer maps draw every Nth of the same maps. Features is the Fréchet distance to full precision's maps by the features of "
        f"EfficientNet-Lite0, which knows photographs{floors(found)}. Compare it at equal numbers of maps.",
        "",
        "| steps | setting | what | maps | PSNR, dB | lowest | MB | giga bit operations | range | slope | spectrum | features |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in found:
        operations = f"{row['bops'] / 1e9:.0f}" if "bops" in row else "-"
        bands = " ".join(f"{ratio:.2f}" for ratio in row["spectrum"])
        cells = [
            str(row["steps"]),
            row["name"],
            row["what"],
            str(row["maps"]),
            f"{row['psnr']:.1f}",
            f"{row['psnr_least']:.1f}",
        ]
        cells += [f"{row['bytes'] / 1e6:.2f}", operations, f"{row['height_range']:.2f}", f"{row['slope']:.2f}", bands]
        cells.append(f"{row['features']:.2f}" if "features" in row else "-")
        lines.append(f"| {' | '.join(cells)} |")
    protected = [row for row in found if "protected" in row]
    if protected:
        lines += ["", "What the defaults protect:", ""]
    for row in protected:
        about = row["protected"]
        lines.append(
            f"- {row['name']}, {row['steps']} {'step' if row['steps'] == 1 else 'steps'}: {about['layers']} layers get more "
            f"bits, for {about['more_bytes']:.1%} more bytes of weights and {about['more_bops']:.1%} more bit operations."
        )
    (given.results / "terrain.md").write_text("\n".join(lines) + "\n")
    write_picture(rows, given)


def floors(found: Sequence[dict[str, Any]]) -> str:
    """Return the distances of full precision to itself on other noise, as words that go on a sentence."""
    steps = {row["steps"]: row["features_floor"] for row in found if "features_floor" in row and row["every"] == 1}
    if not steps:
        return ""
    named = ", ".join(f"{floor:.2f} at {n} {'step' if n == 1 else 'steps'}" for n, floor in steps.items())
    return f"; full precision has {named} to itself on other noise"


def write_picture(rows: Sequence[Any], given: argparse.Namespace) -> None:
    """Write the same maps of full precision and of some settings, one step, side by side."""
    from dqtool.metrics.grid import save_grid

    files = [("full precision", given.work / f"full-1-{given.maps}-{every}.pt", every) for every in (1, 2, 4, 8)]
    for row in rows:
        record = given.work / f"{row.file}.row.json"
        if row.steps == 1 and row.name in PICTURED and record.is_file():
            every = json.loads(record.read_text()).get("every", 1)
            files.append((row.name, given.work / f"{row.file}.maps.pt", every))
    panels: dict[str, Tensor] = {}
    for caption, path, every in files:
        if path.is_file() and not any(index % every for index in SHOWN):
            panels.setdefault(caption, torch.load(path)[[index // every for index in SHOWN]])
    if len(panels) > 1:
        save_grid(list(panels.items()), str(given.results / "terrain.png"), len(SHOWN), 1)
