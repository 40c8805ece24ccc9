"""Check the `cuda` runtime on a GPU and time it, in under eight minutes. Needs no network.

    python recipes/gpu_check.py [--minutes 7.5] [--archs sd14,sdxl,dit-xl2] [--batch 2,8]

Packages: a PyTorch for CUDA with its Triton, and diffusers, accelerate, transformers, safetensors, huggingface-hub, typer, rich,
pyyaml, numpy, pillow with what they need. dqtool need not be installed: the script takes the one that it lies beside.

Parts, in the order of what matters: kernels against int64, one layer of each shape of sd14 and every layer of digits-ddpm, whole
networks beside half precision, blocks of the kernels, one block that learns. Every line is printed at once, and after each part
recipes/results/gpu-check-GPU.md and .json are written: what was measured stays when the script is cut short.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

RESULTS = ROOT / "recipes" / "results"
START = time.perf_counter()


class Check:
    """Findings so far, and the files that hold them."""

    def __init__(self, minutes: float, folder: Path) -> None:
        self.end = START + 60 * minutes
        self.gpu = torch.cuda.get_device_name()
        self.path = folder / f"gpu-check-{re.sub(r'[^a-z0-9]+', '-', self.gpu.lower()).strip('-')}"
        self.lines: list[str] = []
        self.found: dict[str, Any] = {"format": "dqtool-result/1", "gpu": self.gpu, "torch": torch.__version__}
        self.found["command"] = " ".join(sys.argv)
        self.failures = 0

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.end - time.perf_counter()

    def say(self, line: str) -> None:
        """Print a line and keep it."""
        print(f"[{time.perf_counter() - START:6.1f} s] {line}", flush=True)
        self.lines.append(line)

    def part(self, title: str, run: Callable[[Check], None], needs: float) -> None:
        """Run one part if `needs` seconds are left; a failure does not stop the others. Write the files."""
        self.say(f"## {title}")
        if self.left() < needs:
            self.say(f"not run: {self.left():.0f} s are left")
        else:
            try:
                run(self)
            except Exception as e:
                self.failures += 1
                traceback.print_exc()
                self.say(f"FAILED: {type(e).__name__}: {str(e).splitlines()[0][:300] if str(e) else ''}")
        self.path.with_suffix(".json").write_text(json.dumps(self.found | {"failures": self.failures}, indent=2) + "\n")
        page = [f"# GPU check on {self.gpu}", "", f"`{self.found['command']}`, PyTorch {torch.__version__}", ""]
        self.path.with_suffix(".md").write_text("\n".join([*page, *self.lines]) + "\n")


def layer_of(co: int, ci: int, bits: int, input_bits: int, kernel: int = 0, **geometry: Any) -> Any:
    """Return a layer of random packed codes with three steps; `kernel` 0 makes it linear."""
    from dqtool.core.packing import pack
    from dqtool.nn.integer import IntegerLayer, Operand, PackedCodes

    shape = (co, ci // geometry.get("groups", 1), kernel, kernel) if kernel else (co, ci)
    codes = torch.randint(int(bits == 8), 2**bits, shape, dtype=torch.int32)
    zeros = torch.randint(0, 2**bits, (co,), dtype=torch.uint8) if bits < 8 else torch.full((co,), 128).byte()
    source = PackedCodes(pack(codes.flatten(1), bits), zeros, bits, torch.Size(shape))
    scale, zero = torch.rand(3) * 0.1 + 0.05, torch.randint(0, 2**input_bits, (3,), dtype=torch.int32)
    operand = Operand(input_bits, scale, zero)
    ghost = torch.empty(shape, dtype=torch.int8, device="meta")
    return IntegerLayer(operand, ghost, torch.rand(co), torch.randn(co), None, kernel > 0, source=source, **geometry)


def differences(layer: Any, x: Tensor, rows: list[int]) -> tuple[int, int]:
    """Return how many accumulators there are, and how many differ from float64 sums of codes (exact below 2^53)."""
    import torch.nn.functional as F

    from dqtool.runtimes.cuda.products import CudaProduct, Glue

    glue = Glue()
    glue.rows = torch.tensor(rows, device="cuda")
    product = CudaProduct(layer, glue).to("cuda")
    each = len(x) // len(rows)
    got = product.accumulators(product.quantize(x.cuda()))
    dim = 1 if layer.is_conv else -1
    codes = torch.stack([layer.input.codes(x[i : i + 1], rows[i // each], dim)[0] for i in range(len(x))])
    c, w = codes.cuda().double(), layer.unpacked().weight.cuda().double()
    if layer.is_conv:
        expected = F.conv2d(c, w, None, layer.stride, layer.padding, layer.taps_dilation, layer.groups)
    else:
        expected = F.linear(c, w)
    return expected.numel(), int((got.double() != expected).sum())


def check_kernels(check: Check) -> None:
    """Compare accumulators of random layers: every width, block and geometry."""
    from dqtool.runtimes.cuda import launch
    from dqtool.runtimes.cuda.model import candidates, gpu_of
    from dqtool.runtimes.cuda.tiles import Tile

    torch.manual_seed(0)
    total = wrong = 0
    for bits in (2, 3, 4, 5, 6, 7, 8):
        for input_bits in (bits, 8):
            count, bad = differences(layer_of(200, 330, bits, input_bits), torch.randn(3, 70, 330) * 8, [2, 0, 1])
            total, wrong = total + count, wrong + bad
            count, bad = differences(
                layer_of(72, 40, bits, input_bits, 3, padding=(1, 1), stride=(2, 2)),
                torch.randn(4, 40, 15, 9) * 8,
                [1, 2],
            )
            total, wrong = total + count, wrong + bad
    for extra in ({"groups": 2}, {"taps_dilation": (2, 2)}):
        count, bad = differences(layer_of(64, 64, 4, 4, 3, padding=(1, 1), **extra), torch.randn(2, 64, 9, 9), [0])
        total, wrong = total + count, wrong + bad
    check.say(f"widths and geometries: {total} accumulators, {wrong} differ from int64")
    own = launch.product_tile
    for bits in (4, 8, 6, 7):
        for sizes in candidates(bits, False, gpu_of(check.gpu).warp_groups):
            for assembly, splits in ((True, 1), (False, 1), (True, 3)):
                tile = Tile(*sizes, splits, assembly)
                launch.product_tile = lambda *_, tile=tile: tile
                try:
                    count, bad = differences(layer_of(300, 640, bits, bits), torch.randn(2, 200, 640), [1])
                finally:
                    launch.product_tile = own
                wrong += bad
                check.say(f"{bits} bits, block {tuple(tile)}: {count} accumulators, {bad} differ")
    check.found["kernels"] = {"compared": total, "different": wrong}
    check.failures += wrong > 0


def check_codes(check: Check) -> None:
    """Compare codes after norms and activations, and attention, with PyTorch in float32."""
    import torch.nn.functional as F

    from dqtool.runtimes.cpu.codes import GELU, SILU
    from dqtool.runtimes.cuda.products import CudaProduct, Glue

    torch.manual_seed(0)
    glue = Glue()
    glue.rows = torch.ones(1, dtype=torch.long, device="cuda")
    conv = CudaProduct(layer_of(64, 320, 4, 4, 3, padding=(1, 1)), glue).cuda()
    linear = CudaProduct(layer_of(64, 320, 4, 8), glue).cuda()
    x = torch.randn(2, 320, 32, 32, device="cuda").contiguous(memory_format=torch.channels_last)
    norm, layer_norm = nn.GroupNorm(32, 320).cuda(), nn.LayerNorm(320).cuda()
    rows = torch.randn(2, 77, 320, device="cuda")
    pairs = {
        "group norm, SiLU": (conv.group_norm(x, norm, SILU), conv.quantize(F.silu(norm(x)))),
        "layer norm": (linear.layer_norm(rows, layer_norm), linear.quantize(layer_norm(rows))),
        "GELU": (linear.quantize(rows, GELU), linear.quantize(F.gelu(rows))),
    }
    for name, (got, expected) in pairs.items():
        off = (got.data.int() - expected.data.int()).abs()
        check.say(f"codes after {name}: {float((off > 0).float().mean()):.2e} differ, by {int(off.max())} at most")
        check.failures += int(off.max()) > 1


def check_layers(check: Check, name: str, network: nn.Module, once: bool) -> None:
    """Compare accumulators of a packed network's layers at their steps; `once` takes one layer of each shape."""
    from dqtool.nn.integer import integer_layer
    from dqtool.nn.packed_layer import PackedLayer

    seen: set[Any] = set()
    layers = total = wrong = 0
    for _, layer in network.named_modules():
        if not isinstance(layer, PackedLayer):
            continue
        integer = integer_layer(layer, keep_packed=True)
        key = (tuple(integer.weight.shape), integer.stride, layer.bits.input)
        if not integer.is_integer or (once and key in seen):
            continue
        seen.add(key)
        channels = integer.weight.shape[1] * integer.groups
        shape = (2, channels, 8, 8) if integer.is_conv else (2, 16, channels)
        steps = integer.input.steps  # type: ignore[union-attr]
        x = torch.randn(shape) * 8 * float(integer.input.scale.mean())  # type: ignore[union-attr]
        count, bad = differences(integer, x, [0, steps - 1])
        layers, total, wrong = layers + 1, total + count, wrong + bad
    check.say(f"{name}: {layers} layers, {total} accumulators, {wrong} differ from int64")
    check.found[f"integers {name}"] = {"layers": layers, "compared": total, "different": wrong}
    check.failures += wrong > 0


