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
from dqtool.runtimes.cuda.planes import PLANES, arrange, pack_planes, padded_channels, plane_bytes, unpack_planes
from dqtool.runtimes.cuda.products import fits


@pytest.mark.parametrize("bits", PLANES)
@pytest.mark.parametrize("chunk", [64, 128])
def test_planes_take_the_bits_of_their_codes(bits: int, chunk: int) -> None:
    codes = torch.randint(0, 2**bits, (5, 3 * chunk), dtype=torch.uint8)
    packed = pack_planes(codes, bits, chunk)
    assert packed.numel() == plane_bytes(5, 3 * chunk, bits) == 5 * 3 * chunk * bits // 8
    assert torch.equal(unpack_planes(packed, bits, chunk, 5, 3 * chunk), codes)


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
