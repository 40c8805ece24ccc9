"""What each part of the method gains at 4/4 on zoo:digits-ddpm, over three seeds (`make ablation`).

The rows add one part at a time: PTQ (static quantizers), +TPQ (one quantizer per step), +WD (weight dilation), +BKD
(training). A seed decides the calibration trajectory, the training and the images. Every stage is cached: an
interrupted run goes on where it stopped. Writes recipes/results/ablation.json and .md.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from dqtool.artifacts import environment
from dqtool.stages.calibrate import CalibrateOptions, calibrate
from dqtool.stages.dilate import DilateOptions, dilate
from dqtool.stages.distill import DistillOptions, distill
from dqtool.stages.eval import EvalOptions, evaluate
from dqtool.stages.running import Common

MODEL = "zoo:digits-ddpm"
ROWS = {
    "PTQ": {"scaling": "none", "static": True, "iters": 0},
    "+ TPQ": {"scaling": "none", "static": False, "iters": 0},
    "+ WD": {"scaling": "wd", "static": False, "iters": 0},
    "+ BKD": {"scaling": "wd", "static": False, "iters": None},
}
RESULTS = Path(__file__).parent / "results"


def run(row: str, seed: int, work: Path, samples: int, bits: str) -> dict:
    """One cell of the table: the figures of `eval`."""
    options = ROWS[row]
    common = Common()
    scaling, slug = options["scaling"], f"{row.strip('+ ').lower()}-{bits.replace('/', '')}-{seed}"
    dilated = dilate(DilateOptions(MODEL, str(work / f"{scaling}.safetensors"), scaling=scaling), common)
    calibrated = calibrate(
        CalibrateOptions(dilated, str(work / f"calibrated-{scaling}-{seed}.safetensors"), seed=seed), common
    )
    distilled = distill(
        DistillOptions(
            calibrated,
            str(work / f"{slug}.safetensors"),
            bits=bits,
            iters=options["iters"],
            static=options["static"],
            seed=seed,
        ),
        common,
    )
    report = evaluate(
        EvalOptions(
            distilled, str(work / f"{slug}-eval.json"), metrics=("digits", "similarity"), samples=samples, seed=seed
        ),
        common,
    )
    manifest = json.loads(Path(report).read_text())
    distill_seconds = json.loads(Path(distilled).with_suffix(".json").read_text())["seconds"]
    return manifest["metrics"] | {"distill_seconds": distill_seconds}


def main() -> None:
    """Run all cells and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--bits", default="4/4")
    parser.add_argument("--work", type=Path, default=Path("results/ablation"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    table = {row: [run(row, seed, args.work, args.samples, args.bits) for seed in args.seeds] for row in ROWS}
    reference = [cell["reference"]["fd.digits"] for cell in table["PTQ"]]
    lines = [
        f"# What each part gains: {MODEL} at {args.bits}, DDIM 20 steps, {args.samples} images, seeds {args.seeds}",
        "",
        "Made by `make ablation`. fd.digits is the Fréchet distance on the digit classifier's features; the excess is what a row",
        "adds to the full-precision model's, as a share of what PTQ adds. Mean and sample standard deviation over the seeds.",
        "",
        "| row | fd.digits | of full precision | excess left | same digit | PSNR, dB |",
        "| --- | --- | --- | --- | --- | --- |",
        f"| full precision | {spread(reference)} | 1.00x | | | |",
    ]
    for row, cells in table.items():
        fd = [cell["fd.digits"] for cell in cells]
        ratio = [cell["fd.digits_ratio"] for cell in cells]
        left = [(f - r) / (p["fd.digits"] - r) for f, r, p in zip(fd, reference, table["PTQ"], strict=True)]
        same = [100 * cell["same_digit_share"] for cell in cells]
        psnr = [cell["psnr"]["mean"] for cell in cells]
        lines.append(
            f"| {row} | {spread(fd)} | {spread(ratio)}x | {100 * statistics.mean(left):.1f} % | {spread(same)} % | {spread(psnr)} |"
        )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "ablation.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    record = {
        "samples": args.samples,
        "seeds": args.seeds,
        "bits": args.bits,
        "rows": table,
        "environment": environment(),
    }
    (RESULTS / "ablation.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print("\n".join(lines))


def spread(values: list[float]) -> str:
    """`mean ± deviation`."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} ± {deviation:.2f}"


if __name__ == "__main__":
    main()
