"""Check the `cuda` runtime on a GPU and time it, in under eight minutes. Needs no network.

    python recipes/gpu_check.py [--minutes 7.5] [--archs sd14,sdxl,dit-xl2] [--batch 2,8]

Packages: a PyTorch for CUDA with its Triton, and diffusers, accelerate, transformers, safetensors, huggingface-hub, typer, rich,
pyyaml, numpy, pillow with what they need. dqtool need not be installed: the script takes the one that it lies beside.

Parts, in the order of what matters: kernels against int64, codes, attention and epilogues against PyTorch, every layer of digits-ddpm
and one layer of each shape of sd14, whole networks beside half precision, blocks of the kernels, one block that learns, compiled
networks. With every line recipes/results/gpu-check-GPU.md and .json are written: what was measured stays when the script is cut
short.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

RESULTS = ROOT / "recipes" / "results"
START = time.perf_counter()
DEVICE = "cuda"
"""Device of the kernels; tests take the CPU and Triton's interpreter."""
BLOCK_SECONDS = 90.0
"""Longest time for the comparison of all blocks, each of which is compiled first."""
COMPILE_SECONDS = 120.0
"""Longest time of a contender that is compiled."""


class OutOfTime(BaseException):
    """A measurement took longer than it may. Not an `Exception`, which a compiler would catch and go on."""


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in the context when `seconds` have passed."""

    def stop(*_: object) -> None:
        raise OutOfTime(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Check:
    """Findings so far, and the files that hold them."""

    def __init__(self, minutes: float, folder: Path) -> None:
        self.end = START + 60 * minutes
        self.gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
        self.path = folder / f"gpu-check-{re.sub(r'[^a-z0-9]+', '-', self.gpu.lower()).strip('-')}"
        self.lines: list[str] = []
        self.found: dict[str, Any] = {"format": "dqtool-result/1", "gpu": self.gpu, "torch": torch.__version__}
        self.found["command"] = " ".join(sys.argv)
        self.failures = 0

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.end - time.perf_counter()

    def say(self, line: str) -> None:
        """Print a line, keep it, and write the files."""
        print(f"[{time.perf_counter() - START:6.1f} s] {line}", flush=True)
        self.lines.append(line)
        self.write()

    def write(self) -> None:
        """Write what was found so far."""
        page = [f"# GPU check on {self.gpu}", "", f"`{self.found['command']}`, PyTorch {torch.__version__}", ""]
        found = json.dumps(self.found | {"failures": self.failures}, indent=2)
        for suffix, text in ((".json", found), (".md", "\n".join([*page, *self.lines]))):
            made = self.path.with_suffix(f"{suffix}.new")  # a kill leaves the last whole file
            made.write_text(text + "\n")
            made.replace(self.path.with_suffix(suffix))

    def failed(self, what: str, error: BaseException) -> None:
        """Count and say a failure."""
        self.failures += 1
        first = str(error).splitlines()[0][:300] if str(error) else ""
        self.say(f"{what}FAILED: {type(error).__name__}: {first}")

    def part(self, title: str, run: Callable[[Check], None], needs: float) -> None:
        """Run one part if `needs` seconds are left; a failure does not stop the others."""
        self.say(f"## {title}")
        if self.left() < needs:
            self.say(f"not run: {self.left():.0f} s are left")
        else:
            try:
                run(self)
            except Exception as e:
                traceback.print_exc()
                self.failed("", e)
        self.write()


class Tally:
    """Counts of a comparison in `check.found[name]`. An error in one case is a failure, and leaves the counts of the others."""

    def __init__(self, check: Check, name: str) -> None:
        self.check = check
        self.counts = check.found[name] = {"cases": 0, "compared": 0, "different": 0, "errors": 0}

    def add(self, what: str, layer: Any, x: Tensor, rows: list[int]) -> str:
        """Compare a layer, and return how that went."""
        self.counts["cases"] += 1
        try:
            compared, different = differences(layer, x, rows)
        except Exception as e:
            self.counts["errors"] += 1
            self.check.failed(f"{what}: ", e)
            return "failed"
        self.counts["compared"] += compared
        self.counts["different"] += different
        self.check.failures += different > 0
        return f"{compared} accumulators, {different} differ"

    def __str__(self) -> str:
        c = self.counts
        return f"{c['cases']} cases, {c['compared']} accumulators, {c['different']} differ from int64, {c['errors']} errors"


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
    glue.rows = torch.tensor(rows, device=DEVICE)
    product = CudaProduct(layer, glue).to(DEVICE)
    each = len(x) // len(rows)
    got = product.accumulators(product.quantize(x.to(DEVICE)))
    dim = 1 if layer.is_conv else -1
    codes = torch.stack([layer.input.codes(x[i : i + 1], rows[i // each], dim)[0] for i in range(len(x))])
    c, w = codes.to(DEVICE).double(), layer.unpacked().weight.to(DEVICE).double()
    if layer.is_conv:
        expected = F.conv2d(c, w, None, layer.stride, layer.padding, layer.taps_dilation, layer.groups)
    else:
        expected = F.linear(c, w)
    return expected.numel(), int((got.double() != expected).sum())


def check_kernels(check: Check) -> None:
    """Compare accumulators of random layers: every width, block and geometry."""
    from dqtool.runtimes.cuda.model import candidates, gpu_of
    from dqtool.runtimes.cuda.tiles import Tile

    torch.manual_seed(0)
    tally = Tally(check, "kernels")
    for bits in (2, 3, 4, 5, 6, 7, 8):
        for input_bits in (bits, 8):
            name, layer = f"{bits}/{input_bits}", layer_of(200, 330, bits, input_bits)
            tally.add(f"linear layer {name}", layer, torch.randn(3, 70, 330) * 8, [2, 0, 1])
            layer = layer_of(72, 40, bits, input_bits, 3, padding=(1, 1), stride=(2, 2))
            tally.add(f"convolution {name}", layer, torch.randn(4, 40, 15, 9) * 8, [1, 2])
    for extra in ({"groups": 2}, {"taps_dilation": (2, 2)}):
        layer = layer_of(64, 64, 4, 4, 3, padding=(1, 1), **extra)
        tally.add(f"convolution with {extra}", layer, torch.randn(2, 64, 9, 9), [0])
    check.say(f"widths and geometries: {tally}")
    groups = gpu_of(check.gpu).warp_groups
    each = {bits: candidates(bits, False, groups) for bits in (4, 8, 6, 7)}
    longest = max(len(sizes) for sizes in each.values())
    forms = ((True, 1), (False, 1), (True, 3))
    # All widths take turns, so that a loop that is cut short has seen each.
    blocks = [
        (bits, Tile(*sizes[number], splits, assembly))
        for number in range(longest)
        for bits, sizes in each.items()
        if number < len(sizes)
        for assembly, splits in forms
    ]
    check_blocks(check, blocks)


def check_blocks(check: Check, blocks: list[tuple[int, Any]], size: tuple[int, int, int] = (200, 300, 640)) -> None:
    """Compare accumulators of one product (rows, columns, codes) in each of `blocks` of (bits, tile), while there is time."""
    from dqtool.runtimes.cuda import launch

    rows, columns, codes = size
    own, tally, end = launch.product_tile, Tally(check, "blocks of kernels"), time.perf_counter() + BLOCK_SECONDS
    for number, (bits, tile) in enumerate(blocks):
        if check.left() < 60 or time.perf_counter() > end:
            check.say(f"blocks: the other {len(blocks) - number} of {len(blocks)} were not compared")
            break
        launch.product_tile = lambda *_, tile=tile: tile
        try:
            done = tally.add(
                f"block {tuple(tile)}", layer_of(columns, codes, bits, bits), torch.randn(2, rows, codes), [1]
            )
        finally:
            launch.product_tile = own
        if done != "failed":
            check.say(f"{bits} bits, block {tuple(tile)}: {done}")
    check.say(f"blocks: {tally}")


def check_codes(check: Check) -> None:
    """Compare codes after norms and activations with PyTorch in float32."""
    import torch.nn.functional as F

    from dqtool.runtimes.cpu.codes import GELU, SILU
    from dqtool.runtimes.cuda.products import CudaProduct, Glue

    torch.manual_seed(0)
    glue = Glue()
    glue.rows = torch.ones(1, dtype=torch.long, device=DEVICE)
    conv = CudaProduct(layer_of(64, 320, 4, 4, 3, padding=(1, 1)), glue).to(DEVICE)
    linear = CudaProduct(layer_of(64, 320, 4, 8), glue).to(DEVICE)
    x = torch.randn(2, 320, 32, 32, device=DEVICE).contiguous(memory_format=torch.channels_last)
    norm, layer_norm = nn.GroupNorm(32, 320).to(DEVICE), nn.LayerNorm(320).to(DEVICE)
    rows = torch.randn(2, 77, 320, device=DEVICE)
    pairs = {
        "group norm, SiLU": (conv.group_norm(x, norm, SILU), conv.quantize(F.silu(norm(x)))),
        "layer norm": (linear.layer_norm(rows, layer_norm), linear.quantize(layer_norm(rows))),
        "GELU": (linear.quantize(rows, GELU), linear.quantize(F.gelu(rows))),
    }
    for name, (got, expected) in pairs.items():
        off = (got.data.int() - expected.data.int()).abs()
        check.say(f"codes after {name}: {float((off > 0).float().mean()):.2e} differ, by {int(off.max())} at most")
        check.failures += int(off.max()) > 1


def check_attention(
    check: Check, dims: tuple[int, ...] = (40, 72, 128, 160), queries: int = 200, keys: int = 177
) -> None:
    """Compare attention with the simulation on the CPU: sizes of heads, both widths of probabilities, with and without a mask.

    `queries` and `keys` are no multiples of a block.
    """
    from dqtool.runtimes.cuda.self_check import MEAN_DIFFERENCE, ROW_DIFFERENCE, attention_differences

    found = check.found["attention"] = {}
    for dim in dims:
        for bits, probs in ((4, 8), (8, 4)):
            for masked in (False, True):
                name = f"heads of {dim}, q, k, v {bits}, probs {probs}{', masked' if masked else ''}"
                try:
                    mean, row = attention_differences(DEVICE, bits, probs, queries, keys, dim, masked)
                except Exception as e:
                    check.failed(f"attention, {name}: ", e)
                    continue
                found[name] = {"mean": mean, "worst_row": row}
                check.failures += not (mean <= MEAN_DIFFERENCE and row <= ROW_DIFFERENCE)
                check.say(f"attention, {name}: differs by {mean:.1e}, the worst row by {row:.1e} of the mean value")


def check_epilogues(check: Check, rows: int = 100, width: int = 200, channels: int = 330) -> None:
    """Compare what follows a product with float64: GEGLU into the next layer's codes; bias, gate, residual and factor."""
    import torch.nn.functional as F

    from dqtool.runtimes.cpu.codes import GEGLU, GELU, NONE
    from dqtool.runtimes.cuda.products import CudaProduct, Glue

    torch.manual_seed(0)
    glue, row = Glue(), 1
    glue.rows = torch.tensor([row], device=DEVICE)
    found = check.found["epilogues"] = {}

    def exact(layer: Any, x: Tensor) -> Tensor:
        """Return the product of a layer without its bias, float64."""
        codes = layer.input.codes(x, row, 1 if layer.is_conv else -1).double()
        weight = layer.unpacked().weight.double() * (layer.weight_scale * layer.input.scale[row]).double().view(
            -1, *(1,) * (layer.weight.dim() - 1)
        )
        return F.conv2d(codes, weight, None, layer.stride, layer.padding) if layer.is_conv else F.linear(codes, weight)

    def feed(bits: int, act: int) -> str:
        first = layer_of((2 if act == GEGLU else 1) * width, channels, bits, bits)
        first.weight_scale.div_(4 * channels**0.5 * 2**bits)
        second, x = layer_of(72, width, 4, bits), torch.randn(2, rows, channels)
        y = exact(first, x) + first.bias.double()
        if act == GEGLU:
            value, gate = y.chunk(2, -1)
            y = value * F.gelu(gate)
        else:
            y = F.gelu(y) if act == GELU else y
        expected = second.input.codes(y.float(), row)
        product, following = (CudaProduct(layer, glue).to(DEVICE) for layer in (first, second))
        codes = product.feed(product.quantize(x.to(DEVICE)), following, act)
        got = codes.data[:, :width].cpu().int() - int(following.steps[row, 2])
        off = (got - expected.view(-1, width)).abs()
        share, most = float((off > 0).float().mean()), int(off.max())
        check.failures += share > 1e-3 or most > 1
        return f"{share:.1e} of the codes differ, by {most} at most"

    def finish(kernel: int) -> str:
        layer = layer_of(72, 40, 4, 8, kernel, **({"padding": (1, 1)} if kernel else {}))
        x = torch.randn(2, 40, 9, 7) if kernel else torch.randn(2, rows, 40)
        y = exact(layer, x)
        residual, gate, bias = torch.randn(y.shape), torch.randn(2, 72), torch.randn(2, 72)
        then = {"residual": residual, "post": 0.5} | ({"bias": bias} if kernel else {"gate": gate})
        y = y + bias[:, :, None, None].double() if kernel else (y + layer.bias.double()) * gate[:, None].double()
        expected = (y + residual.double()) * 0.5
        product = CudaProduct(layer, glue).to(DEVICE)
        moved = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in then.items()}
        got = product.multiply(product.quantize(x.to(DEVICE)), **moved)
        off = float((got.cpu().double() - expected).abs().max() / expected.abs().max())
        check.failures += not off < 1e-5
        return f"differs by {off:.1e} of the largest value"

    for name, run in {
        "GEGLU into codes of 4 bits": lambda: feed(4, GEGLU),
        "GEGLU into codes of 8 bits": lambda: feed(8, GEGLU),
        "GELU into codes of 8 bits": lambda: feed(8, GELU),
        "a product into codes of 4 bits": lambda: feed(4, NONE),
        "gate, residual and factor of a linear layer": lambda: finish(0),
        "bias of each sample, residual and factor of a convolution": lambda: finish(3),
    }.items():
        try:
            found[name] = run()
        except Exception as e:
            check.failed(f"{name}: ", e)
            continue
        check.say(f"{name}: {found[name]}")


