"""Products on AMX's matrix tiles: the kernels with their instructions emulated, against the int64 reference and the vector
kernels. That the instructions themselves compile is checked as well."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_cpu import linear_layer, quantized, random_layer

from dqtool.nn.integer import IntegerLayer, accumulate
from dqtool.runtimes.cpu import library
from dqtool.runtimes.cpu.build import source_text
from dqtool.runtimes.cpu.codes import GEGLU, GELU, CurrentStep
from dqtool.runtimes.cpu.native_product import NativeProduct
from dqtool.runtimes.cpu.product import Product

EMULATION = Path(__file__).parent / "emulated_amx.h"


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    """The kernels with AMX emulated, in use."""
    if not library.has_vnni():
        pytest.skip(library.problem() or "the processor lacks AVX512-VNNI")
    content = zlib.crc32(EMULATION.read_bytes())  # the library's name says nothing of what is included
    monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, "-include", str(EMULATION), f"-DEMULATION={content}"))
    monkeypatch.delenv("DQTOOL_AMX", raising=False)
    caches = (library._load, library.has_products, library.has_vnni, library.on_tiles)
    for cache in caches:
        cache.cache_clear()
    try:
        kernels = library.get()
        assert kernels is not None, library.problem()
        assert library.on_tiles(64) and not library.on_tiles(76)
        kernels.emulated_multiplications.restype = ctypes.c_long
        yield kernels
    finally:
        for cache in caches:
            cache.cache_clear()


def check(kernels: ctypes.CDLL, layer: IntegerLayer, x: torch.Tensor, tiles: bool) -> None:
    """Accumulators of `x` are the reference's, and came from tiles or not."""
    assert layer.input is not None
    expected = accumulate(layer.input.codes(x, 0, channel_dim=1 if layer.is_conv else -1), layer)
    product = NativeProduct(layer, CurrentStep())
    before = kernels.emulated_multiplications()
    got = product.accumulators(product.quantize(x)).to(torch.int64)
    assert torch.equal(got, expected)
    assert (kernels.emulated_multiplications() > before) == tiles


@pytest.mark.parametrize(
    ("co", "ci", "kernel", "sizes", "geometry"),
    [
        (64, 64, 3, [(4, 4), (8, 8), (16, 16), (33, 17)], {"padding": (1, 1)}),
        (20, 40, 3, [(6, 6), (2, 2), (1, 40)], {"padding": (1, 1)}),
        (96, 96, 3, [(16, 16), (9, 7)], {"padding": (1, 1), "stride": (2, 2)}),
        (70, 33, 3, [(8, 8)], {"padding": (2, 2), "taps_dilation": (2, 2)}),
        (130, 128, 1, [(4, 4), (16, 16), (5, 3)], {}),
        (48, 64, 1, [(8, 8)], {"stride": (2, 2)}),
        (32, 36, 3, [(18, 18)], {"padding": (0, 0)}),
    ],
)
@pytest.mark.parametrize("bits", [4, 8])
def test_convolutions_on_tiles_are_exact(
    emulated: ctypes.CDLL, co: int, ci: int, kernel: int, sizes: list, geometry: dict, bits: int
) -> None:
    torch.manual_seed(co + bits)
    layer = random_layer(co, ci, kernel, bits, **geometry)
    assert layer.input is not None
    for size in sizes:
        x = torch.randn(3, ci, *size) * layer.input.scale[0] * 2**bits / 4
        check(emulated, layer, x, tiles=True)


@pytest.mark.parametrize("rows", [4, 5, 16, 17, 31, 33, 100])
def test_linear_layers_on_tiles_are_exact(emulated: ctypes.CDLL, rows: int) -> None:
    torch.manual_seed(rows)
    for co, ci in ((64, 64), (700, 160), (16, 72), (1, 320)):
        layer = linear_layer(co, ci, 6)
        check(emulated, layer, torch.randn(rows, ci), tiles=True)


@pytest.mark.parametrize("act", [GELU, GEGLU])
def test_codes_of_the_next_layer_on_tiles(emulated: ctypes.CDLL, act: int) -> None:
    width = 704
    first, second = linear_layer(2 * width if act == GEGLU else width, 64, 6), linear_layer(24, width, 4)
    product, following = NativeProduct(first, CurrentStep()), NativeProduct(second, CurrentStep())
    codes = product.quantize(torch.randn(75, 64))
    before = emulated.emulated_multiplications()
    got = product.feed(codes, following, act)
    assert emulated.emulated_multiplications() > before
    assert torch.equal(got.data, Product.feed(product, codes, following, act).data)


def test_gates_on_tiles(emulated: ctypes.CDLL) -> None:
    product = NativeProduct(linear_layer(70, 64, 6), CurrentStep())
    x, residual, gate = torch.randn(2, 19, 64), torch.randn(2, 19, 70), torch.randn(2, 210).chunk(3, dim=1)[1]
    before = emulated.emulated_multiplications()
    got = product.multiply(product.quantize(x), residual=residual, gate=gate)
    assert emulated.emulated_multiplications() > before
    assert torch.allclose(got, residual + gate[:, None] * product(x), atol=1e-5)


def test_what_tiles_do_not_suit_runs_on_vectors(emulated: ctypes.CDLL) -> None:
    check(emulated, linear_layer(32, 64, 4), torch.randn(2, 64), tiles=False)  # rows too few
    check(emulated, random_layer(32, 4, 3, 4, padding=(1, 1)), torch.randn(1, 4, 8, 8), tiles=False)  # channels too few
    check(emulated, linear_layer(32, 4 * 19, 4), torch.randn(16, 4 * 19), tiles=False)  # no depth divides them
    assert NativeProduct(linear_layer(32, 64, 4), CurrentStep())(torch.zeros(0, 64)).shape == (0, 32)


