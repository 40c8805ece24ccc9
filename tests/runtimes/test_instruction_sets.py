"""Kernels of each instruction set that this processor has: the integers of the int64 reference, and attention with the same
bits on all of them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import pytest
import torch
from test_cpu import linear_layer, random_layer
from torch import Tensor

from dqtool.errors import UsageError
from dqtool.nn.integer import IntegerLayer, accumulate
from dqtool.runtimes.cpu import library
from dqtool.runtimes.cpu.codes import GEGLU, GELU, SILU, CurrentStep
from dqtool.runtimes.cpu.native_product import NativeProduct
from dqtool.runtimes.cpu.product import Product

CACHES = (library._load, library.has_products, library.has_vnni, library.on_tiles)
Use = Callable[[str], ctypes.CDLL]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Iterator[Use]:
    """Return a function that loads the kernels of an instruction set. Loaded kernels are forgotten at the end."""
    if not library.has_products():
        pytest.skip(library.problem() or "the processor lacks AVX2")

    def load(name: str) -> ctypes.CDLL:
        monkeypatch.setenv("DQTOOL_ISA", name)
        for cache in CACHES:
            cache.cache_clear()
        kernels = library.get()
        assert kernels is not None, library.problem()
        return kernels

    yield load
    for cache in CACHES:
        cache.cache_clear()


def exact(layer: IntegerLayer, x: Tensor) -> bool:
    """Return whether the accumulators of `x` are the reference's."""
    assert layer.input is not None
    expected = accumulate(layer.input.codes(x, 0, channel_dim=1 if layer.is_conv else -1), layer)
    product = NativeProduct(layer, CurrentStep())
    return torch.equal(product.accumulators(product.quantize(x)).to(torch.int64), expected)


@pytest.mark.parametrize("bits", [2, 4, 6, 7, 8])
def test_every_width_and_shape_is_exact_on_avx2(use: Use, bits: int) -> None:
    use("avx2")
    torch.manual_seed(bits)
    for co, ci, kernel, size, geometry in (
        (64, 32, 3, (6, 6), {"padding": (1, 1)}),
        (20, 18, 3, (5, 7), {"padding": (2, 2), "taps_dilation": (2, 2)}),
        (70, 33, 3, (6, 6), {"padding": (1, 1), "stride": (2, 2)}),
        (130, 5, 1, (3, 5), {}),
    ):
        layer = random_layer(co, ci, kernel, bits, **geometry)  # type: ignore[arg-type]
        assert exact(layer, torch.randn(2, ci, *size) * 0.1 * 2**bits / 4), (co, ci)
    for rows, co, ci in ((1, 8, 320), (7, 200, 76), (100, 64, 640), (50, 24, 3)):
        assert exact(linear_layer(co, ci, bits), torch.randn(rows, ci) * 0.1 * 2**bits / 4), (rows, co, ci)


def test_codes_at_both_ends_do_not_overflow_on_avx2(use: Use) -> None:
    """All codes and weights at their largest magnitude, over as many channels as full-size layers sum up."""
    use("avx2")
    for bits in (4, 5, 6, 7, 8):
        layer = linear_layer(16, 5120, bits)
        layer.weight.fill_(-(2 ** (bits - 1)) if bits < 8 else -128)
        layer.weight[:, 1::2] = 2 ** (bits - 1) - 1
        for x in (torch.full((3, 5120), 1e4), torch.full((3, 5120), -1e4)):
            assert exact(layer, x), bits


@pytest.mark.parametrize("bits", [2, 4, 5, 6, 7, 8])
def test_winograd_transforms_are_exact_on_avx2(use: Use, bits: int) -> None:
    """Channels that fill no register, outputs of odd size, and codes and weights at both ends."""
    use("avx2")
    torch.manual_seed(bits)
    for co, ci, size in ((64, 32, (6, 6)), (20, 18, (5, 7)), (48, 100, (9, 8)), (17, 333, (3, 3)), (33, 64, (1, 1))):
        layer = random_layer(co, ci, 3, bits, padding=(1, 1))
        for x in (torch.randn(2, ci, *size) * 0.1 * 2**bits / 4, torch.full((1, ci, *size), 1e4)):
            assert exact(layer, x), (co, ci)
            layer.weight.fill_(-(2 ** (bits - 1)))
            layer.weight[:, 1::2, 1] = 2 ** (bits - 1) - 1


