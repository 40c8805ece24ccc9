"""Sizes of video and of huge images in the cuda runtime's kernels: offsets beyond 2^31 and more heads than a grid's second axis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from triton_layers import packed_layer_of, stepped

from dqtool.runtimes.cuda import launch

FAR = 1 << 30


def sparse(path: Path, size: int) -> torch.Tensor:
    """Return float16 zeros in a file that takes no room until it is written to."""
    with path.open("wb") as file:
        file.truncate(2 * size)
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.float16)


@pytest.mark.parametrize("strides", [(0, FAR, 3, 1), (0, 1, 3, FAR)])
@pytest.mark.parametrize("normed", [False, True])
def test_offsets_beyond_two_to_the_31(tmp_path: Path, strides: tuple[int, ...], normed: bool) -> None:
    torch.manual_seed(0)
    shape = (1, 4, 1, 4)
    values = torch.randn(shape).half()
    x = sparse(tmp_path / "zeros", 3 * FAR + 16).as_strided(shape, strides)
    x.copy_(values)
    product = stepped(packed_layer_of(8, 4, 4), 1)
    norm = torch.nn.GroupNorm(2, 4)
    if normed:
        assert torch.equal(product.group_norm(x, norm).data, product.group_norm(values, norm).data)
    else:
        padding = product._flat(4)
        padding[4] = 4
        got, expected = (
            launch.quantize_image(t, *product._quantizer(), launch.Padding(*padding), 0) for t in (x, values)
        )
        assert torch.equal(got, expected)


def test_grids_have_one_axis_for_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporal attention has samples times pixels times heads: a grid's second axis ends at 65535."""
    grids: list[Any] = []

    class Recorder:
        def __getitem__(self, grid: Any) -> Any:
            grids.append(grid)
            return lambda *_, **__: None

    monkeypatch.setattr(launch, "operand_kernel", Recorder())
    monkeypatch.setattr(launch, "attention_kernel", Recorder())
    q = torch.empty(1, 8, 16, 32).expand(9000, 8, 16, 32)
    tables, each = torch.ones(1, 4, 3, 8), torch.ones(1, 8)
    launch.attend((q, q, q), None, tables, each, each, torch.zeros(1, dtype=torch.long), 0.1, 15)
    assert len(grids) == 4 and all(len(grid) == 1 and grid[0] >= 9000 * 8 for grid in grids)


def test_a_group_of_more_than_two_to_the_31_values() -> None:
    """The count of its values, by which the squares are divided, is no int32. One block of 16 pixels is computed."""
    from dqtool.runtimes.cuda.kernels.prologue import quantize_kernel

    side, group = 40_000, 2
    x = torch.tensor([-3.0, 2.0]).view(1, group, 1, 1).expand(1, group, side, side)
    steps = torch.tensor([[-8.0, 7.0, 0.0, 1.0]])
    statistics = torch.tensor([0.0, 4.0 * group * side * side]).view(1, 1, 1, 2)  # a deviation of 2
    out, none = torch.empty((1, 1, 16, 64), dtype=torch.int8), steps
    quantize_kernel[(1, 1)](
        x, out, steps, torch.zeros(1, dtype=torch.long), none, statistics, none, none, none, none,
        side, side, 0, 0, 0, 1, group, group, 64, 64, 1, 16, 0, 0, 1, 1, 1, side * side, 1, group, 0.0,
        ACT=0, GEGLU=False, STATIC=True, DIVIDED=False, NORM=True, AFFINE=False, EXTRA=False, S=1, BP=16, BC=64,
    )  # fmt: skip
    assert out[0, 0, 3, :2].tolist() == [-2, 1]  # -1.5 and 1.0
