"""Compile the kernels of the `cuda` runtime for GPUs, on a machine without one, with every block that the model may choose.

Writes recipes/results/gpu-kernels.md: instructions, registers, shared memory and spills of each kernel, and for products of
published networks the predicted time and share of the limit. Nothing is timed.
"""

from __future__ import annotations

import os

os.environ.pop("TRITON_INTERPRET", None)

import json
import sys
from pathlib import Path

import torch

from dqtool.artifacts.outputs import check_results
from dqtool.runtimes.cuda.compiled import compiled_for
from dqtool.runtimes.cuda.geometry import Geometry, Padding
from dqtool.runtimes.cuda.launch import attend, layer_norm_codes, multiply_codes, quantize_image
from dqtool.runtimes.cuda.model import GPUS, best_tile, candidates, estimate
from dqtool.runtimes.cuda.planes import chunk_of, padded_channels, plane_bytes
from dqtool.runtimes.cuda.tiles import Tile

RESULT = Path(__file__).parent / "results" / "gpu-kernels.md"
STEPS = torch.ones(20, 4)
ROWS = torch.zeros(1, dtype=torch.long)

SHAPES = (
    ("sd14 3x3 64x64", 8192, 320, 2880, 9, False),
    ("sd14 1x1 64x64", 8192, 320, 320, 1, False),
    ("sd14 GEGLU 64x64", 8192, 1280, 320, 1, True),
    ("sd14 feed-forward out 64x64", 8192, 320, 1280, 1, False),
    ("sd14 3x3 32x32", 2048, 640, 5760, 9, False),
    ("sd14 3x3 16x16", 512, 1280, 11520, 9, False),
    ("sd14 3x3 8x8", 128, 1280, 11520, 9, False),
    ("sd14 time embedding", 2, 1280, 1280, 1, False),
    ("sdxl q, k, v 32x32", 2048, 3840, 1280, 1, False),
    ("sdxl GEGLU 32x32", 2048, 5120, 1280, 1, True),
    ("dit-xl2 q, k, v", 512, 3456, 1152, 1, False),
    ("dit-xl2 feed-forward", 512, 4608, 1152, 1, False),
    ("flux-dev feed-forward", 4608, 12288, 3072, 1, False),
)
"""Products at batch 2 (flux-dev: 1): name, rows, columns, codes, taps, GEGLU."""


def product(
    bits: int, tile: Tile, conv: bool = False, gated: bool = False, codes_out: bool = False, signed: int = 1
) -> None:
    """Launch a product of 1280 in-channels."""
    n, ci = 1280, 1280
    co = 2 * n if gated else n
    kernel = (3, 3) if conv else (1, 1)
    g = Geometry(co, ci, 1, padded_channels(ci), int(conv), *kernel, 1, 1, 1, 1, bits, signed)
    shape = (2, 32, 32) if conv else (2, 1024)
    codes = torch.empty((2, 34, 34, g.row) if conv else (2048, g.row), dtype=torch.int8)
    planes = torch.empty(plane_bytes(co, g.k, bits, chunk_of(g.channel_bytes)), dtype=torch.uint8)
    weight = (planes, torch.empty(co, dtype=torch.uint8), torch.empty(co, dtype=torch.int32), torch.empty(co))
    out = torch.empty((*shape, n), dtype=torch.int8 if codes_out else torch.float16)
    following = (STEPS, torch.ones(n)) if codes_out else None
    act = 4 if gated else 0
    multiply_codes(
        codes, weight, torch.ones(co), None, None, STEPS, ROWS, shape, g, out, 1.0, following, act, tile=tile
    )


def one_channel() -> None:
    """Launch a convolution with one out-channel, whose number the compiler takes for a constant."""
    g = Geometry(1, 64, 1, 64, 1, 3, 3, 1, 1, 1, 1, 8, 0)
    weight = (torch.empty(576).byte(), torch.empty(1).byte(), torch.empty(1, dtype=torch.int32), torch.ones(1))
    out = torch.empty(1, 8, 8, 1)
    multiply_codes(torch.empty(1, 10, 10, 64).char(), weight, None, None, None, STEPS[:1], ROWS, (1, 8, 8), g, out)


