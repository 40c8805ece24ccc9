"""Compare what outliers can be met with, beside the default: low-rank branches and rotated inputs, untrained.

    make tails                         writes recipes/results/tails.md and .json
    python recipes/tails.py --models digits --images 64      a smaller run

Models are the terrain model of the PyPI package adaptive-terrain-diffusion (one step) and the embedded digits-ddpm. A row is a
scaling and a rank: PSNR to full precision of the same seeds, bytes of the file, bit operations, and the processor time of a step
of the `cpu` runtime in that of the first row at the same bits, measured in turns.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import dqtool
from dqtool.artifacts import read_manifest
from dqtool.artifacts.outputs import check_results
from dqtool.core.cost import bops
from dqtool.stages.calibrate import CalibrateOptions, calibrate
from dqtool.stages.dilate import DilateOptions, dilate
from dqtool.stages.distill import DistillOptions, distill
from dqtool.stages.eval import EvalOptions, evaluate
from dqtool.stages.export import ExportOptions, export
from dqtool.stages.shared.settings import RunSettings

RESULTS = Path(__file__).parent / "results"
METHODS = (
    ("keep", 0),
    ("keep", 16),
    ("rotation", 0),
    ("rotation", 16),
    ("auto", 0),
    ("auto", 4),
    ("auto", 8),
    ("auto", 16),
)
"""Scaling of `calibrate` (keep leaves Weight Dilation) and rank of the rows."""
BITS = {"terrain": ("4/4", "4/8", "8/8"), "digits": ("4/4", "3/3", "8/8")}
STEPS = {"terrain": 1, "digits": 20}
ROUNDS = 5
"""Times that a step of each network is timed."""


def main() -> None:
    """Calibrate, quantize, measure; write the results."""
    check_results(RESULTS / "tails.json", [RESULTS / "tails.md"])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("results/tails"))
    parser.add_argument("--models", nargs="+", default=list(BITS), choices=list(BITS))
    parser.add_argument("--bits", nargs="+", help="only these")
    parser.add_argument("--scalings", nargs="+", default=["keep", "rotation", "auto"], help="only these")
    parser.add_argument("--images", type=int, default=256, help="images of digits")
    parser.add_argument("--maps", type=int, default=16, help="maps of terrain")
    parser.add_argument("--samples", type=int, default=32, help="calibration samples of terrain; digits take 32 a step")
    given = parser.parse_args()
    command = " ".join(["make tails", *([f"ARGS={shlex.join(sys.argv[1:])!r}"] if sys.argv[1:] else [])])
    save([{**row, "command": command} for model in given.models for row in rows_of(model, given)])


def rows_of(model: str, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the rows of one model."""
    work: Path = given.work / model
    work.mkdir(parents=True, exist_ok=True)
    settings = RunSettings(quiet=True)
    dilated = str(work / "dilated.safetensors")
    dilate(DilateOptions(source_of(model, work), output=dilated), settings)
    steps = STEPS[model]
    samples = given.samples if model == "terrain" else 32 * steps
    for bits in given.bits or BITS[model]:
        found: list[tuple[str, dict[str, Any]]] = []
        for scaling, rank in METHODS:
            if scaling not in given.scalings or (bits == "8/8" and rank):
                continue
            calibrated = str(work / f"{scaling}-{bits.replace('/', '-')}.safetensors")
            calibrate(
                CalibrateOptions(dilated, calibrated, steps=steps, samples=samples, scaling=scaling, bits=bits),
                settings,
            )
            directory, row = quantize(work, calibrated, bits, scaling, rank, given, model)
            found.append((directory, row))
            print(json.dumps(row), flush=True)
        for (_, row), ratio in zip(found, time_ratios([directory for directory, _ in found]), strict=True):
            yield {"model": model, "bits": bits, **row, "time": ratio}


def source_of(model: str, work: Path) -> str:
    """Return what `dilate` reads."""
    if model == "digits":
        return "zoo:digits-ddpm"
    from terrain_model import find_graph, write_pipeline

    if not (work / "model").is_dir():
        write_pipeline(find_graph(), work / "model")
    return str(work / "model")