def check_integers(check: Check) -> None:
    """Compare every layer of digits-ddpm and one layer of each shape of sd14."""
    check_layers(check, "digits-ddpm", packed_of(digits_export()), once=False)
    check_layers(check, "sd14", packed_of(random_directory("sd14")), once=True)


def digits_export() -> str:
    """Return an export of digits-ddpm at 4/4, quantizers initialised and not trained."""
    import subprocess
    import tempfile

    folder = tempfile.mkdtemp(prefix="dqtool-gpu-check-")
    commands = (
        ("dilate", "zoo:digits-ddpm"),
        ("calibrate", "--steps", "5", "--samples", "40"),
        ("distill", "--bits", "4/4", "--iters", "0", "--refine-iters", "0"),
        ("export",),
    )
    for words in commands:
        done = subprocess.run(
            [sys.executable, "-m", "dqtool", *words, "--quiet"], cwd=folder, stdin=subprocess.DEVNULL, check=False,
            capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"dqtool {words[0]}: {done.stderr[-300:]}")
    return str(Path(folder) / "exported")


def random_directory(arch: str) -> str:
    """Return an export of a published architecture with random codes."""
    from dqtool.bench.random_export import random_export
    from dqtool.core.quantization import QuantizationSpec

    return random_export(arch, QuantizationSpec.parse("4/4"))