def check_layers(check: Check, name: str, network: nn.Module, once: bool) -> None:
    """Compare accumulators of a packed network's layers at their steps; `once` takes one layer of each shape."""
    from dqtool.nn.integer import integer_layer
    from dqtool.nn.packed_layer import PackedLayer

    seen: set[Any] = set()
    tally = Tally(check, f"integers {name}")
    for path, layer in network.named_modules():
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
        tally.add(f"{name}, {path}", integer, x, [0, steps - 1])
    check.say(f"{name}, layers: {tally}")


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


class Networks:
    """Networks to time, each made once."""

    def __init__(self, check: Check) -> None:
        self.check = check
        self.results = check.found.setdefault("speed", {})
        self.subjects: dict[str, Any] = {}
        self.made: dict[tuple[str, str], Any] = {}

    def subject(self, arch: str) -> Any:
        """Return the export of an architecture as a benchmark's subject."""
        from dqtool.artifacts import open_artifact
        from dqtool.bench.subject import Subject

        if arch not in self.subjects:
            artifact = open_artifact(random_directory(arch), ["export"])
            wanted = artifact.manifest.network
            times = [999.0, 500.0, 1.0]
            self.subjects[arch] = Subject(str(artifact.path), wanted.class_name, dict(wanted.config), times, "", 1)
        return self.subjects[arch]

    def network(self, arch: str, kind: str) -> Any:
        """Return the network of an architecture: fp32, fp16, bf16, ours, or that of another library, which changes it."""
        from dqtool.bench.gpu_contenders import (
            PEERS,
            contender_network,
            dtype_of,
            float_network,
            quantized_network,
            weight_bytes,
        )
        from dqtool.models.families import family_of

        if (arch, kind) not in self.made:
            subject, start = self.subject(arch), time.perf_counter()
            if kind == "ours":
                network = quantized_network(packed_of(subject.directory))
            else:
                with torch.device("cuda"):
                    made = family_of(subject.class_name, subject.directory).build(subject.config)
                network = float_network(made, dtype_of(kind))
                network = contender_network(kind, network) if kind in PEERS else network
            self.made[arch, kind] = network
            torch.cuda.synchronize()
            size, took = weight_bytes(network), time.perf_counter() - start
            self.results.setdefault(arch, {})[kind] = {"weight_bytes": size, "load_seconds": took}
            self.check.say(f"{arch}, {kind}: weights {size / 2**20:.0f} MiB, loaded in {took:.1f} s")
        return self.made[arch, kind]

    def make_room(self) -> None:
        """Drop the networks where they take half of the memory. They are made anew when they are asked for."""
        free, total = torch.cuda.mem_get_info()
        if free < total / 2:
            self.made.clear()
            torch.cuda.empty_cache()