def test_bias_per_sample_residual_and_factor_on_tiles(emulated: ctypes.CDLL) -> None:
    for size, kernel in ((4, 3), (20, 3), (6, 1)):
        layer = random_layer(72, 64, kernel, 4, padding=(kernel // 2,) * 2)
        product = NativeProduct(layer, CurrentStep())
        x, residual, bias = torch.randn(3, 64, size, size), torch.randn(3, 72, size, size), torch.randn(3, 72)
        plain = product(x) - product.bias.view(1, -1, 1, 1)
        got = product.multiply(product.quantize(x), bias=bias, residual=residual, post=0.5)
        assert torch.allclose(got, (plain + bias[:, :, None, None] + residual) * 0.5, atol=1e-5)


@pytest.mark.parametrize(
    "shape", [(64, 64, 40), (70, 77, 64), (16, 77, 160), (5, 76, 72), (33, 256, 8), (256, 257, 48)]
)
def test_attention_on_tiles_is_the_vectors(emulated: ctypes.CDLL, shape: tuple[int, int, int]) -> None:
    (sq, sk, d), n, heads = shape, 2, 3
    torch.manual_seed(sq)
    q, k, v = torch.randn(n, heads, sq, d), torch.randn(n, heads, sk, d), torch.randn(n, heads, sk, d)
    one = torch.ones(heads)
    operands = ((7.0, -31, 31), (9.0, -31, 31), (5.0, -31, 31), (63.0, 0, 63))
    tables = torch.stack([torch.stack([one * m, one * low, one * high]) for m, low, high in operands]).contiguous()
    scores, results = one * d**-0.5 / 63, one / (63 * 5)

    def attend(mask: torch.Tensor | None) -> torch.Tensor:
        out = torch.empty(n, sq, heads * d)
        strides = [(ctypes.c_int64 * 3)(*t.stride()[:3]) for t in (q, k, v)]
        emulated.dq_attention(
            q.data_ptr(), strides[0], k.data_ptr(), strides[1], v.data_ptr(), strides[2], n, heads, sq, sk, d,
            tables.data_ptr(), scores.data_ptr(), results.data_ptr(), None if mask is None else mask.data_ptr(),
            0, 0, sk, out.data_ptr(),
        )  # fmt: skip
        return out

    for mask in (None, torch.randn(sq, sk)):
        emulated.dq_use_amx(1)
        before = emulated.emulated_multiplications()
        got = attend(mask)
        assert emulated.emulated_multiplications() > before
        emulated.dq_use_amx(0)
        assert torch.equal(got, attend(mask))


def test_a_network_on_tiles_computes_what_it_does_on_vectors(emulated: ctypes.CDLL) -> None:
    from diffusers import UNet2DModel

    from dqtool.runtimes.cpu import convert

    torch.manual_seed(0)
    blocks = {"down_block_types": ("AttnDownBlock2D",) * 2, "up_block_types": ("AttnUpBlock2D",) * 2}
    unet = UNet2DModel(in_channels=1, out_channels=1, block_out_channels=(64, 64), attention_head_dim=32, **blocks)
    network = convert(quantized(unet))
    x = torch.randn(2, 1, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = emulated.emulated_multiplications()
        on_tiles = network(x, 1).sample
        assert emulated.emulated_multiplications() > before
        emulated.dq_use_amx(0)
        assert torch.equal(on_tiles, network(x, 1).sample)


def test_tiles_are_left_as_they_were_found(emulated: ctypes.CDLL) -> None:
    """Another library of the process may have configured this thread's tiles, and rely on it."""
    found = (ctypes.c_uint8 * 64)()
    found[0] = 1
    for t in range(3):
        found[16 + 2 * t], found[48 + t] = 64, 7
    left = (ctypes.c_uint8 * 64)()
    emulated.emulated_set(found)
    try:
        check(emulated, random_layer(64, 64, 3, 4, padding=(1, 1)), torch.randn(2, 64, 16, 16), tiles=True)
        emulated.emulated_get(left)
        assert bytes(left) == bytes(found)
    finally:
        emulated.emulated_set((ctypes.c_uint8 * 64)())


def test_dqtool_amx_0_leaves_tiles_alone(emulated: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DQTOOL_AMX", "0")
    for cache in (library._load, library.on_tiles):
        cache.cache_clear()
    assert not library.on_tiles(64)
    check(emulated, random_layer(64, 64, 3, 4, padding=(1, 1)), torch.randn(1, 64, 8, 8), tiles=False)


def test_a_processor_with_amx_gets_its_instructions(tmp_path: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source = tmp_path / "all.cpp"
    source.write_text(source_text())
    flags = [flag for flag in library.FLAGS if flag != "-shared"]
    command = [compiler, *flags, "-O1", "-march=sapphirerapids", "-S", str(source), "-o", str(tmp_path / "all.s")]
    done = subprocess.run(command, capture_output=True, text=True)
    if "sapphirerapids" in done.stderr:
        pytest.skip("the compiler knows no processor with AMX")
    assert done.returncode == 0, done.stderr
    assembly = (tmp_path / "all.s").read_text()
    assert {"ldtilecfg", "sttilecfg", "tileloadd", "tilestored", "tdpbusd"} <= set(assembly.split())
