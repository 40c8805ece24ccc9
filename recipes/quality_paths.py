"""Compare exported pipelines with their float pipelines on the ways in which users call them.

    python recipes/quality_paths.py [NAME...] [--images 64]

Each embedded model runs in the calibrated setting, then with other samplers, and where diffusers has such a pipeline from an
image and inside a mask. Every cell is the PSNR of the exported pipeline to the float pipeline with the same seeds. The
script writes recipes/results/quality-paths.md and .json. A model that is run again replaces its row.

The export is that of `make NAME-w4a4` in results/, or else one that `dqtool quantize --effort fast` makes here.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dqtool.artifacts import read_manifest
from dqtool.artifacts.outputs import check_results
from dqtool.errors import DqtoolWarning
from dqtool.metrics.similarity import psnr
from dqtool.models.sources.resolve import ZOO

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "recipes" / "results" / "quality-paths"
FORMAT = "dqtool-quality-paths/1"
MODELS = ("digits-ddpm", "digits-dit", "digits-ldm", "digits-sd")
CALIBRATED, TOLERANCE = "calibrated", 1.5
"""Name of the cell that the others are compared with, and the largest loss to it in dB."""

SAMPLERS: Mapping[str, tuple[str, int, dict[str, Any]]] = {
    "DDIM 20": ("DDIMScheduler", 20, {}),
    "Euler Karras 20": ("EulerDiscreteScheduler", 20, {"use_karras_sigmas": True}),
    "DPM-Solver++ 20": ("DPMSolverMultistepScheduler", 20, {"algorithm_type": "dpmsolver++"}),
    "UniPC 8": ("UniPCMultistepScheduler", 8, {}),
}
"""Class, number of steps and settings of each sampler."""

IMAGE, MASK = "img2img 0.5", "inpaint"
STRENGTH, STEPS = 0.5, 20
"""Strength of the calls that start from an image, and their steps, of which the strength is the share that runs."""

Cells = dict[str, Tensor]


def generators(images: int) -> list[torch.Generator]:
    """Return one generator for each image."""
    return [torch.Generator().manual_seed(1000 + i) for i in range(images)]


def with_scheduler(pipeline: Any, name: str, settings: Mapping[str, Any]) -> None:
    """Set the pipeline's scheduler to another class with the same noise schedule, as diffusers' documentation does."""
    import diffusers

    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config, **settings)


def unconditional(pipeline: Any, images: int, steps: int, start: Tensor | None = None) -> Tensor:
    """Sample a pixel model, `[N, C, H, W]`, with the loop of diffusers' guide to schedulers.

    `DDIMPipeline` accepts DDIM alone. With `start`, images `[N, C, H, W]` in [0, 1], half of the steps run.
    """
    scheduler, network = pipeline.scheduler, pipeline.unet
    size = network.config.sample_size
    shape = (1, network.config.in_channels, size, size)
    noise = torch.cat([torch.randn(shape, generator=each) for each in generators(images)])
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps
    if start is None:
        x = noise * scheduler.init_noise_sigma
    else:
        timesteps = timesteps[int(steps * (1 - STRENGTH)) :]
        x = scheduler.add_noise(2 * start - 1, noise, timesteps[:1])
    with torch.no_grad():
        for t in timesteps:
            predicted = network(scheduler.scale_model_input(x, t), t).sample
            x = scheduler.step(predicted, t, x).prev_sample
    return (x / 2 + 0.5).clamp(0, 1)


def conditional(pipeline: Any, images: int, steps: int, guidance: float) -> Tensor:
    """Call a pipeline with prompts or classes, as its users do; return the images `[N, C, H, W]` in [0, 1]."""
    return called(pipeline, subjects(pipeline, images), images, num_inference_steps=steps, guidance_scale=guidance)


def called(pipeline: Any, asked: Mapping[str, Any], images: int, **options: Any) -> Tensor:
    """Call a pipeline and return its images `[N, C, H, W]` in [0, 1]."""
    found = pipeline(**asked, generator=generators(images), output_type="np", **options).images
    return torch.from_numpy(found).movedim(-1, 1).float()


def subjects(pipeline: Any, images: int, shift: int = 0) -> dict[str, Any]:
    """Return the prompts or the class labels of the ten digits in turn."""
    digits = [(i + shift) % 10 for i in range(images)]
    if not hasattr(pipeline, "tokenizer"):
        return {"class_labels": digits}
    from dqtool.zoo.prompts import prompt

    return {"prompt": [prompt(digit) for digit in digits]}


def from_images(pipeline: Any, start: Tensor, guidance: float) -> Cells:
    """Change `start` `[N, C, H, W]` into the next digits, from its noised version and inside its lower half."""
    from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline

    images, asked = len(start), subjects(pipeline, len(start), shift=1)
    common = {"num_inference_steps": STEPS, "guidance_scale": guidance, "image": start}
    mask = torch.zeros(images, 1, *start.shape[2:])
    mask[:, :, start.shape[2] // 2 :] = 1
    found = {}
    for name, kind, extra in (
        (IMAGE, StableDiffusionImg2ImgPipeline, {"strength": STRENGTH}),
        (MASK, StableDiffusionInpaintPipeline, {"mask_image": mask, "strength": 1.0}),
    ):
        other = kind.from_pipe(pipeline)
        other.set_progress_bar_config(disable=True)
        if name == MASK:
            extra = extra | {"height": start.shape[2], "width": start.shape[3]}
        found[name] = called(other, asked, images, **common, **extra)
    return found


def network_of(pipeline: Any) -> Any:
    """Return the denoiser of a pipeline."""
    return pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer


def without_class(network: Any) -> None:
    """Make a class-conditional transformer take `DiTPipeline`'s label of no class, 1000, as its own, the last one."""
    none = network.config.num_embeds_ada_norm

    def bound(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "class_labels": kwargs["class_labels"].clamp(max=none)}

    network.register_forward_pre_hook(bound, with_kwargs=True)


