"""Find out where end-to-end training (LSQ) goes wrong: its error on three kinds of points, and its images.

    python recipes/lsq_points.py CALIBRATED.safetensors [--iters 60] [--images 64]

CALIBRATED is `dqtool calibrate --scaling keep` of a model that was not dilated. Every row trains from the same quantizers, and
its error is measured on the points that it was trained on, on points of the full-precision model's trajectory from other
noise, and on the points that it visits itself. Writes `recipes/results/lsq-points.md` and `.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dqtool import report
from dqtool.artifacts import Artifact, environment, open_artifact
from dqtool.artifacts.files import write_text
from dqtool.artifacts.outputs import check_results
from dqtool.stages.registry import make_options, stage_function
from dqtool.stages.shared.settings import RunSettings

ROWS: dict[str, dict[str, Any]] = {
    "untrained": {"method": "ptq"},
    "LSQ, rate 0.02": {"method": "lsq", "rate": 10 / 3},
    "LSQ, rate 0.006": {"method": "lsq"},
    "LSQ, rate 0.002": {"method": "lsq", "rate": 1 / 3},
    "own trajectory, rate 0.006": {"method": "on-policy", "rate": 0.3},
}
"""Rows with their options; a rate is the part of its quantization step that a weight moves in an iteration."""
OUTPUT = Path(__file__).parent / "results" / "lsq-points"
TRAINED_ON = 320
"""Recorded points that the error of training is measured on."""


def measured(distilled: Artifact, calibrated: Artifact, images: int) -> dict[str, float]:
    """Return the relative squared errors of a network's predictions on each kind of point, and its PSNR in dB."""
    import torch

    from dqtool.models.sampling.sampler import image_seeds, initial_noise
    from dqtool.stages.eval import network_of_artifact
    from dqtool.stages.evaluation.images import maker_of_artifact
    from dqtool.stages.shared.artifact_models import teacher_of
    from dqtool.training.data import Trajectory

    maker = maker_of_artifact(distilled, images, 1)
    sampler, family = maker.sampler, maker.sampler.family
    teacher, student = teacher_of(calibrated.manifest, calibrated.tensors()), network_of_artifact(distilled, "simulate")
    sums: dict[str, list[float]] = {}

    def add(kind: str, x: Any, timestep: Any, found: Any = None, exact: Any = None) -> None:
        exact = family.predict(teacher, x, timestep, {}) if exact is None else exact
        found = family.predict(student, x, timestep, {}) if found is None else found
        total = sums.setdefault(kind, [0.0, 0.0])
        total[0] += float((found - exact).square().sum())
        total[1] += float(exact.square().sum())

    noise, seeds = initial_noise(maker.shape, range(images), 1), image_seeds(range(images), 1)
    with torch.no_grad():
        points = Trajectory.from_tensors(calibrated.tensors())
        for row, timestep in enumerate(points.timesteps):
            mine = (points.rows == row).nonzero()[:, 0][: TRAINED_ON // len(points.timesteps)]
            add("trained", points.x[mine], timestep)
        expected = sampler.run(teacher, noise, {}, seeds, lambda x, t, y: add("fresh", x, t, exact=y))
        got = sampler.run(student, noise, {}, seeds, lambda x, t, y: add("own", x, t, found=y))
    error = (got.clamp(-1, 1) - expected.clamp(-1, 1)).square().flatten(1).mean(1).clamp_min(1e-12)
    return {kind: a / b for kind, (a, b) in sums.items()} | {"psnr": float((10 * torch.log10(4 / error)).mean())}


def rendered(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    lines = [
        "# End-to-end training on recorded points and on its own",
        "",
        f"zoo:digits-ddpm at 4/4, {result['iters']} iterations of the network, {result['points']} recorded points. Relative squared "
        "error of the predictions, in percent: on the points that were trained on, on fresh points of the full-precision "
        f"model's trajectory, and on the points that the network visits itself; PSNR of {result['images']} images.",
        "",
        "| row | trained on, % | fresh, % | own, % | PSNR, dB |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {name} | {100 * row['trained']:.3f} | {100 * row['fresh']:.3f} | {100 * row['own']:.3f} | {row['psnr']:.2f} |"
            for name, row in result["rows"].items()
        ),
        "",
        f"Made by `{result['command']}`.",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Train, measure and write the rows one by one; return the exit code."""
    parser = argparse.ArgumentParser(description="Measure the errors of end-to-end training.")
    parser.add_argument("calibrated")
    parser.add_argument("--iters", type=int, default=60)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("-o", "--output", type=Path, default=OUTPUT)
    args = parser.parse_args(arguments)
    report.set_quiet(True)
    check_results(args.output.with_suffix(".json"), [args.output.with_suffix(".md")], [args.calibrated])
    calibrated = open_artifact(args.calibrated, ["calibrate"])
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="dqtool-lsq-") as work:
        for number, (name, options) in enumerate(ROWS.items()):
            path = f"{work}/{number}.safetensors"
            given = {"artifact": args.calibrated, "output": path, "bits": "4/4", "correct_noise": False} | options
            given |= {} if options["method"] == "ptq" else {"iters": args.iters}
            stage_function("distill")(make_options("distill", given), RunSettings(quiet=True))
            rows[name] = measured(open_artifact(path), calibrated, args.images)
            print(name, rows[name], flush=True)
            result = {
                "format": "dqtool-lsq-points/1",
                "command": "make lsq-points",
                "iters": args.iters,
                "images": args.images,
                "points": sum(calibrated.manifest.metrics.samples_per_step or []),
                "rows": rows,
                "environment": environment("cpu", 1),
            }
            write_text(args.output.with_suffix(".json"), json.dumps(result, indent=1, sort_keys=True) + "\n")
            write_text(args.output.with_suffix(".md"), rendered(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
