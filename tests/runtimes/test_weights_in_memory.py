"""Weights of up to 4 bits that share bytes of memory on AVX2: the same integers, in half of the memory."""

from __future__ import annotations

import pytest
import torch
from test_cpu import linear_layer, random_layer
from torch import Tensor, nn

from dqtool.errors import UsageError
from dqtool.nn.integer import IntegerLayer, accumulate
from dqtool.runtimes.cpu import library, memory
from dqtool.runtimes.cpu.codes import GEGLU, CurrentStep
from dqtool.runtimes.cpu.layout import expanded
from dqtool.runtimes.cpu.native_product import NativeProduct
from dqtool.runtimes.cpu.product import Product


@pytest.fixture(autouse=True)
def _on_avx2() -> None:
    if not library.has_products() or library.has_vnni():
        pytest.skip("codes share bytes on AVX2 alone")


def narrow(layer: IntegerLayer) -> IntegerLayer:
    """Return the layer with random codes of 4 bits, whose zero points differ from row to row."""
    rows = (len(layer.weight), *(1,) * (layer.weight.dim() - 1))
    layer.weight.copy_(torch.randint(0, 16, layer.weight.shape) - torch.randint(4, 12, rows))
    return layer


def compact(layer: IntegerLayer, asked: bool = True) -> NativeProduct:
    product = NativeProduct(layer, CurrentStep())
    product.compact = asked
    return product


LAYERS = [(64, 32, 3, (6, 6)), (20, 18, 3, (5, 7)), (17, 333, 3, (3, 3)), (128, 256, 3, (16, 16)), (64, 40, 1, (7, 9))]


@pytest.mark.parametrize("bits", [4, 5, 8])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_are_exact(bits: int, stride: int) -> None:
    torch.manual_seed(bits)
    for co, ci, kernel, size in LAYERS:
        layer = narrow(random_layer(co, ci, kernel, bits, padding=(kernel // 2,) * 2, stride=(stride, stride)))
        assert layer.input is not None
        x = torch.randn(2, ci, *size) * 0.1 * 2**bits / 4
        product = compact(layer)
        expected = accumulate(layer.input.codes(x, 0, channel_dim=1), layer)
        assert torch.equal(product.accumulators(product.quantize(x)).to(torch.int64), expected), (co, ci)
        product(x)
        assert (
            product.packed is not None
            and product.packed.numel() * 2 == -(-co // 16) * 16 * product.channel_bytes * kernel**2
        )


@pytest.mark.parametrize("bits", [4, 8])
def test_linear_layers_are_exact(bits: int) -> None:
    for rows, co, ci in ((1, 8, 320), (7, 200, 76), (100, 64, 640)):
        layer = narrow(linear_layer(co, ci, bits))
        assert layer.input is not None
        x = torch.randn(rows, ci) * 0.1 * 2**bits / 4
        product = compact(layer)
        expected = accumulate(layer.input.codes(x, 0), layer)
        assert torch.equal(product.accumulators(product.quantize(x)).to(torch.int64), expected)


def test_values_and_gates_feed_the_next_layer() -> None:
    first, second = narrow(linear_layer(1408, 64, 4)), linear_layer(24, 704, 4)
    product, following = compact(first), NativeProduct(second, CurrentStep())
    codes = product.quantize(torch.randn(75, 64))
    assert torch.equal(product.feed(codes, following, GEGLU).data, Product.feed(product, codes, following, GEGLU).data)
    assert product.lowest is not None


def test_codes_that_lie_too_far_apart_keep_their_bytes() -> None:
    layer = random_layer(32, 32, 3, 4, padding=(1, 1))
    layer.weight[5, 0, 0, 0], layer.weight[5, 1, 0, 0] = 9, -8
    product = compact(layer)
    product(torch.randn(1, 32, 6, 6))
    assert product.lowest is None and product.winograd


def test_expanded_weights_are_those_of_a_convolution_that_was_never_packed() -> None:
    def held(product: NativeProduct, x: Tensor) -> tuple[Tensor, Tensor]:
        product.may_winograd = product.winograd = False
        product(x)
        assert product.packed is not None and product.sums is not None
        return product.packed, product.sums

    layer, x = narrow(random_layer(40, 18, 3, 4, padding=(1, 1))), torch.randn(1, 18, 4, 4)
    product = compact(layer)
    product(x)
    assert product.winograd and product.packed is not None and product.sums is not None and product.lowest is not None
    found = expanded(product.packed, product.sums, product.lowest)
    for a, b in zip(found, held(compact(layer, asked=False), x), strict=True):
        assert torch.equal(a, b)


def test_size_or_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    product = NativeProduct(linear_layer(32, 64, 4), CurrentStep())
    product.narrow = True
    network = nn.Sequential(product)
    for value, large, wanted in (
        ("packed", 1 << 40, True),
        ("unpacked", 0, False),
        ("auto", 0, True),
        ("auto", 2048, False),
    ):
        monkeypatch.setenv(memory.IN_MEMORY, value)
        monkeypatch.setattr(memory, "LARGE", large)
        memory.choose_memory(network)
        assert product.compact == wanted, (value, large)
    monkeypatch.setenv(memory.IN_MEMORY, "half")
    with pytest.raises(UsageError, match="half"):
        memory.choose_memory(network)
