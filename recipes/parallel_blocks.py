"""Measure what `distill --parallel-blocks` costs in quality on `digits-ddpm` at 4/4, against training in order.

    python recipes/parallel_blocks.py [--seeds 3] [--samples 1280] [--iters 60] [--images 256] [--work DIR]

The script writes recipes/results/parallel-blocks.md and .json. Each seed distills one calibration in order, at once without
repair, and at once with the repair that is the default; each with blocks alone, and with the second pass and the correction of
predictions. PSNR is that to full precision on the same seeds of noise. The number of processes changes nothing in the first
sweep, and the order of sums in what follows. With `--work`, an interrupted measurement goes on from what is in that directory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
FORMAT = "dqtool-parallel-blocks/1"
BAR = 0.3
"""Most dB that the default may cost before its documentation must say so."""
ORDERS: dict[str, tuple[str, ...]] = {
    "in order": (),
    "at once, no repair": ("--parallel-blocks", "--repair-iters", "0"),
    "at once, repaired": ("--parallel-blocks",),
}
PARTS: dict[str, tuple[str, ...]] = {
    "blocks alone": ("--refine-iters", "0", "--no-correct-noise"),
    "whole training": (),
}
"""The second pass has as many iterations as a block."""


def run(*arguments: str, cwd: Path) -> None:
    """Run a command line of dqtool."""
    subprocess.run(
        [sys.executable, "-m", "dqtool", *arguments, "--quiet"], cwd=cwd, check=True, stdout=subprocess.DEVNULL
    )


def measure(work: Path, part: str, order: str, seed: int, iters: int, images: int) -> dict[str, Any]:
    """Distill and evaluate; return PSNR and times."""
    name = f"{part}-{order}-{seed}".replace(", ", "-").replace(" ", "-")
    given = ("distill", "calibrated.safetensors", "--bits", "4/4", "--iters", str(iters), "--seed", str(seed))
    passes = PARTS[part] or ("--refine-iters", str(iters))
    run(*given, *ORDERS[order], *passes, "-o", f"{name}.safetensors", cwd=work)
    shown = ("--samples", str(images), "--metrics", "similarity", "-o", f"{name}-eval.json")
    run("eval", f"{name}.safetensors", *shown, cwd=work)
    trained = json.loads((work / f"{name}.json").read_text(encoding="utf-8"))
    figures = json.loads((work / f"{name}-eval.json").read_text(encoding="utf-8"))["metrics"]
    row = {
        "part": part,
        "order": order,
        "seed": seed,
        "psnr": figures["psnr"]["mean"],
        "training_cpu_seconds": trained["metrics"]["training_cpu_seconds"],
        "parameters": trained["parameters"].get("parallel_blocks"),
    }
    print(json.dumps(row), flush=True)
    return row


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean difference to training in order, in dB, for each part and order."""
    found: dict[str, dict[str, float]] = {}
    for part in dict.fromkeys(row["part"] for row in rows):
        by = {(row["order"], row["seed"]): row["psnr"] for row in rows if row["part"] == part}
        seeds = sorted({seed for _, seed in by})
        found[part] = {
            order: statistics.mean(by[order, seed] - by["in order", seed] for seed in seeds)
            for order in dict.fromkeys(order for order, _ in by)
            if order != "in order"
        }
    return found


def render(found: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    rows, seeds = found["rows"], sorted({row["seed"] for row in found["rows"]})
    lines = [
        "# Blocks trained at once against training in order, digits-ddpm at 4/4",
        "",
        f"`{found['command']}`: {found['samples']} calibration samples, {found['iters']} iterations a block, "
        f"{found['images']} images, one thread, load average {found['load_average'][0]:.1f} before and "
        f"{found['load_average'][1]:.1f} after. PSNR to full precision in dB. Seconds are those of the processor in training, of "
        "one process.",
        "",
        f"| training | blocks | {' | '.join(f'seed {seed}' for seed in seeds)} | difference | processor, s |",
        f"| --- | --- | {'--- | ' * len(seeds)}--- | --- |",
    ]
    for part, differences in found["difference"].items():
        for order in ("in order", *differences):
            mine = {row["seed"]: row for row in rows if (row["part"], row["order"]) == (part, order)}
            told = "" if order == "in order" else f"{differences[order]:+.2f}"
            cells = " | ".join(f"{mine[seed]['psnr']:.2f}" for seed in seeds)
            cost = statistics.mean(row["training_cpu_seconds"] for row in mine.values())
            lines.append(f"| {part} | {order} | {cells} | {told} | {cost:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, write the results and print them."""
    from dqtool.artifacts.files import write_text
    from dqtool.artifacts.outputs import check_results

    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=1280)
    parser.add_argument("--iters", type=int, default=60)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    parser.add_argument("--work", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "parallel-blocks")
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    path, table = (given.output.with_suffix(suffix) for suffix in (".json", ".md"))
    check_results(path, [table])
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="dqtool-parallel-blocks-") as folder:
        work = Path(folder) if given.work is None else given.work
        work.mkdir(parents=True, exist_ok=True)
        run("dilate", "zoo:digits-ddpm", cwd=work)
        run("calibrate", "--steps", "20", "--samples", str(given.samples), cwd=work)
        rows = [
            measure(work, part, order, seed, given.iters, given.images)
            for seed in range(given.seeds)
            for part in given.parts
            for order in ORDERS
        ]
    found = {
        "format": FORMAT,
        "command": "make parallel-blocks",
        "samples": given.samples,
        "iters": given.iters,
        "images": given.images,
        "load_average": [before, os.getloadavg()[0]],
        "difference": summary(rows),
        "rows": rows,
    }
    write_text(path, json.dumps(found, indent=1) + "\n")
    write_text(table, render(found))
    print(render(found))
    worst = min(differences["at once, repaired"] for differences in found["difference"].values())
    print(f"{BAR} dB are {'kept' if worst >= -BAR else 'exceeded'}")


if __name__ == "__main__":
    main()