def quantize(
    work: Path, calibrated: str, bits: str, scaling: str, rank: int, given: argparse.Namespace, model: str
) -> tuple[str, dict[str, Any]]:
    """Return the exported directory of one setting and its figures."""
    settings = RunSettings(quiet=True)
    name = f"{scaling}-{rank}-{bits.replace('/', '-')}"
    distilled, directory, report = (str(work / f"{name}{end}") for end in ("-q.safetensors", "", ".json"))
    distill(DistillOptions(calibrated, distilled, bits=bits, method="ptq", low_rank=rank, protect=0.0), settings)
    export(ExportOptions(distilled, directory), settings)
    images = given.maps if model == "terrain" else given.images
    evaluate(
        EvalOptions(directory, report, metrics=("similarity",), samples=images, runtime="cpu",
                    batch_size=4 if model == "terrain" else 64),
        settings,
    )  # fmt: skip
    layers = read_manifest(distilled).layers
    return directory, {
        "scaling": scaling,
        "rank": rank,
        "images": images,
        "psnr": json.loads(Path(report).read_text())["metrics"]["psnr"]["mean"],
        "megabytes": Path(distilled).stat().st_size / 1e6,
        "gigabops": bops(layers) / 1e9,
        "rotated": sum(bool(layer.rotation) for layer in layers),
    }


def time_ratios(directories: list[str]) -> list[float]:
    """Return the processor time of a step of each exported network, in that of the first; the networks take turns."""
    networks = [dqtool.load(directory, "cpu") for directory in directories]
    seconds: list[list[float]] = [[] for _ in networks]
    config = networks[0].config
    sample = torch.randn(1, config.in_channels, config.sample_size, config.sample_size)
    labels = {"class_labels": torch.zeros(1, dtype=torch.long)} if config.num_class_embeds else {}
    for turn in range(ROUNDS + 1):
        for network, times in zip(networks, seconds, strict=True):
            start = time.process_time()
            with torch.no_grad():
                network(sample, network.timesteps[0], **labels)
            if turn:  # the first call packs weights
                times.append(time.process_time() - start)
    return [statistics.median(times) / statistics.median(seconds[0]) for times in seconds]


def save(rows: list[dict[str, Any]]) -> None:
    """Write the rows as JSON and as a table, in place of earlier rows of the same settings."""
    path = RESULTS / "tails.json"
    known = {key_of(row): row for row in (json.loads(path.read_text())["rows"] if path.is_file() else [])}
    known |= {key_of(row): row for row in rows}
    kept = [known[key] for key in sorted(known)]
    path.write_text(json.dumps({"format": "dqtool-result/1", "command": "make tails", "rows": kept}, indent=1) + "\n")
    lines = [
        "# Low-rank branches and rotated inputs",
        "",
        "Nothing is trained or protected. PSNR to full precision of the same seeds; time of a step of the `cpu` runtime in that of",
        "the first row of the same run, by processor time on one thread (empty: not timed). Ranks are those of `distill --low-rank`.",
        "",
        "| model | bits | scaling | rank | rotated layers | images | PSNR, dB | MB | giga bit operations | time | run |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    runs = list(dict.fromkeys(row["command"] for row in kept))
    for row in kept:
        cells = [row[key] for key in ("model", "bits", "scaling", "rank", "rotated", "images")]
        cells += [
            f"{row['psnr']:.1f}",
            f"{row['megabytes']:.2f}",
            f"{row['gigabops']:.1f}",
            "" if row["time"] is None else f"{row['time']:.2f}",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} | {runs.index(row['command']) + 1} |")
    lines += ["", *(f"{number}. `{run}`" for number, run in enumerate(runs, 1))]
    (RESULTS / "tails.md").write_text("\n".join(lines) + "\n")


def key_of(row: dict[str, Any]) -> tuple[str, str, str, int]:
    """Return what identifies a row."""
    return row["model"], row["bits"], row["scaling"], row["rank"]


if __name__ == "__main__":
    main()