def prologues() -> None:
    """Launch the kernels before products, and attention."""
    image = torch.empty(2, 320, 64, 64, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    padding = Padding(320, 320, 1, 66, 66, 1, 1, 1)
    norm = (32, torch.ones(320), torch.ones(320), 1e-5)
    quantize_image(image, STEPS, None, ROWS, padding, 1, norm)
    quantize_image(image, STEPS, torch.ones(320), ROWS, padding, 0)
    rows = torch.empty(2, 256, 1152, dtype=torch.float16)
    layer_norm_codes(rows, None, None, 1e-6, rows[:, 0], rows[:, 0], STEPS, torch.ones(1152), ROWS, 1152)
    for width in (40, 72, 128, 160, 512):
        attention(width)


def attention(width: int) -> None:
    """Launch attention on heads of `width` channels."""
    heads = torch.empty(2, 8, 1024, width, dtype=torch.float16)
    tables, each = torch.ones(20, 4, 3, 8), torch.ones(20, 8)
    attend((heads, heads, heads), None, tables, each, each, ROWS, 0.1, 255)


def main() -> int:
    """Compile everything and write the table. Returns 1 if a kernel spills registers."""
    check_results(RESULT.with_suffix(".json"), [RESULT])
    compiled = []
    lines = [
        "# Kernels of the `cuda` runtime, compiled without a GPU",
        "",
        f"`make gpu-kernels`, Triton {__import__('triton').__version__}. No GPU was at hand: nothing here was timed.",
        "",
        "| capability | kernel | matrix instructions | registers | spilled bytes | shared KiB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    spills = 0
    for capability in (90, 80):
        with compiled_for(capability) as made:
            for label, run in _runs(capability == 90):
                before = len(made)
                run()
                for kernel in made[before:]:
                    cells = (
                        capability / 10,
                        label or kernel.name,
                        kernel.instructions,
                        kernel.registers,
                        kernel.spilled,
                    )
                    compiled.append([*cells, kernel.shared])
                    lines.append(f"| {' | '.join(map(str, cells))} | {kernel.shared / 1024:.0f} |")
                    print(lines[-1], flush=True)
                    spills += kernel.spilled > 0
    gpu = GPUS["H200"]
    lines += [
        "",
        f"Predicted on {gpu.name} at 4 bits, by `dqtool/runtimes/cuda/model.py`; *limit* is the share of the larger of the "
        "times that int8 arithmetic and memory need at their peaks.",
        "",
        "| product | rows x columns x codes | block | predicted | limit | bound by |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, m, n, k, taps, gated in SHAPES:
        *tile, splits = best_tile(gpu, m, n, k, 4, gated)
        e = estimate(gpu, m, n, k, 4, gated, tuple(tile), 2, taps, splits)
        block = f"{tile[0]}x{tile[1]}, {tile[2]} warps" + (f", codes in {splits} parts" if splits > 1 else "")
        lines.append(
            f"| {name} | {m} x {n * (2 if gated else 1)} x {k} | {block} | {e.seconds * 1e6:.1f} us | {e.reached:.0%} | {e.bound} |"
        )
    about = {
        "format": "dqtool-result/1",
        "command": "make gpu-kernels",
        "triton": __import__("triton").__version__,
        "kernels": compiled,
    }
    RESULT.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")
    RESULT.write_text("\n".join(lines) + "\n")
    print(RESULT)
    return int(spills > 0)


def _runs(warp_groups: bool) -> list:
    runs: list = []
    for bits in (4, 8, 6, 7):
        for gated in (False, True) if bits == 4 else (False,):
            for sizes in candidates(bits, gated, warp_groups):
                tile = Tile(*sizes)
                label = f"product {bits} bits{' GEGLU' if gated else ''} {sizes[0]}x{sizes[1]}, {sizes[2]} warps"
                runs.append((label, lambda b=bits, t=tile, g=gated: product(b, t, gated=g, codes_out=g)))
    for bits in (2, 3, 5):
        runs.append((f"product {bits} bits 128x128, 8 warps", lambda b=bits: product(b, Tile(128, 128, 8, 3))))
    runs.append(("convolution 4 bits", lambda: product(4, Tile(128, 128, 8, 3), conv=True)))
    runs.append(("convolution 4 bits in 4 parts", lambda: product(4, Tile(64, 64, 4, 4, 4), conv=True)))
    runs.append(("convolution 8 bits, unsigned", lambda: product(8, Tile(128, 128, 8, 3), conv=True, signed=0)))
    runs.append(("convolution 8 bits, one out-channel", one_channel))
    runs.append(("", prologues))
    return runs


if __name__ == "__main__":
    sys.exit(main())