def test_sums_in_16_bits_are_as_long_as_the_weights_allow_on_avx2(use: Use) -> None:
    """A window holds the most products that can't overflow: of codes up to 4 * 15 with weights of 4 * 7 in the first plane, of 7 in the eleventh."""
    use("avx2")
    layer = random_layer(16, 512, 3, 4, padding=(1, 1))
    layer.weight.zero_()
    layer.weight[3, :, 0, 0] = 7
    product = NativeProduct(layer, CurrentStep())
    x = torch.randn(1, 512, 4, 4)
    product(x)
    assert product.winograd and product.sums is not None
    windows = product.sums[256:].tolist()
    most = 32767 // (60 * 28 * 2)
    assert windows[0] in (most, most - 1) and windows[10] == 32 and windows[15] == 128
    assert exact(layer, x)


def test_products_that_do_not_fit_32_bits_four_times_are_not_transformed_on_avx2(use: Use) -> None:
    use("avx2")
    layer = random_layer(16, 1900, 3, 8, padding=(1, 1))
    for weight, fits in ((-128, False), (-100, True)):  # 1900 * 9 * 128 * 255 * 4 > 2^31
        layer.weight.fill_(weight)
        product = NativeProduct(layer, CurrentStep())
        x = torch.full((1, 1900, 2, 2), 1e4)
        product(x)
        assert product.winograd == fits
        assert exact(layer, x) and exact(layer, -x)


@pytest.mark.parametrize("act", [GELU, GEGLU])
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_of_the_next_layer_on_avx2(use: Use, act: int, bits: int) -> None:
    use("avx2")
    first, second = linear_layer(1408 if act == GEGLU else 704, 64, bits), linear_layer(24, 704, bits)
    product, following = NativeProduct(first, CurrentStep()), NativeProduct(second, CurrentStep())
    codes = product.quantize(torch.randn(75, 64))
    assert torch.equal(product.feed(codes, following, act).data, Product.feed(product, codes, following, act).data)


def attend(kernels: ctypes.CDLL, sizes: tuple[int, int, int], bits: int, probs: int, masked: bool) -> Tensor:
    """Return the attention kernel's result on random operands `[2, 3, S, D]`."""
    (sq, sk, d), n, heads, half = sizes, 2, 3, 2 ** (bits - 1)
    torch.manual_seed(sq)
    q, k, v = (torch.randn(n, heads, s, d) for s in (sq, sk, sk))
    mask, one, top = torch.randn(sq, sk), torch.ones(heads), 2**probs - 1
    operands = (*[(half / 2.5, -half, half - 1)] * 3, (top, 0, top))
    tables = torch.stack([torch.stack([one * m, one * low, one * high]) for m, low, high in operands]).contiguous()
    scores, results = one * d**-0.5 * (2.5 / half) ** 2, one * 2.5 / half / top
    out = torch.empty(n, sq, heads * d)
    strides = [(ctypes.c_int64 * 3)(*t.stride()[:3]) for t in (q, k, v)]
    kernels.dq_attention(
        q.data_ptr(), strides[0], k.data_ptr(), strides[1], v.data_ptr(), strides[2], n, heads, sq, sk, d,
        tables.data_ptr(), scores.data_ptr(), results.data_ptr(), mask.data_ptr() if masked else None, 0, 0, sk,
        out.data_ptr(),
    )  # fmt: skip
    expected = softmax_reference(q, k, v, tables, scores, results, mask if masked else None)
    # A softmax value on a rounding tie may take the neighbouring code.
    assert (out - expected).abs().mean() < 1e-4 * expected.abs().mean()
    return out


