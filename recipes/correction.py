"""Measure what the correction of predictions gains with samplers, steps and guidance that it was not fitted with.

    python recipes/correction.py digits-ddpm=DIR digits-sd=DIR    DIR is an export at 4/4

Writes `recipes/results/table-correction.md` and `.json`, a part for each model: a run replaces the parts of the models that
it names. Every row samples the same images with the full-precision network and twice with the export: with its tables
switched on, and off.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dqtool import report
from dqtool.artifacts import environment, open_artifact
from dqtool.artifacts.files import write_text
from dqtool.artifacts.outputs import check_results
from dqtool.models.sampling.fitted import differs_by, sentence
from dqtool.stages.evaluation.correction import fitted_of, used_by_maker

SAMPLERS = (("ddim", 20), ("ddim", 50), ("plms", 20), ("dpmsolver", 20), ("euler", 20), ("unipc", 8))
"""Samplers with their numbers of steps. The exports are fitted with DDIM over 20 steps."""
GUIDED = (("ddim", 20, 2.0), ("ddim", 20, 4.0), ("unipc", 8, 4.0))
"""Samplers, steps and guidance of models with conditions, besides their own guidance."""
OUTPUT = Path(__file__).parent / "results" / "table-correction"


def measured(name: str, directory: str, images: int, runtime: str) -> Iterator[dict[str, Any]]:
    """Yield the figures of one export, a mapping for each sampler, number of steps and weight of guidance."""
    import torch

    import dqtool
    from dqtool.metrics.digits import DIGITS
    from dqtool.nn.prediction import set_correcting
    from dqtool.stages.evaluation.images import maker_of_artifact
    from dqtool.stages.evaluation.reference import find_reference, reference_network

    artifact = open_artifact(directory, ["export"])
    fitted = fitted_of(artifact.manifest, True)
    assert fitted is not None
    network = dqtool.load(directory, runtime)
    exact = reference_network(find_reference(None, artifact), artifact.manifest.network)
    conditional = fitted["guidance"] > 1
    for sampler, steps, guidance in (*((*each, None) for each in SAMPLERS), *(GUIDED if conditional else ())):
        maker = maker_of_artifact(artifact, images, 0, steps, sampler, guidance)
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
                "fd.digits_from_reference": DIGITS.distance(found, expected),
                "fd.digits": DIGITS.evaluate(found)["fd.digits"],
            }
        row["gain"] = row["on"]["psnr"] - row["off"]["psnr"]
        yield row


def rendered(parts: Mapping[str, Any]) -> str:
    """Return the table as Markdown."""
    lines = [
        "# Correction of predictions with other samplers than that of the fit",
        "",
        "PSNR and the distance are to the full-precision network with the same sampler, steps, guidance and noise, without "
        "(off) and with (on) the correction. dqtool switches it off by itself for samplers that it harms (`--correction auto`).",
    ]
    head = [
        "model",
        "sampler",
        "steps",
        "guidance",
        "differs in",
        "PSNR off",
        "PSNR on",
        "gain, dB",
        "distance off",
        "on",
    ]
    rows = [
        [
            name,
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
        for name, part in parts.items()
        for row in part["rows"]
    ]
    lines += ["", *(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))]
    for name, part in parts.items():
        lines += [
            "",
            f"`{name}`: {part['about']}, fitted with {part['fitted']}; {part['images']} images by the `{part['runtime']}` "
            f"runtime. Made by `{part['command']}`.",
        ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Measure, write both files and print the gains; return the exit code."""
    parser = argparse.ArgumentParser(description="Measure the correction of predictions with other samplers.")
    parser.add_argument("exports", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--runtime", default="cpu")
    parser.add_argument(
        "--about", default="an export at 4/4 trained with the defaults", help="How the exports were made."
    )
    parser.add_argument("-o", "--output", type=Path, default=OUTPUT)
    args = parser.parse_args(arguments)
    report.set_quiet(True)
    path = args.output.with_suffix(".json")
    check_results(path, [path.with_suffix(".md")])
    parts = json.loads(path.read_text(encoding="utf-8"))["parts"] if path.is_file() else {}
    for given in args.exports:
        name, _, directory = given.partition("=")
        rows = []
        for row in measured(name, directory, args.images, args.runtime):
            rows.append(row)
            print(name, row["sampler"], row["steps"], row["guidance"], f"{row['gain']:+.2f} dB", flush=True)
        parts[name] = {
            "about": args.about,
            "fitted": rows[0].pop("fitted"),
            "images": args.images,
            "runtime": args.runtime,
            "command": f"python recipes/correction.py {name}=EXPORT --images {args.images}",
            "rows": [{key: value for key, value in row.items() if key != "fitted"} for row in rows],
            "environment": environment("cpu", 1),
        }
    result = {"format": "dqtool-corrections/1", "command": "make table-correction", "parts": parts}
    write_text(path, json.dumps(result, indent=1, sort_keys=True) + "\n")
    write_text(args.output.with_suffix(".md"), rendered(parts))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