COMPILED = ("compile", "autotune", "torchao", "sdnq")
"""Words in the names of contenders that compile for a minute or more."""


def time_networks(check: Check, networks: Networks, archs: list[str], batches: list[int], compiled: bool) -> None:
    """Time whole networks beside half precision: contenders that are `compiled`, or the others."""
    from dqtool.bench.gpu_contenders import GPU_CONTENDERS

    # A contender on all networks before the next one: a script that is cut short still compares.
    for name in GPU_CONTENDERS:
        if any(word in name for word in COMPILED) != compiled:
            continue
        for arch in archs:
            for batch in batches:
                what = f"{arch}, batch {batch}, {name}"
                if check.left() < (60 if compiled else 20):
                    check.say(f"{what}: not run, {check.left():.0f} s are left")
                    continue
                try:
                    with limited(min(check.left() - 10, COMPILE_SECONDS)):
                        time_network(check, networks, name, arch, batch)
                except (Exception, OutOfTime) as e:
                    check.failures += name.startswith("ours") and isinstance(e, Exception)
                    check.say(f"{what}: FAILED {type(e).__name__}: {str(e)[:200]}")
                    if compiled:
                        torch._dynamo.reset()
    networks.make_room()


def time_network(check: Check, networks: Networks, name: str, arch: str, batch: int) -> None:
    """Time one contender on one network."""
    from dqtool.bench.gpu_contenders import PEERS, contender_network, dtype_of, measured, on_device

    own = name in PEERS or name.startswith(("ours", "fp32", "bf16"))
    kind = name if name in PEERS else name.split("-")[0] if own else "fp16"
    inputs = [on_device(each, dtype_of(name)) for each in networks.subject(arch).inputs(batch)]
    network = networks.network(arch, kind)
    found = measured(name, network if name in PEERS else contender_network(name, network), inputs, 1.5)
    row = networks.results.setdefault(f"{arch} batch {batch}", {})
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

    own, found, end = launch.product_tile, check.found.setdefault("blocks", {}), time.perf_counter() + BLOCK_SECONDS
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
                if check.left() < 10 or time.perf_counter() > end:
                    break
                launch.product_tile = lambda *_, sizes=sizes: Tile(*sizes)
                try:
                    line[f"{bits} bits {sizes}"] = milliseconds(lambda: product.multiply(codes))  # noqa: B023
                except Exception as e:
                    check.failed(f"{m} x {n} x {k}, {bits} bits {sizes}: ", e)
                finally:
                    launch.product_tile = own
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
    check.part("Attention against the simulation", check_attention, 20)
    check.part("Epilogues against float64", check_epilogues, 20)
    check.part(
        "Integers of digits-ddpm", lambda c: check_layers(c, "digits-ddpm", packed_of(digits_export()), False), 60
    )
    check.part("Integers of sd14", lambda c: check_layers(c, "sd14", packed_of(random_directory("sd14")), True), 60)
    networks = Networks(check)
    check.part("Speed", lambda c: time_networks(c, networks, archs, batches, False), 60)
    check.part("Blocks", time_blocks, 30)
    check.part("Learning", learn_block, 20)
    check.part("Speed, compiled", lambda c: time_networks(c, networks, archs, batches, True), 60)
    check.say(f"{check.failures} failures; {check.path}.md")
    return int(check.failures > 0)


if __name__ == "__main__":
    sys.exit(main())
