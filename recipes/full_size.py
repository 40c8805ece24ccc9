"""Run published architectures at full size, with random weights, through dilate, calibrate, one distilled block, export.

    python recipes/full_size.py [NAME...]

The script writes recipes/results/full-size.md and .json, with a row for each model: parameters, bytes and bit operations with
the published counts, and the seconds and peak memory of each stage. Each stage runs in a fresh process. A model that is run
again replaces its row.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
FORMAT = "dqtool-result/1"
"""Mark of the results that these scripts write, by which they know them again."""
BITS = "6/6"
LARGEST = 1e9
"""Parameters from which a network runs only when it is named."""
# The block to distill: the first residual or transformer block of each kind of network.
BLOCK = {"DiTTransformer2DModel": r"transformer_blocks\.0"}
DEFAULT_BLOCK = r"down_blocks\.0\.resnets\.0"


def write_model(name: str, directory: Path) -> None:
    """Write a component directory with random weights of the architecture's shapes."""
    import torch
    from safetensors.torch import save_file

    from dqtool.models.architectures import ARCHITECTURES
    from dqtool.models.families import family_of

    arch = ARCHITECTURES[name]
    family = family_of(arch.class_name, name)
    with torch.device("meta"):
        network = family.build(arch.config)
    torch.manual_seed(0)
    state = {}
    for key, like in network.state_dict().items():
        if like.dim() > 1:
            state[key] = torch.randn(like.shape) / like[0].numel() ** 0.5
        else:
            state[key] = torch.full(like.shape, float("norm" in key and key.endswith("weight")))
    # Modules that the class repeats are one in the published model. Random copies would be stored and counted apart.
    for copy, original in family.tied_modules(arch.config):
        for key in [key for key in state if key.startswith(f"{original}.")]:
            state[copy + key.removeprefix(original)] = state[key].clone()
    directory.mkdir(parents=True)
    save_file(state, directory / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(arch.network_config()))


def written_model(name: str, directory: Path) -> None:
    """Call `write_model` in a fresh process, so that its memory is free before a stage is measured."""
    subprocess.run([sys.executable, __file__, "--write", name, str(directory)], check=True)


def stage(*arguments: str, cwd: Path) -> tuple[float, float]:
    """Run one command; return its seconds and the peak of its anonymous memory in GB."""
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, "-m", "dqtool", *arguments, "--quiet"], cwd=cwd, stdout=sys.stderr)
    finished = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not finished.wait(0.05):
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            except OSError:
                return
            peak = max([peak, *(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))])

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    finished.set()
    watcher.join()
    if code:
        raise SystemExit(f"dqtool {' '.join(arguments)} ended with {code}")
    return time.perf_counter() - start, peak / 1e9


def measure(name: str) -> dict:
    """Run the chain of one architecture and return its row."""
    from dqtool.artifacts import read_manifest
    from dqtool.models.architectures import ARCHITECTURES

    arch = ARCHITECTURES[name]
    block = BLOCK.get(arch.class_name, DEFAULT_BLOCK)
    with tempfile.TemporaryDirectory(prefix="dqtool-full-size-") as folder:
        work = Path(folder)
        written_model(name, work / "model")
        commands = {
            "dilate": ("dilate", "model", "--scaling", "wd"),
            "calibrate": ("calibrate", "--steps", "2", "--samples", "2", "--batch-size", "1"),
            "distill": ("distill", "--bits", BITS, "--iters", "2", "--refine-iters", "0", "--batch-size", "2", "--blocks", block),
            "export": ("export",),
        }  # fmt: skip
        stages = {key: stage(*arguments, cwd=work) for key, arguments in commands.items()}
        manifest = read_manifest(str(work / "exported"))
        parameters = read_manifest(str(work / "dilated.safetensors")).network.parameters
    return {
        "parameters": parameters,
        "published": arch.parameters,
        "bytes": manifest.metrics.as_read["bytes"],
        "bytes_float32": manifest.metrics.as_read["bytes_float32"],
        "bops": manifest.metrics.as_read["bops"],
        "bops_float32": manifest.metrics.as_read["bops_float32"],
        "stages": {key: {"seconds": round(s, 1), "peak_gb": round(gb, 2)} for key, (s, gb) in stages.items()},
        "threads": os.environ.get("OMP_NUM_THREADS") or os.cpu_count(),
    }


def render(rows: dict[str, dict]) -> str:
    """Return the table as Markdown."""
    lines = [
        "# Published architectures at full size, random weights",
        "",
        f"`make full-size`: dilate, calibrate (2 steps), one distilled block, export at {BITS}. Memory is the peak of",
        "anonymous pages (mapped files not counted); seconds depend on the machine and on what else it does.",
        "",
        "| model | parameters (M) | published | MB | smaller | fewer BOPs | "
        + " | ".join(f"{stage} s / GB" for stage in ("dilate", "calibrate", "distill", "export"))
        + " |",
        "| --- " * 10 + "|",
    ]
    for name, row in rows.items():
        stages = [f"{each['seconds']:.0f} / {each['peak_gb']:.1f}" for each in row["stages"].values()]
        cells = [
            name,
            f"{row['parameters'] / 1e6:.2f}",
            f"{row['published'] / 1e6:.2f}",
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['bytes_float32'] / row['bytes']:.2f}x",
            f"{row['bops_float32'] / row['bops']:.1f}x",
            *stages,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure the named models, or all; return the exit code."""
    from dqtool.artifacts.files import write_text
    from dqtool.artifacts.outputs import check_results
    from dqtool.artifacts.reading import load_json
    from dqtool.models.architectures import ARCHITECTURES, architecture

    if sys.argv[1:2] == ["--write"]:
        return write_model(sys.argv[2], Path(sys.argv[3]))
    names = sys.argv[1:] or [name for name, arch in ARCHITECTURES.items() if arch.parameters < LARGEST]
    for name in names:
        architecture(name)
    path = RESULTS / "full-size.json"
    table = path.with_suffix(".md")
    check_results(path, [table])
    rows = load_json(path) if path.exists() else {}
    for name in names:
        rows[name] = measure(name)
        rows = {known: rows[known] for known in ARCHITECTURES if known in rows}
        write_text(path, json.dumps({"format": FORMAT, **rows}, indent=1) + "\n")
        write_text(table, render(rows))


if __name__ == "__main__":
    main()
