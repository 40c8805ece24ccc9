"""Products of the cuda runtime in Triton's interpreter: accumulators are the int64 reference's, codes are the cpu runtime's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from triton_layers import at_rows, packed_layer_of, stepped

from dqtool.nn.integer import IntegerLayer, Operand, accumulate
from dqtool.runtimes.cpu import library
from dqtool.runtimes.cpu.codes import GEGLU, GELU, GELU_TANH, NONE, SILU, Codes, CurrentStep
from dqtool.runtimes.cpu.native_product import NativeProduct
from dqtool.runtimes.cuda.model import GPUS, best_tile, shared_bytes
from dqtool.runtimes.cuda.planes import (
    PLANES,
    arrange,
    chunk_of,
    pack_planes,
    padded_channels,
    plane_bytes,
    unpack_planes,
)
from dqtool.runtimes.cuda.products import fits


@pytest.mark.parametrize("bits", PLANES)
@pytest.mark.parametrize("chunk", [64, 128])
def test_planes_take_the_bits_of_their_codes(bits: int, chunk: int) -> None:
    for count in (3, 4):
        k = count * chunk
        codes = torch.randint(0, 2**bits, (5, k), dtype=torch.uint8)
        packed = pack_planes(codes, bits, chunk)
        assert packed.numel() == plane_bytes(5, k, bits, chunk)
        assert torch.equal(unpack_planes(packed, bits, chunk, 5, k), codes)
    assert packed.numel() == 5 * k * bits // 8  # eight halves of a chunk fill whole bytes of every plane


def test_rows_of_a_weight_follow_the_pixels() -> None:
    codes = torch.randint(0, 16, (6, 5, 3, 2), dtype=torch.uint8)
    zeros = torch.arange(6, dtype=torch.uint8)
    rows = arrange(codes, zeros, 2).view(6, 6, padded_channels(5))
    assert torch.equal(rows[:, 3, :5], codes[:, :, 1, 1]) and (rows[2, :, 5:] == 2).all()


def check(layer: IntegerLayer, x: torch.Tensor, rows: list[int]) -> None:
    """Accumulators of samples at their rows are the reference's."""
    product = stepped(layer, *rows)
    each = len(x) // len(rows)
    expected = accumulate(at_rows(layer, x, [row for row in rows for _ in range(each)]), layer.unpacked())
    assert torch.equal(product.accumulators(product.quantize(x)).to(torch.int64), expected)


@pytest.mark.parametrize("bits", PLANES)
def test_linear_layers_of_every_width_are_exact_at_every_step(bits: int) -> None:
    torch.manual_seed(bits)
    layer = packed_layer_of(37, 130, bits, divided=bits % 2 == 0)
    x = torch.randn(3, 5, 130) * 0.1 * 2**bits
    check(layer, x, [2, 0, 1])


@pytest.mark.parametrize(
    ("bits", "co", "ci", "kernel", "geometry"),
    [
        (4, 33, 5, 3, {"padding": (1, 1)}),
        (8, 16, 70, 3, {"padding": (0, 0), "stride": (2, 2)}),
        (4, 20, 8, 3, {"padding": (2, 2), "taps_dilation": (2, 2)}),
        (8, 40, 130, 1, {}),
        (4, 12, 8, 3, {"padding": (1, 1), "groups": 2}),
        (8, 6, 6, 5, {"padding": (2, 1), "stride": (3, 2), "groups": 2}),
    ],
)
def test_convolutions_of_every_geometry_are_exact(bits: int, co: int, ci: int, kernel: int, geometry: dict) -> None:
    torch.manual_seed(co + bits)
    layer = packed_layer_of(co, ci, bits, kernel=kernel, divided=True, **geometry)
    x = torch.randn(4, ci, 4, 5) * 0.1 * 2**bits
    check(layer, x, [0, 2])  # two samples at each step


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 7])
def test_convolutions_of_the_other_widths_are_exact(bits: int) -> None:
    check(packed_layer_of(9, 65, bits, 8, kernel=3, padding=(1, 0)), torch.randn(2, 65, 2, 3) * 8, [1, 2])


def test_repeated_pixels_and_rows_of_zeros_are_part_of_the_codes() -> None:
    layer = packed_layer_of(8, 6, 8, kernel=3, padding=(1, 1), stride=(2, 2))
    x, product = torch.randn(2, 6, 4, 3), stepped(layer, 1)
    big = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    got = product.accumulators(product.quantize(x, up=2, extra=(1, 1))).to(torch.int64)
    assert torch.equal(got, accumulate(at_rows(layer, F.pad(big, (0, 1, 0, 1)), [1, 1]), layer.unpacked()))


def test_layers_whose_sums_pass_int32_stay_float() -> None:
    layer = packed_layer_of(1, 8, 8)
    wide = replace(layer, weight=torch.empty(1, 70000, dtype=torch.int8, device="meta"))
    assert fits(layer) and not fits(wide)


