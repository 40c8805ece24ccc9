"""Cost model: exact file sizes and bit operations, without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from dqtool.artifacts.header import DTYPES, TORCH_DTYPES
from dqtool.artifacts.records import LayerRecord
from dqtool.core.cost import bops, bops_ratio, file_bytes, float_bops, replayed_together, samples_together, size_ratio


def described(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}


@pytest.mark.parametrize("extra", range(12))
def test_file_size_is_exact_for_mixed_tensors(extra: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(extra)

    def size(top: int) -> int:
        return int(torch.randint(1, top, (), generator=generator))

    tensors = {
        "x" * extra + ".weight_packed": torch.zeros(size(300), size(40), dtype=torch.int32),
        "b.weight_scale": torch.zeros(size(300), 1),
        "b.weight_shape": torch.tensor([3, 4]),
        "timesteps": torch.zeros(size(99), dtype=torch.int64),
        "scalar": torch.zeros((), dtype=torch.float64),
        "empty": torch.zeros(0, 7),
        "half": torch.zeros(size(50), dtype=torch.float16),
        "flags": torch.zeros(size(50), dtype=torch.bool),
        'quote"back\\slash é': torch.zeros(size(50), dtype=torch.uint8),
    }
    save_file(tensors, tmp_path / "file.safetensors", metadata={"format": "pt"})
    assert file_bytes(described(tensors)) == (tmp_path / "file.safetensors").stat().st_size


def test_file_size_without_and_with_other_metadata() -> None:
    tensors = {f"layer.{i}.weight": torch.zeros(i, 3) for i in range(40)}
    assert file_bytes(described(tensors), {}) == len(save(tensors))
    other = {"dqtool": "a longer text"}
    assert file_bytes(described(tensors), other) == len(save(tensors, metadata=other))
    assert file_bytes({}) == len(save({}, metadata={"format": "pt"}))


def test_the_order_of_types_is_that_of_safetensors() -> None:
    # The order of types decides the offsets in the header, and thereby its length at sizes around powers of ten.
    assert set(TORCH_DTYPES.values()) == set(DTYPES)
    for first in TORCH_DTYPES:
        for second in TORCH_DTYPES:
            one, two = getattr(torch, first), getattr(torch, second)
            tensors = {"a": torch.zeros(1, dtype=one), "b": torch.zeros(100_000, dtype=two)}
            assert file_bytes(described(tensors)) == len(save(tensors, metadata={"format": "pt"})), (first, second)


def test_unknown_types_are_refused() -> None:
    with pytest.raises(ValueError, match="complex64"):
        file_bytes({"a": ("torch.complex64", (1,))})


def layer(macs: int, bits: tuple[int, int] | None = None) -> LayerRecord:
    return LayerRecord("layer", "linear", (1, 1), macs, bits=bits)


def test_bops_and_ratios() -> None:
    layers = [
        layer(10, (4, 4)),
        layer(5, (8, 8)),
        layer(2, (4, 16)),
        layer(1, (16, 16)),
        layer(1),
        LayerRecord("attention", "attention", (1, 1), 20, bits=(8, 4)),
    ]
    expected = 160 + 320 + 256 + 1024 + 1024 + (10 * 4 * 4 + 10 * 8 * 4)
    assert bops(layers) == expected
    assert float_bops(layers) == 39 * 1024
    assert bops_ratio(layers) == 39 * 1024 / expected
    assert bops_ratio([layer(7, (6, 6))]) == pytest.approx(28.44, abs=0.01)
    assert bops_ratio([]) == 1
    assert size_ratio(800, 100) == 8


def test_the_cost_model_does_not_need_torch() -> None:
    code = "import sys, dqtool.core.cost; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_large_networks_run_few_samples_together() -> None:
    small, large = ([LayerRecord("a", "linear", (4, 4), macs)] for macs in (10**6, 340 * 10**9))
    assert samples_together(small, 64) == 64
    assert samples_together(large, 64) == 1
    assert samples_together(large, 64, "cuda") == 11
    assert samples_together([], 64) == 64
    assert replayed_together(2 * 10**9, 256, "cpu") == 256
    assert replayed_together(8_850_000_000, 256, "cpu") == 57  # 128x128 pixels, where 256 samples took 19 GB
    assert replayed_together(8_850_000_000, 256, "cuda") == 256
    assert replayed_together(400 * 10**9, 256, "cpu") == 1
