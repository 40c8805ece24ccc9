"""Time `from_pretrained` and four steps of Stable Diffusion v1.4 at full size, float and quantized, through the pipeline.

    python recipes/bench_pipeline.py [--bits 4/8] [--guidance 1.0] [--rounds 2]

All weights are random. Each measurement is a fresh process. Float and quantized runs take turns, and the fastest of each
counts. The script writes recipes/results/pipeline-speed-SET.md and .json with seconds on the clock and of the processor: on
a machine that does other work, the latter are the fairer ones. SET is the instruction set of the integer kernels: the best
that the processor has, or the one in `DQTOOL_ISA`. The float pipeline needs 5 GB of disk under `$DQTOOL_CACHE`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
ARCH, STEPS, BAR = "sd14", 4, {True: 3.5, False: 2.0}
"""Architecture, steps of a call, and the speedup that is expected with VNNI and without."""
FLOAT, QUANTIZED = "float32", "dqtool"


def pipelines(bits: str) -> dict[str, Path]:
    """Return the directories of the float and the quantized pipeline; they are made on first use."""
    from full_size import write_model

    from dqtool.artifacts import cache_directory
    from dqtool.bench.random_export import random_export
    from dqtool.core.quantization import QuantizationSpec

    whole = cache_directory("bench") / f"{ARCH}-pipeline"
    if not (whole / "model_index.json").is_file():
        if not (whole / "unet" / "diffusion_pytorch_model.safetensors").is_file():
            write_model(ARCH, whole / "unet")
        write_parts(whole)
    exported = Path(random_export(ARCH, QuantizationSpec.parse(bits)))
    quantized = cache_directory("bench") / f"{ARCH}-pipeline-w{bits.replace('/', 'a')}"
    quantized.mkdir(exist_ok=True)
    for name, target in {**{path.name: path for path in whole.iterdir()}, "unet": exported}.items():
        if not (quantized / name).exists():
            (quantized / name).symlink_to(target)
    return {FLOAT: whole, QUANTIZED: quantized}


def write_parts(directory: Path) -> None:
    """Write the pipeline around the network: Stable Diffusion's autoencoder and text model, with random weights."""
    from diffusers import AutoencoderKL, DDIMScheduler
    from transformers import CLIPTextConfig, CLIPTextModel

    from dqtool.models.architectures import ARCHITECTURES
    from dqtool.zoo.prompts import write_tokenizer

    words = write_tokenizer(directory / "tokenizer")
    config = json.loads((directory / "tokenizer" / "tokenizer_config.json").read_text(encoding="utf-8"))
    (directory / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 77}))
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    CLIPTextModel(CLIPTextConfig(vocab_size=max(words, 49408), **sizes)).save_pretrained(directory / "text_encoder")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
    ).save_pretrained(directory / "vae")
    scheduler = {k: v for k, v in ARCHITECTURES[ARCH].scheduler.items() if k != "_class_name"}
    DDIMScheduler.from_config(scheduler).save_pretrained(directory / "scheduler")
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionPipeline",
        "requires_safety_checker": False,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        **{name: [None, None] for name in ("safety_checker", "feature_extractor", "image_encoder")},
    }
    (directory / "model_index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def measure(directory: str, threads: int, guidance: float) -> dict[str, float]:
    """Return the seconds of loading, of a call of one step, which reads all weights, and of a call of `STEPS` steps."""
    import torch
    from diffusers import DiffusionPipeline

    import dqtool  # noqa: F401

    torch.set_num_threads(threads)
    found: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        result = work()
        found[name], found[f"{name}_cpu"] = time.perf_counter() - wall, time.process_time() - cpu
        return result

    pipe = timed("load", lambda: DiffusionPipeline.from_pretrained(directory))
    pipe.set_progress_bar_config(disable=True)

    def call(steps: int) -> Any:
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "latent"}
        return pipe("a handwritten seven", generator=generator, **options)

    timed("first", lambda: call(1))
    timed("steps", lambda: call(STEPS))
    return found