@pytest.fixture
def native() -> None:
    if not library.has_products():
        pytest.skip(library.problem() or "the processor lacks AVX2")


def cpu_product(layer: IntegerLayer, row: int) -> NativeProduct:
    """Return the cpu runtime's product at a row."""
    current = CurrentStep()
    current.row = row
    return NativeProduct(layer, current)


def centred(product: NativeProduct, codes: Codes) -> torch.Tensor:
    """Return centred codes of the cpu runtime, int32."""
    return codes.data.to(torch.int32) - product.zero_point()


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("act", [NONE, SILU, GELU, GELU_TANH, GEGLU])
@pytest.mark.parametrize("next_bits", [4, 8])
def test_codes_of_the_next_layer_are_the_cpu_runtimes(act: int, next_bits: int) -> None:
    torch.manual_seed(act)
    width = 70
    first = packed_layer_of(2 * width if act == GEGLU else width, 40, 4)
    second = packed_layer_of(9, width, next_bits, divided=act != NONE)
    x = torch.randn(2, 13, 40)
    for row in (0, 2):
        product, following = stepped(first, row), stepped(second, row)
        got = product.feed(product.quantize(x), following, act)
        cpu, after = cpu_product(first, row), cpu_product(second, row)
        expected = centred(after, cpu.feed(cpu.quantize(x), after, act))[:, :width]
        offset = int(following.steps[row, 2])
        assert torch.equal(got.data[:, :width].to(torch.int32) - offset, expected)


@pytest.mark.usefixtures("native")
def test_floats_are_the_cpu_runtimes_bit_for_bit() -> None:
    torch.manual_seed(0)
    conv = packed_layer_of(20, 12, 4, kernel=3, padding=(1, 1))
    x, residual, bias = torch.randn(2, 12, 5, 4), torch.randn(2, 20, 5, 4), torch.randn(2, 20)
    ours, cpu = stepped(conv, 1), cpu_product(conv, 1)
    cpu.may_winograd = cpu.winograd = False
    got = ours.multiply(ours.quantize(x), bias=bias, residual=residual, post=0.5)
    assert torch.equal(got, cpu.multiply(cpu.quantize(x), bias=bias, residual=residual, post=0.5))
    linear = packed_layer_of(20, 12, 8)
    x, residual, gate = torch.randn(2, 7, 12), torch.randn(2, 7, 20), torch.randn(2, 60).chunk(3, dim=1)[1]
    ours, cpu = stepped(linear, 2), cpu_product(linear, 2)
    got = ours.multiply(ours.quantize(x), residual=residual, gate=gate)
    assert torch.equal(got, cpu.multiply(cpu.quantize(x), residual=residual, gate=gate))
    assert torch.equal(ours(x[0]), cpu(x[0])) and ours(x[:0]).shape == (0, 7, 20)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("linear", [False, True])
def test_codes_after_group_norm_are_the_cpu_runtimes(linear: bool) -> None:
    torch.manual_seed(1)
    layer = packed_layer_of(9, 24, 8, divided=True, **({} if linear else {"kernel": 3, "padding": (1, 1)}))
    norm = nn.GroupNorm(2, 24)
    nn.init.normal_(norm.weight)
    x = torch.randn(1, 24, 16, 9) * 3 + 1
    scale, shift = torch.randn(1, 24), torch.randn(1, 24)
    ours, cpu = stepped(layer, 1), cpu_product(layer, 1)
    offset = int(ours.steps[1, 2])
    for extra in ((), (scale, shift)):
        got, expected = ours.group_norm(x, norm, SILU, *extra), cpu.group_norm(x, norm, SILU, *extra)
        assert got.shape == expected.shape
        assert torch.equal(got.data[..., :24].to(torch.int32) - offset, centred(cpu, expected)[..., :24])


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("affine", [False, True])
def test_codes_after_layer_norm_are_the_cpu_runtimes(affine: bool) -> None:
    torch.manual_seed(2)
    layer = packed_layer_of(9, 72, 6)
    norm = nn.LayerNorm(72, elementwise_affine=affine)
    x, scale, shift = torch.randn(2, 5, 72) + 1, torch.randn(2, 72), torch.randn(1, 72)
    ours, cpu = stepped(layer, 0), cpu_product(layer, 0)
    for extra in ((), (scale, shift)):
        got, expected = ours.layer_norm(x, norm, *extra), cpu.layer_norm(x, norm, *extra)
        assert torch.equal(got.data[:, :72].to(torch.int32), centred(cpu, expected)[:, :72])


def test_half_types_are_read_and_written() -> None:
    layer = packed_layer_of(9, 24, 4)
    product, x = stepped(layer, 1), torch.randn(2, 3, 24).half()
    wide = product(x.float())
    product.current_step.dtype = torch.float16
    assert torch.equal(product(x), wide.half())
    assert product.half().weight_scale.dtype == torch.float32  # scales keep their dtype


