"""Measure what half precision between products costs: predictions of `digits-ddpm` at 4/4 and 8/8 on the `cuda` runtime with float16 and
bfloat16 between products, against float32.

    python recipes/half_glue.py

It takes a GPU, or Triton's interpreter (slow, the same numbers). Writes recipes/results/half-glue.md and .json.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.update(TRITON_INTERPRET="1", DQTOOL_CUDA_ON_CPU="1")

import json
import subprocess
import sys
import tempfile
from typing import Any

from dqtool.artifacts.outputs import check_results

RESULT = Path(__file__).parent / "results" / "half-glue.md"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS, SAMPLES = 5, 4


def export(bits: str, folder: str) -> str:
    """Return an export of digits-ddpm, quantizers initialised and not trained."""
    commands = (
        ("dilate", "zoo:digits-ddpm"),
        ("calibrate", "--steps", str(STEPS), "--samples", "40"),
        ("distill", "--bits", bits, "--iters", "0", "--refine-iters", "0"),
        ("export", "--force"),
    )
    for words in commands:
        subprocess.run(
            [sys.executable, "-m", "dqtool", *words, "--quiet"], cwd=folder, stdin=subprocess.DEVNULL, check=True,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
    return str(Path(folder) / "exported")


def predictions(network: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return the predictions of noise at every calibrated step, float32."""
    x = torch.randn(SAMPLES, *(network.config.in_channels, *[network.config.sample_size] * 2))
    x, found = x.to(DEVICE, dtype), []
    for timestep in network.timesteps:
        with torch.no_grad():
            found.append(network(x, timestep, return_dict=False)[0].float().cpu())
    return torch.cat(found)


def main() -> int:
    """Measure, print and write the table."""
    check_results(RESULT.with_suffix(".json"), [RESULT])
    from dqtool.runtimes import load

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for bits in ("8/8", "4/4"):
            network = load(export(bits, folder), "cuda")
            torch.manual_seed(0)
            wide = predictions(network, torch.float32)
            peak = float(wide.abs().max())
            for dtype in (torch.float16, torch.bfloat16):
                torch.manual_seed(0)
                error = float((predictions(network.to(dtype), dtype) - wide).square().mean())
                rows.append([bits, str(dtype).removeprefix("torch."), round(10 * torch.tensor(peak**2 / error).log10().item(), 1)])
                print(*rows[-1], flush=True)
                network.to(torch.float32)
    where = torch.cuda.get_device_name() if DEVICE == "cuda" else "Triton's interpreter"
    lines = [
        "# Half precision between products",
        "",
        f"`python recipes/half_glue.py`, {where}: predictions of `digits-ddpm` at {STEPS} steps, {SAMPLES} images, quantizers not "
        "trained, against float32 between the same products. Multipliers and step tables stay float32.",
        "",
        "| bits | between products | PSNR dB |",
        "| --- | --- | --- |",
        *(f"| {' | '.join(map(str, row))} |" for row in rows),
    ]
    about = {"format": "dqtool-result/1", "command": "python recipes/half_glue.py", "where": where, "rows": rows}
    RESULT.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")
    RESULT.write_text("\n".join(lines) + "\n")
    print(RESULT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