def packed_of(directory: str) -> Any:
    """Return the packed network of an export, in main memory."""
    from dqtool.runtimes import load

    return load(directory, "simulate")


def time_networks(check: Check, archs: list[str], batches: list[int]) -> None:
    """Time whole networks beside half precision; contenders that matter most come first."""
    from dqtool.artifacts import open_artifact
    from dqtool.bench.gpu_contenders import (
        GPU_CONTENDERS,
        PEERS,
        contender_network,
        dtype_of,
        float_network,
        measured,
        on_device,
        quantized_network,
        weight_bytes,
    )
    from dqtool.bench.subject import Subject
    from dqtool.models.families import family_of

    def subject_of(arch: str) -> Subject:
        artifact = open_artifact(random_directory(arch), ["export"])
        manifest = artifact.manifest
        config = dict(manifest.network.config)
        return Subject(str(artifact.path), manifest.network.class_name, config, [999.0, 500.0, 1.0], "", 1)

    results = check.found.setdefault("speed", {})
    subjects: dict[str, Subject] = {}
    networks: dict[tuple[str, str], Any] = {}

    def network_of(arch: str, kind: str) -> Any:
        """Return the network of an architecture, made once: fp32, fp16 or ours."""
        if (arch, kind) not in networks:
            subject, start = subjects[arch], time.perf_counter()
            if kind == "ours":
                networks[arch, kind] = quantized_network(packed_of(subject.directory))
            else:
                with torch.device("cuda"):
                    made = family_of(subject.class_name, subject.directory).build(subject.config)
                network = float_network(made, dtype_of(kind))
                networks[arch, kind] = (
                    contender_network(kind, network) if kind in PEERS else network
                )  # it changes the network
            torch.cuda.synchronize()
            size = weight_bytes(networks[arch, kind])
            results.setdefault(arch, {})[kind] = {"weight_bytes": size, "load_seconds": time.perf_counter() - start}
            check.say(f"{arch}, {kind}: weights {size / 2**20:.0f} MiB, loaded in {time.perf_counter() - start:.1f} s")
        return networks[arch, kind]

    # A contender on all networks before the next one: a script that is cut short still compares.
    for name, title in GPU_CONTENDERS.items():
        slow = any(word in name for word in ("compile", "autotune", "torchao", "sdnq"))
        for arch in archs:
            for batch in batches:
                if check.left() < (90 if slow else 20):
                    check.say(f"{arch}, batch {batch}, {name}: not run, {check.left():.0f} s are left")
                    continue
                try:
                    subject = subjects.setdefault(arch, subject_of(arch))
                    own = name in PEERS or name.startswith(("ours", "fp32", "bf16"))
                    kind = name if name in PEERS else name.split("-")[0] if own else "fp16"
                    inputs = [on_device(each, dtype_of(name)) for each in subject.inputs(batch)]
                    network = network_of(arch, kind)
                    network = network if name in PEERS else contender_network(name, network)
                    found = measured(name, network, inputs, 1.5)
                except Exception as e:
                    check.say(f"{arch}, batch {batch}, {name} ({title}): FAILED {type(e).__name__}: {str(e)[:200]}")
                    check.failures += name.startswith("ours")
                    continue
                row = results.setdefault(f"{arch} batch {batch}", {})
                row[name] = dataclasses.asdict(found)
                ratio = f", {row['fp32']['median'] / found.median:.2f}x fp32" if "fp32" in row else ""
                check.say(
                    f"{arch}, batch {batch}, {name}: {found.median:.2f} ms ({found.p10:.2f} to {found.p90:.2f}){ratio}, beside "
                    f"weights {(found.peak_bytes or 0) / 2**20:.0f} MiB, first step after {found.ready:.1f} s"
                )