def test_a_weight_without_packed_words_is_multiplied_as_bytes() -> None:
    operand = Operand(4, torch.tensor([0.1]), torch.tensor([5], dtype=torch.int32))
    weight = torch.randint(-15, 16, (7, 20), dtype=torch.int8)
    check(IntegerLayer(operand, weight, torch.rand(7), None, None, False), torch.randn(1, 3, 20), [0])


def test_machine_instructions_unpack_every_code() -> None:
    """Run the instructions on integers, since Triton's interpreter has none."""
    from dqtool.runtimes.cuda.kernels.product import operands, unpacking

    for bits, widths in PLANES.items():
        if bits == 8:
            continue
        codes = torch.arange(2**bits).repeat(2, 2)[:, : max(4, 2**bits)].flatten().tolist()
        for half, slot, zero in ((0, 0, 0), (1, 5, 2**bits - 1), (1, 3, 2 ** (bits - 1))):
            moved = [width for width in widths if width != 4]
            shifts = [slot % (8 // width) * width if width != 4 else 4 * half for width in widths]
            for four in zip(*[iter(codes)] * 4, strict=False):
                registers, low = [0], 0
                for width, shift in zip(widths, shifts, strict=True):
                    parts = [
                        (code >> low & (1 << width) - 1) << shift | 0xA5 & ~(((1 << width) - 1) << shift)
                        for code in four
                    ]
                    registers.append(int.from_bytes(parts, "little"))
                    low += width
                registers.append(int.from_bytes([zero] * 4, "little"))
                registers += [s for w, s in zip(widths, shifts, strict=True) if w != 4 for _ in range(4)]
                assert len(registers) == len(operands(len(widths), len(moved)).split(","))
                found = run_instructions(unpacking(widths, half), registers)
                expected = [(code - zero) % 256 for code in four]
                assert list(found.to_bytes(4, "little")) == expected


def run_instructions(text: str, registers: list[int]) -> int:
    """Return `$0` after PTX instructions on registers of 32 bits."""
    held = {f"${i}": value for i, value in enumerate(registers)}
    apply = {
        "shr": lambda a, b: a >> b,
        "shl": lambda a, b: a << b,
        "and": lambda a, b: a & b,
        "or": lambda a, b: a | b,
        "xor": lambda a, b: a ^ b,
        "sub": lambda a, b: a - b,
    }
    for line in text.strip("{} ").split(";"):
        words = line.replace(",", " ").split()
        if not words or words[0] == ".reg":
            continue
        a, b = (held[word] if word in held else int(word, 0) for word in words[2:])
        held[words[1]] = apply[words[0].split(".")[0]](a, b) % 2**32
    return held["$0"]


def test_blocks_that_share_the_codes_of_a_result_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    from dqtool.runtimes.cuda import launch
    from dqtool.runtimes.cuda.tiles import Tile

    torch.manual_seed(0)
    layer, following = packed_layer_of(20, 500, 4, 8), stepped(packed_layer_of(9, 20, 4), 1)
    conv = packed_layer_of(9, 70, 8, kernel=3, padding=(1, 1))
    x, image, residual = torch.randn(2, 3, 500) * 3, torch.randn(2, 70, 3, 2) * 20, torch.randn(2, 3, 20)
    product = stepped(layer, 1)
    codes = product.quantize(x)

    def results() -> list[torch.Tensor]:
        return [
            product.multiply(codes, residual=residual, post=0.5),
            product.feed(codes, following, SILU).data[:, :20],
        ]

    found = []
    for splits in (1, 3):
        tile = Tile(16, 32, 4, 1, splits, assembly=False)
        monkeypatch.setattr(launch, "product_tile", lambda *_, tile=tile: tile)
        found.append(results())
        check(layer, x, [2, 0])
        check(conv, image, [1])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_norms_without_bias_are_those_with_a_bias_of_zero() -> None:
    torch.manual_seed(3)
    product, x = stepped(packed_layer_of(9, 24, 4), 1), torch.randn(2, 3, 24) * 3
    norm, plain = nn.LayerNorm(24), nn.LayerNorm(24, bias=False)
    plain.weight = norm.weight
    assert torch.equal(product.layer_norm(x, plain).data, product.layer_norm(x, norm).data)
    image, group = x.transpose(1, 2).unsqueeze(-1), nn.GroupNorm(2, 24)
    expected = product.group_norm(image, group).data
    group.bias = None
    assert torch.equal(product.group_norm(image, group).data, expected)


@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("bits", PLANES)
def test_chosen_blocks_fit_the_shared_memory(name: str, bits: int) -> None:
    gpu = GPUS[name]
    for m, n, k in ((8192, 320, 2880), (128, 1280, 11520), (2, 1280, 1280), (4608, 12288, 3072)):
        for gated in (False, True):
            *tile, splits = best_tile(gpu, m, n, k, bits, gated)
            assert shared_bytes(gpu, tuple(tile), bits, gated, chunk_of(k)) <= gpu.shared * 1024
            assert splits == 1 or (m <= 512 and not gated)
