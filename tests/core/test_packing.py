"""Bit packing: the format, round trips and errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dqtool.core import packing
from dqtool.core.packing import pack, packed_words, unpack
from dqtool.errors import ArtifactError

SIZES = [1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 257]


def reference(row: list[int], bits: int) -> list[int]:
    """Return a row packed by the definition: one big integer with code c at bit c * bits, cut into signed 32-bit words."""
    stream = sum(code << (index * bits) for index, code in enumerate(row))
    words = [(stream >> (32 * w)) & 0xFFFFFFFF for w in range((len(row) * bits + 31) // 32)]
    return [word - (1 << 32) if word >= 1 << 31 else word for word in words]


def random_codes(rows: int, n: int, bits: int) -> Tensor:
    return torch.randint(0, 2**bits, (rows, n), generator=torch.Generator().manual_seed(rows * n + bits))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("n", SIZES)
def test_packing_follows_the_format_and_comes_back(bits: int, n: int) -> None:
    codes = random_codes(3, n, bits)
    packed = pack(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (3, packed_words(n, bits))
    assert packed.is_contiguous()
    assert packed.tolist() == [reference(row, bits) for row in codes.tolist()]
    back = unpack(packed, bits, n)
    assert back.dtype == torch.uint8
    assert torch.equal(back, codes.to(torch.uint8))
    assert torch.equal(pack(back, bits), packed)


@pytest.mark.parametrize("bits", range(1, 9))
def test_extreme_codes(bits: int) -> None:
    top = 2**bits - 1
    codes = torch.tensor([[top] * 37, [0] * 37, [top, 0] * 18 + [top]], dtype=torch.int32)
    assert torch.equal(unpack(pack(codes, bits), bits, 37).int(), codes)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_integer_types_and_layouts_pack_alike(dtype: torch.dtype) -> None:
    codes = random_codes(5, 9, 6)
    assert torch.equal(pack(codes.to(dtype), 6), pack(codes, 6))
    assert torch.equal(pack(codes.t().contiguous().t().to(dtype), 6), pack(codes, 6))


def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = random_codes(17, 50, 5)
    whole = pack(codes, 5)
    monkeypatch.setattr(packing, "CHUNK", 120)
    assert torch.equal(pack(codes, 5), whole)
    assert torch.equal(unpack(whole, 5, 50).long(), codes)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty_tensors(shape: tuple[int, int]) -> None:
    packed = pack(torch.zeros(shape, dtype=torch.uint8), 4)
    assert unpack(packed, 4, shape[1]).shape == shape


def test_six_bits_take_six_bits() -> None:
    assert pack(random_codes(1, 960, 6), 6).numel() * 32 == 960 * 6


@pytest.mark.parametrize(
    ("codes", "bits"),
    [
        (torch.tensor([[16]]), 4),
        (torch.tensor([[-1]]), 4),
        (torch.tensor([[256]]), 8),
        (torch.tensor([[1.0]]), 4),
        (torch.tensor([[True]]), 4),
        (torch.tensor([1, 2]), 4),
        (torch.tensor([[1]]), 0),
        (torch.tensor([[1]]), 9),
    ],
)
def test_codes_that_do_not_fit_are_refused(codes: Tensor, bits: int) -> None:
    with pytest.raises(ValueError, match="codes"):
        pack(codes, bits)


def test_packed_tensors_of_another_size_are_refused() -> None:
    packed = pack(random_codes(2, 20, 4), 4)
    for wrong in (packed[:, :-1], packed.long(), packed[0]):
        with pytest.raises(ArtifactError, match="4-bit"):
            unpack(wrong, 4, 20)