def time_blocks(check: Check) -> None:
    """Time blocks of some products beside the model's prediction, float16 and `torch._int_mm`."""
    from dqtool.runtimes.cuda import launch
    from dqtool.runtimes.cuda.model import candidates, estimate, gpu_of
    from dqtool.runtimes.cuda.products import CudaProduct, Glue
    from dqtool.runtimes.cuda.tiles import Tile

    def milliseconds(run: Callable[[], object]) -> float:
        for _ in range(3):
            run()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(20):
            run()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 20

    own, found = launch.product_tile, check.found.setdefault("blocks", {})
    for m, n, k in ((8192, 320, 320), (8192, 320, 1280), (2048, 640, 2560), (512, 4608, 1152), (2048, 3840, 1280)):
        glue = Glue()
        glue.rows, glue.dtype = torch.zeros(1, dtype=torch.long, device="cuda"), torch.float16
        half, weight = torch.randn(m, k, device="cuda").half(), torch.randn(n, k, device="cuda").half()
        bytes_ = torch.randint(-8, 8, (m, k), device="cuda", dtype=torch.int8)
        across = torch.randint(-8, 8, (n, k), device="cuda", dtype=torch.int8).t()
        line = {
            "float16": milliseconds(lambda: half @ weight.t()),  # noqa: B023
            "_int_mm": milliseconds(lambda: torch._int_mm(bytes_, across)),  # noqa: B023
        }
        for bits in (4, 8):
            product = CudaProduct(layer_of(n, k, bits, bits), glue).cuda()
            codes = product.quantize(half.view(2, -1, k))
            for sizes in candidates(bits, False, gpu_of(check.gpu).warp_groups):
                launch.product_tile = lambda *_, sizes=sizes: Tile(*sizes)
                try:
                    line[f"{bits} bits {sizes}"] = milliseconds(lambda: product.multiply(codes))  # noqa: B023
                finally:
                    launch.product_tile = own
                if check.left() < 10:
                    return
        model = estimate(gpu_of(check.gpu), m, n, k, 4, False, (128, 128, 8, 3))
        found[f"{m} x {n} x {k}"] = line | {"predicted 4 bits (128, 128, 8, 3)": model.seconds * 1e3}
        best = sorted(line.items(), key=lambda item: item[1])[:6]
        check.say(f"{m} x {n} x {k}: " + ", ".join(f"{name} {value * 1e3:.1f} us" for name, value in best))


