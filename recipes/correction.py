"""Measure what the correction of predictions gains with samplers, steps and guidance that it was not fitted with.

    python recipes/correction.py digits-ddpm=DIR digits-sd=DIR    DIR is an export at 4/4, trained with its defaults

Writes `recipes/results/table-correction.md` and `.json`. Every row samples the same images with the full-precision
network and twice with the export: with its tables switched on, and off.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dqtool import report
from dqtool.artifacts import environment, open_artifact
from dqtool.models.sampling.fitted import differs_by, sentence
from dqtool.stages.evaluation.correction import fitted_of, used_by_maker

SAMPLERS = (
    ("ddim", 20),
    ("ddim", 50),
    ("plms", 20),
    ("dpmsolver", 20),
    ("euler", 20),
    ("unipc", 8),
)
GUIDANCE = {"digits-ddpm": (None,), "digits-sd": (1.2, 3.0)}
OUTPUT = Path(__file__).parent / "results" / "table-correction"


def measured(name: str, directory: str, images: int, runtime: str) -> Iterator[dict[str, Any]]:
    """Yield the figures of one export, a mapping for each sampler, number of steps and weight of guidance."""
    import torch

    import dqtool
    from dqtool.metrics.digits import distance, evaluate_digits
    from dqtool.nn.prediction import set_correcting
    from dqtool.stages.evaluation.images import maker_of_artifact
    from dqtool.stages.evaluation.reference import find_reference, reference_network

    artifact = open_artifact(directory, ["export"])
    fitted = fitted_of(artifact.manifest, True)
    assert fitted is not None
    network = dqtool.load(directory, runtime)
    exact = reference_network(find_reference(None, artifact), artifact.manifest.model)
    for guidance in GUIDANCE.get(name, (None,)):
        for sampler, steps in SAMPLERS:
            maker = maker_of_artifact(artifact, images, 0, steps, None if sampler == "own" else sampler, guidance)
            expected = maker.draw(exact, images, 0, 128, f"{name} {sampler} {steps}")
            used = used_by_maker(maker, fitted)
            row: dict[str, Any] = {
                "model": name,
                "sampler": sampler,
                "steps": steps,
                "guidance": used["guidance"],
                "differs": differs_by(fitted, used),
                "fitted": sentence(fitted),
            }
            for on in (False, True):
                set_correcting(network, on)
                found = maker.draw(network, images, 0, 128, f"{name} {sampler} {steps}, {'on' if on else 'off'}")
                error = (found - expected).square().flatten(1).mean(1).clamp_min(1e-12)
                row["on" if on else "off"] = {
                    "psnr": float((10 * torch.log10(4 / error)).mean()),
                    "fd.digits_from_reference": distance(found, expected),
                    "fd.digits": evaluate_digits(found)["fd.digits"],
                }
            row["gain"] = row["on"]["psnr"] - row["off"]["psnr"]
            yield row


def rendered(result: dict[str, Any]) -> str:
    """Return the table as Markdown."""
    lines = [
        "# Correction of predictions with other samplers than that of the fit",
        "",
        f"{result['images']} images of the same noise for each row, exports at 4/4 in the `{result['runtime']}` runtime. "
        "PSNR and the distance are to the full-precision network with the same sampler, steps and guidance.",
        "",
        *(f"`{name}` was fitted with {text}." for name, text in result["fitted"].items()),
        "",
    ]
    head = ["model", "sampler", "steps", "guidance", "differs in", "PSNR off", "PSNR on", "gain, dB", "distance off", "on"]
    rows = [
        [
            row["model"],
            row["sampler"],
            str(row["steps"]),
            f"{row['guidance']:g}",
            ", ".join(row["differs"]) or "nothing",
            f"{row['off']['psnr']:.2f}",
            f"{row['on']['psnr']:.2f}",
            f"{row['gain']:+.2f}",
            f"{row['off']['fd.digits_from_reference']:.2f}",
            f"{row['on']['fd.digits_from_reference']:.2f}",
        ]
        for row in result["rows"]
    ]
    lines += [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join([*lines, "", f"Made by `{result['command']}`."]) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Measure, write both files and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("exports", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--runtime", default="cpu")
    parser.add_argument("-o", "--output", type=Path, default=OUTPUT)
    args = parser.parse_args(arguments)
    report.set_quiet(True)
    rows: list[dict[str, Any]] = []
    for given in args.exports:
        name, _, directory = given.partition("=")
        for row in measured(name, directory, args.images, args.runtime):
            rows.append(row)
            print(row["model"], row["sampler"], row["steps"], row["guidance"], f"{row['gain']:+.2f} dB", flush=True)
    result = {
        "command": shlex.join(["python", "recipes/correction.py", *arguments]),
        "images": args.images,
        "runtime": args.runtime,
        "fitted": {row["model"]: row["fitted"] for row in rows},
        "rows": rows,
        "environment": environment("cpu", 1),
    }
    args.output.with_suffix(".json").write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    args.output.with_suffix(".md").write_text(rendered(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