def softmax_reference(
    q: Tensor, k: Tensor, v: Tensor, tables: Tensor, scores: Tensor, results: Tensor, mask: Tensor | None
) -> Tensor:
    """Return attention on int64 codes with a softmax in float64."""
    codes = []
    for x, (m, low, high) in zip((q, k, v), tables[:3].tolist(), strict=True):
        codes.append((x * m[0]).round().clamp(low[0], high[0]).long())
    s = (codes[0] @ codes[1].transpose(-1, -2)).double() * scores.double().view(-1, 1, 1)
    p = (s if mask is None else s + mask).softmax(-1) * float(tables[3, 0, 0])
    p = p.round().clamp(0, float(tables[3, 2, 0])).long()
    return ((p @ codes[2]).double() * results.double().view(-1, 1, 1)).transpose(1, 2).flatten(2).float()


@pytest.mark.parametrize(("bits", "probs"), [(4, 4), (4, 8), (6, 8), (8, 8)])
def test_attention_has_the_same_bits_on_every_instruction_set(use: Use, bits: int, probs: int) -> None:
    sizes = (
        (5, 5, 8),
        (70, 77, 40),
        (33, 130, 3),
        (25, 70, 64),
        (9, 256, 72),
        (7, 33, 80),
        (13, 40, 128),
        (6, 64, 160),
    )
    found: dict[str, list[Tensor]] = {}
    for name in library.instruction_sets():
        kernels = use(name)
        found[name] = [attend(kernels, each, bits, probs, masked) for each in sizes for masked in (False, True)]
    first, *others = found.values()
    assert library.problem() is None
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    ("bits", "probs", "sharp"), [(4, 8, 1.0), (6, 8, 1.0), (8, 8, 1.0), (8, 8, 40.0), (4, 4, 40.0)]
)
def test_probabilities_at_their_largest_do_not_overflow_on_avx2(use: Use, bits: int, probs: int, sharp: float) -> None:
    """Values at one end, and probabilities that are even, lie between two codes, or stand alone."""
    kernels, heads, (sq, sk, d) = use("avx2"), 1, (7, 500, 24)
    half, top, one = 2 ** (bits - 1), 2**probs - 1, torch.ones(1)
    q, k, v = torch.ones(1, heads, sq, d) * 9, torch.zeros(1, heads, sk, d), torch.full((1, heads, sk, d), -9.0)
    k[..., :2, :] = 9 * (sharp > 1)
    low = -half if bits < 8 else -127
    tables = torch.stack(
        [torch.stack([one * m, one * a, one * b]) for m, a, b in (*[(half / 2.5, low, half - 1)] * 3, (top, 0, top))]
    )
    scores, results, out = one * 1e-3 * sharp, one, torch.empty(1, sq, d)
    strides = [(ctypes.c_int64 * 3)(*t.stride()[:3]) for t in (q, k, v)]
    kernels.dq_attention(
        q.data_ptr(), strides[0], k.data_ptr(), strides[1], v.data_ptr(), strides[2], 1, heads, sq, sk, d,
        tables.contiguous().data_ptr(), scores.data_ptr(), results.data_ptr(), None, 0, 0, 0, out.data_ptr(),
    )  # fmt: skip
    assert torch.equal(out, softmax_reference(q, k, v, tables, scores, results, None))


def test_codes_after_a_group_norm_do_not_depend_on_threads(use: Use) -> None:
    use("avx2")
    torch.manual_seed(0)
    product, norm = NativeProduct(linear_layer(8, 64, 8), CurrentStep()), torch.nn.GroupNorm(8, 64)
    x, before = torch.randn(1, 64, 90, 90) * 3 + 1, torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(product.group_norm(x, norm, SILU).data)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_an_instruction_set_that_the_processor_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DQTOOL_ISA", "neon9")
    with pytest.raises(UsageError, match="neon9"):
        library.instruction_sets()
    monkeypatch.delenv("DQTOOL_ISA")
    monkeypatch.setattr(library, "_processor_flags", lambda: frozenset({"sse2"}))
    assert library.instruction_sets() == []
