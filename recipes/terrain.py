"""Quantize the terrain model of the PyPI package adaptive-terrain-diffusion and compare its height maps with full precision.

    make terrain                       writes recipes/results/terrain.md, .json and .png
    python recipes/terrain.py --maps 16 --samples 32 --passes 16      a smaller run

The settings are uniform bits and, for each, bits chosen by measured errors within the same bit operations.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
UNIFORM = ("8/8", "6/6", "4/8", "4/4")
BANDS = 4


def main() -> None:
    """Convert, calibrate, quantize and measure for each number of steps; write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("results/terrain"))
    parser.add_argument("--maps", type=int, default=128)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--passes", type=int, default=32)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--bits", nargs="+", default=list(UNIFORM))
    parser.add_argument("--iters", type=int, default=0, help="training iterations per block")
    given = parser.parse_args()
    check()
    work: Path = given.work
    work.mkdir(parents=True, exist_ok=True)
    model = work / "model"
    if not model.is_dir():
        from terrain_model import find_graph, write_pipeline

        write_pipeline(find_graph(), model)
    dqtool("dilate", model, "-o", work / "dilated.safetensors")
    rows = [row for steps in given.steps for row in measure(given, work, steps)]
    save(rows, given)
    shutil.copy(work / rows[-1]["grid"], RESULTS / "terrain.png")


def measure(given: argparse.Namespace, work: Path, steps: int) -> list[dict[str, Any]]:
    """Return one row of figures for each setting at this number of steps."""
    calibrated = work / f"calibrated-{steps}.safetensors"
    samples = max(given.samples, steps)
    dqtool("calibrate", work / "dilated.safetensors", "--steps", steps, "--samples", samples, "-o", calibrated)
    rows = []
    for bits in given.bits:
        own = quantize(given, work, calibrated, f"{steps}-{bits.replace('/', '-')}", ["--bits", bits])
        rows.append({"steps": steps, "bits": bits, **own})
        limit = own["bops"] / 1e9
        chosen = ["--bits", "auto", "--target-bops", f"{limit:.3f}", "--passes", str(given.passes)]
        own = quantize(given, work, calibrated, f"{steps}-auto-{bits.replace('/', '-')}", chosen)
        rows.append({"steps": steps, "bits": f"auto, bit operations of {bits}", **own})
    return rows


def quantize(given: argparse.Namespace, work: Path, calibrated: Path, name: str, options: list[str]) -> dict[str, Any]:
    """Return the figures of one setting."""
    distilled, report, maps = work / f"{name}.safetensors", work / f"{name}-eval.json", work / f"{name}.npz"
    passes = ["--iters", given.iters, *(["--refine-iters", 0] if not given.iters else [])]
    dqtool("distill", calibrated, *options, *passes, "-o", distilled)
    metrics = ["--metrics", "similarity,cost", "--samples", given.maps, "--save-samples", maps]
    dqtool("eval", distilled, *metrics, "-o", report, "--grid", work / f"{name}.png")
    found = json.loads(report.read_text())["metrics"]
    from dqtool.artifacts import read_manifest
    from dqtool.core.cost import bops

    return {
        "grid": f"{name}.png",
        "psnr": found["psnr"]["mean"],
        "megabytes": distilled.stat().st_size / 1e6,
        "bops": bops(read_manifest(distilled).layers),
        **figures_of_maps(maps),
        "command": " ".join(map(str, ["dqtool distill", *options, *passes])),
    }


def figures_of_maps(path: Path) -> dict[str, Any]:
    """Return height range, mean slope and power by band of frequency of the maps in an npz file."""
    import numpy as np

    with np.load(path) as archive:
        maps = torch.from_numpy(np.asarray(archive["arr_0"], dtype="float32"))
    maps = maps[..., 0] / 127.5 - 1  # grey: three equal channels
    slope = torch.stack([torch.diff(maps, dim=dim).abs().mean() for dim in (1, 2)]).mean()
    power = torch.fft.rfft2(maps).abs().square().mean(0)
    rows, columns = torch.fft.fftfreq(maps.shape[1]), torch.fft.rfftfreq(maps.shape[2])
    radius = (rows[:, None].square() + columns.square()).sqrt() * 2
    edges = torch.logspace(-BANDS + 1, 0, BANDS, base=2).tolist()
    bands = []
    low = 0.0
    for edge in edges:
        bands.append(float(power[(radius > low) & (radius <= edge)].mean()))
        low = edge
    return {"height": [float(maps.min()), float(maps.max())], "slope": float(slope), "spectrum": bands}


def check() -> None:
    """Refuse, before any work, to replace results that are not this script's."""
    from dqtool.artifacts.outputs import check_results

    check_results(RESULTS / "terrain.json", [RESULTS / "terrain.md"])


def save(rows: list[dict[str, Any]], given: argparse.Namespace) -> None:
    """Write the rows as JSON and as a table."""
    size = f"{given.maps} maps, {given.samples} calibration samples, {given.passes} passes, {given.iters} iterations"
    (RESULTS / "terrain.json").write_text(
        json.dumps({"format": "dqtool-result/1", "size": size, "rows": rows}, indent=1) + "\n"
    )
    lines = [
        "# Terrain: a consistency model that others trained",
        "",
        f"`make terrain`: {size}. PSNR to full precision of the same seeds.",
        "",
        "| steps | bits | PSNR, dB | MB | giga bit operations | slope |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = (row["steps"], row["bits"], f"{row['psnr']:.1f}", f"{row['megabytes']:.2f}", f"{row['bops'] / 1e9:.0f}")
        lines.append(f"| {' | '.join(map(str, cells))} | {row['slope']:.4f} |")
    (RESULTS / "terrain.md").write_text("\n".join(lines) + "\n")


def dqtool(*arguments: object) -> None:
    """Run one command."""
    subprocess.run([sys.executable, "-m", "dqtool", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