def pictures(pipeline: Any, images: int, calibrated: tuple[int, float], start: Tensor | None) -> Cells:
    """Return the images of every cell. `calibrated` is the number of steps and the guidance of the calibrated setting, and
    `start` the images that img2img and inpainting begin with, by default the first cell's."""
    steps, guidance = calibrated
    pipeline.set_progress_bar_config(disable=True)
    pixels = type(pipeline).__name__ == "DDIMPipeline"
    transformer = type(pipeline).__name__ == "DiTPipeline"
    if transformer:
        without_class(pipeline.transformer)
    call: Callable[[int], Tensor] = (
        (lambda n: unconditional(pipeline, images, n))
        if pixels
        else (lambda n: conditional(pipeline, images, n, guidance))
    )
    found = {CALIBRATED: call(steps)}
    own = pipeline.scheduler
    for name, (scheduler, count, settings) in SAMPLERS.items():
        if transformer and scheduler == "EulerDiscreteScheduler":
            continue  # the pipeline does not scale its first noise
        with_scheduler(pipeline, scheduler, settings)
        found[name] = call(count)
        pipeline.scheduler = own
    start = found[CALIBRATED] if start is None else start
    if pixels:
        found[IMAGE] = unconditional(pipeline, images, STEPS, start)
    elif hasattr(pipeline, "tokenizer"):
        found |= from_images(pipeline, start, guidance)
    return found


def export_of(name: str) -> tuple[Path, str]:
    """Return the export of a model and the command that made it."""
    trained = ROOT / "results" / f"{name}-w4a4"
    if (trained / "exported" / "dqtool.json").is_file():
        return trained / "exported", f"make {name}-w4a4"
    target = ROOT / "results" / f"{name}-fast"
    command = ["dqtool", "quantize", f"zoo:{name}", "--bits", "4/4", "--effort", "fast"]
    subprocess.run(
        [sys.executable, "-m", *command, "-o", str(target), "--quiet"], check=True, stdout=subprocess.DEVNULL
    )
    return target, " ".join(command)