def learn_block(check: Check) -> None:
    """Time 20 iterations of learning on one quantized residual block of sd14's width, its memory, and how often the host waits."""
    from diffusers.models.resnet import ResnetBlock2D

    from dqtool.core.bits import LayerBits
    from dqtool.nn.layers import FakeQuantLayer
    from dqtool.nn.steps import StepIndex

    torch.manual_seed(0)
    teacher = ResnetBlock2D(in_channels=320, out_channels=320, temb_channels=1280).cuda().requires_grad_(False)
    student = ResnetBlock2D(in_channels=320, out_channels=320, temb_channels=1280)
    student.load_state_dict({name: value.cpu() for name, value in teacher.state_dict().items()})
    for name, layer in list(student.named_modules()):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            fake = FakeQuantLayer(layer, LayerBits(4, 4), StepIndex(torch.arange(50.0)))
            fake.input_scale = nn.Parameter(torch.full((50,), 0.4))
            fake.input_zero_point = nn.Parameter(torch.full((50,), 7.0))
            fake.weight_scale = nn.Parameter(layer.weight.detach().flatten(1).abs().amax(1) / 7)
            fake.weight_zero_point = nn.Parameter(torch.full((len(layer.weight),), 8.0))
            student.set_submodule(name, fake)
    student.cuda()
    optimizer = torch.optim.Adam(student.parameters(), 1e-4)
    x, temb = torch.randn(32, 320, 64, 64, device="cuda"), torch.randn(32, 1280, device="cuda")
    x = x.contiguous(memory_format=torch.channels_last)
    torch.cuda.reset_peak_memory_stats()

    def iterate() -> None:
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            target = teacher(x, temb)
        loss = (student(x, temb) - target.float()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for number in range(23):
        if number == 3:
            torch.cuda.synchronize()
            start = time.perf_counter()
        iterate()
    torch.cuda.synchronize()
    took, peak = (time.perf_counter() - start) / 20, torch.cuda.max_memory_allocated()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        iterate()
        torch.cuda.set_sync_debug_mode("default")
    waits = sum("synchronizing" in str(each.message) for each in said)
    check.say(
        f"one iteration, batch 32, 64x64: {took * 1e3:.1f} ms, peak {peak / 2**30:.2f} GiB, {waits} waits for the device"
    )
    check.found["learning"] = {"seconds": took, "peak_bytes": peak, "waits": waits}


def main() -> int:
    """Run all parts; return 1 after a failure, 4 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--archs", default="sd14,sdxl,dit-xl2")
    parser.add_argument("--batch", default="2,8")
    parser.add_argument("-o", "--output", default=str(RESULTS))
    options = parser.parse_args()
    from dqtool.artifacts.outputs import check_results
    from dqtool.runtimes import cuda

    reason = cuda.missing()
    if reason is not None:
        print(f"gpu-check can't run here: {reason}", file=sys.stderr)
        return 4
    from dqtool.core.device import choose_device

    choose_device("cuda")  # full float32, for the baseline too
    check = Check(options.minutes, Path(options.output))
    check_results(check.path.with_suffix(".json"), [check.path.with_suffix(".md")])
    archs, batches = options.archs.split(","), [int(batch) for batch in options.batch.split(",")]
    check.say(f"{check.gpu}, PyTorch {torch.__version__}, Triton {__import__('triton').__version__}")
    check.part("Kernels against int64", check_kernels, 20)
    check.part("Codes against PyTorch", check_codes, 20)
    check.part("The same integers", check_integers, 60)
    check.part("Speed", lambda c: time_networks(c, archs, batches), 60)
    check.part("Blocks", time_blocks, 30)
    check.part("Learning", learn_block, 20)
    check.say(f"{check.failures} failures; {check.path}.md")
    return int(check.failures > 0)


if __name__ == "__main__":
    sys.exit(main())