def text_of(result: Mapping[str, Any]) -> str:
    """Return the Markdown table."""
    machine = result["machine"]
    lines = [
        "# `from_pretrained` and four steps of Stable Diffusion v1.4",
        "",
        f"`{result['command']}` on {machine['processor']} ({', '.join(machine['flags'] or [])}), with integer kernels",
        f"for {result['kernels'].upper()}. Random weights at full size, {result['bits']}, 512 pixels, guidance {result['guidance']:g}, without",
        "decoding. Seconds on the clock, and of the processor in brackets. *Speedup* is that of the four steps.",
        "",
        "| threads | pipeline | load | first step | four steps | speedup, clock | speedup, processor |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        cells = [f"{row[key]:.1f} ({row[f'{key}_cpu']:.1f})" for key in ("load", "first", "steps")]
        speed = [f"{row[key]:.2f}x" if key in row else "" for key in ("speedup", "speedup_cpu")]
        lines.append("| " + " | ".join([str(row["threads"]), row["pipeline"], *cells, *speed]) + " |")
    loads = [turn["machine_load"] for row in result["rows"] for turn in row["turns"]]
    rounds = len(result["rows"][0]["turns"])
    lines += [
        "",
        f"Expected on this machine: {result['bar']}x. The fastest of {rounds} turns of each pipeline, float and quantized in turns; "
        f"the load of the machine's {machine['cores']} cores was {min(loads):.1f} to {max(loads):.1f}.",
    ]
    return "\n".join(lines) + "\n"


def rows_of(
    directories: Mapping[str, Path], threads: Sequence[int], guidance: float, rounds: int
) -> list[dict[str, Any]]:
    """Measure every pipeline at every number of threads, each in a process of its own, in turns.

    A row holds the least of `rounds` measurements of each quantity, and the load of the machine during them.
    """
    rows = []
    for count in threads:
        turns: dict[str, list[dict[str, float]]] = {name: [] for name in directories}
        for _ in range(rounds):
            for name, directory in directories.items():
                turns[name].append(_measured(directory, count, guidance) | {"machine_load": os.getloadavg()[0]})
                print(name, turns[name][-1], file=sys.stderr, flush=True)
        pair: dict[str, dict[str, Any]] = {
            name: {"threads": count, "pipeline": name, "turns": found}
            | {key: min(turn[key] for turn in found) for key in found[0] if key != "machine_load"}
            for name, found in turns.items()
        }
        for key in ("", "_cpu"):
            pair[QUANTIZED]["speedup" + key] = pair[FLOAT]["steps" + key] / pair[QUANTIZED]["steps" + key]
        rows += pair.values()
    return rows


def _measured(directory: Path, threads: int, guidance: float) -> dict[str, float]:
    """Return what `measure` finds in a process of its own."""
    command = [sys.executable, __file__, "--measure", str(directory), "--threads", str(threads)]
    ran = subprocess.run(
        [*command, "--guidance", str(guidance)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    return json.loads(ran.stdout.splitlines()[-1])


def main() -> int:
    """Measure, write the results, and return 1 where a speedup of the processor's time is below the bar."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--bits", default="4/8")
    parser.add_argument("--guidance", type=float, default=1.0, help="1: one sample a step; above: two")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument(
        "--rounds", type=int, default=2, help="measurements of each pipeline, of which the fastest counts"
    )
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(options.measure, options.threads[0], options.guidance)))
        return 0
    from dqtool.artifacts.outputs import check_results
    from dqtool.bench.machine import describe_machine
    from dqtool.runtimes.cpu.library import LIMIT, instruction_sets

    kernels = instruction_sets()[0]
    path = RESULTS / f"pipeline-speed-{kernels}"
    check_results(path.with_suffix(".json"), [path.with_suffix(".md")])
    machine = describe_machine(max(options.threads)).to_json()
    bar = BAR[kernels != "avx2"]
    result = {
        "format": "dqtool-result/1",
        "command": f"make bench-pipeline {LIMIT}={kernels}" if LIMIT in os.environ else "make bench-pipeline",
        "kernels": kernels,
        "bits": options.bits,
        "guidance": options.guidance,
        "machine": machine,
        "bar": bar,
        "rows": rows_of(pipelines(options.bits), options.threads, options.guidance, options.rounds),
    }
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(text_of(result), encoding="utf-8")
    print(text_of(result))
    return int(any(row["speedup_cpu"] < bar for row in result["rows"] if "speedup_cpu" in row))


if __name__ == "__main__":
    sys.exit(main())