def compare(name: str, model: Path, exported: Path, command: str, images: int) -> dict[str, Any]:
    """Return the row of one model: its export, and for each cell the mean PSNR in dB.

    `model` is the float pipeline's directory; `command` made the directory `exported`.
    """
    from diffusers import DiffusionPipeline

    manifest = read_manifest(exported)
    sampling = manifest.sampling
    assert sampling is not None
    calibrated = (sampling.steps, 1.0 if sampling.guidance is None else sampling.guidance)
    whole = DiffusionPipeline.from_pretrained(str(model), dtype=torch.float32)
    started = time.monotonic()
    wanted = pictures(whole, images, calibrated, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DqtoolWarning)
        quantized: Any = DiffusionPipeline.from_pretrained(str(exported))
        found = pictures(quantized, images, calibrated, wanted[CALIBRATED])
    return {
        "model": name,
        "export": command,
        "bits": sorted({"/".join(map(str, layer.bits or ())) for layer in manifest.layers}),
        "runtime": network_of(quantized).runtime,
        "steps": calibrated[0],
        "guidance": calibrated[1],
        "images": images,
        "psnr": {cell: float(psnr(found[cell], wanted[cell], 1.0).mean()) for cell in wanted},
        "seconds": round(time.monotonic() - started, 1),
    }


def losses(row: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each cell that is outside the tolerance."""
    base = row["psnr"][CALIBRATED]
    return [
        f"{row['model']}, {cell}: {value:.1f} dB, and {base:.1f} dB as calibrated"
        for cell, value in row["psnr"].items()
        if value < base - TOLERANCE
    ]


def text_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the Markdown table."""
    cells = [CALIBRATED, *SAMPLERS, IMAGE, MASK]
    lines = [
        "# Exported pipelines, called as their users call them",
        "",
        "`make quality-paths`. Each cell is the mean PSNR in dB of the exported pipeline's images to the float pipeline's with the",
        f"same seeds. *Calibrated* is the setting of the calibration. A cell more than {TOLERANCE} dB below it is marked `!`. An",
        "empty cell has no pipeline in diffusers: `DiTPipeline` does not scale the first noise for Euler. Two models are no plain",
        "calls: digits-ddpm runs the scheduler's loop, since `DDIMPipeline` takes DDIM alone, and digits-dit gets a hook that",
        "maps label 1000 to its own class for none.",
        "",
        "| " + " | ".join(["model", "export", "bits", "images", *cells]) + " |",
        "| " + " | ".join(["---"] * (4 + len(cells))) + " |",
    ]
    for row in rows:
        base = row["psnr"][CALIBRATED]
        shown = [
            f"{value:.1f}" + " !" * (value < base - TOLERANCE) if (value := row["psnr"].get(cell)) is not None else ""
            for cell in cells
        ]
        lines.append(
            "| "
            + " | ".join([row["model"], f"`{row['export']}`", ", ".join(row["bits"]), str(row["images"]), *shown])
            + " |"
        )
    steps = ", ".join(f"{row['model']} {row['steps']} steps, guidance {row['guidance']:g}" for row in rows)
    lines += [
        "",
        f"Calibrated settings: {steps}. Image-to-image runs {STRENGTH:g} of {STEPS} DDIM steps, inpainting all of them.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Compare the models, write the table, and return 1 if a cell is outside the tolerance."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", default=MODELS)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("-o", "--output", default=str(OUTPUT), help="path of the results without suffix")
    options = parser.parse_args()
    path = Path(options.output).with_suffix(".json")
    check_results(path, [path.with_suffix(".md")])
    known = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    rows = {row["model"]: row for row in known}
    for name in options.names:
        exported, command = export_of(name)
        rows[name] = compare(name, ZOO / name, exported, command, options.images)
        print(json.dumps(rows[name]), file=sys.stderr, flush=True)
    ordered = [rows[name] for name in sorted(rows)]
    path.write_text(
        json.dumps({"format": FORMAT, "command": "make quality-paths", "rows": ordered}, indent=1) + "\n",
        encoding="utf-8",
    )
    path.with_suffix(".md").write_text(text_of(ordered), encoding="utf-8")
    outside = [sentence for row in ordered for sentence in losses(row)]
    print("\n".join(outside) or "all cells are within the tolerance")
    return 1 if outside else 0


if __name__ == "__main__":
    sys.exit(main())
