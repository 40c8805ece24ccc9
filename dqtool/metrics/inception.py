"""Inception network of FID: TensorFlow's graph of 2015 in PyTorch, with the three outputs that metrics read.

It differs from torchvision's Inception v3 in its weights, its 1008 classes, average pools that ignore padding, and a
max pool in the last block. Modules have the names that pytorch-fid and torch-fidelity use.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqtool.metrics.resize import bilinear_tensorflow

__all__ = ["CLASSES", "POOL", "SPATIAL", "SPATIAL_CHANNELS", "InceptionV3", "tensorflow_scopes"]

POOL = 2048
"""Features of `pool_3`, which FID uses."""
SPATIAL_CHANNELS = 7
SPATIAL = SPATIAL_CHANNELS * 17 * 17
"""Features of `mixed_6/conv` that sFID uses: the first 7 of 192 channels, 2023 values."""
CLASSES = 1008
"""Classes of the network's head."""
SIDE = 299
"""Width and height of the network's input."""


@dataclass(frozen=True)
class Conv:
    """Convolution without bias, followed by batch norm and ReLU. With stride 1 inside a mixed block it keeps the size."""

    name: str
    out_channels: int
    kernel: tuple[int, int]
    stride: int = 1


Step: TypeAlias = "Conv | str | tuple[Conv, Conv]"
Branch = list[Step]
"""Sequence of steps: convolutions, pools ("avg" and "max" with stride 1, "reduce" is a max pool with stride 2) and
pairs of parallel convolutions."""


def _conv(name: str, out_channels: int, kernel: int | tuple[int, int] = 1, stride: int = 1) -> Conv:
    return Conv(name, out_channels, (kernel, kernel) if isinstance(kernel, int) else kernel, stride)


def _dbl() -> list[Step]:
    return [_conv("branch3x3dbl_1", 64), _conv("branch3x3dbl_2", 96, 3)]


def _block_a(pool: int) -> list[Branch]:
    return [
        [_conv("branch1x1", 64)],
        [_conv("branch5x5_1", 48), _conv("branch5x5_2", 64, 5)],
        [*_dbl(), _conv("branch3x3dbl_3", 96, 3)],
        ["avg", _conv("branch_pool", pool)],
    ]


def _block_b() -> list[Branch]:
    return [[_conv("branch3x3", 384, 3, 2)], [*_dbl(), _conv("branch3x3dbl_3", 96, 3, 2)], ["reduce"]]


def _block_c(middle: int) -> list[Branch]:
    row, column = (1, 7), (7, 1)
    return [
        [_conv("branch1x1", 192)],
        [_conv("branch7x7_1", middle), _conv("branch7x7_2", middle, row), _conv("branch7x7_3", 192, column)],
        [
            _conv("branch7x7dbl_1", middle),
            _conv("branch7x7dbl_2", middle, column),
            _conv("branch7x7dbl_3", middle, row),
            _conv("branch7x7dbl_4", middle, column),
            _conv("branch7x7dbl_5", 192, row),
        ],
        ["avg", _conv("branch_pool", 192)],
    ]


def _block_d() -> list[Branch]:
    return [
        [_conv("branch3x3_1", 192), _conv("branch3x3_2", 320, 3, 2)],
        [
            _conv("branch7x7x3_1", 192),
            _conv("branch7x7x3_2", 192, (1, 7)),
            _conv("branch7x7x3_3", 192, (7, 1)),
            _conv("branch7x7x3_4", 192, 3, 2),
        ],
        ["reduce"],
    ]


def _block_e(pool: str) -> list[Branch]:
    def pair(name: str) -> tuple[Conv, Conv]:
        return _conv(f"{name}a", 384, (1, 3)), _conv(f"{name}b", 384, (3, 1))

    return [
        [_conv("branch1x1", 320)],
        [_conv("branch3x3_1", 384), pair("branch3x3_2")],
        [_conv("branch3x3dbl_1", 448), _conv("branch3x3dbl_2", 384, 3), pair("branch3x3dbl_3")],
        [pool, _conv("branch_pool", 192)],
    ]


STEM = (
    _conv("Conv2d_1a_3x3", 32, 3, 2),
    _conv("Conv2d_2a_3x3", 32, 3),
    _conv("Conv2d_2b_3x3", 64, 3),
    _conv("Conv2d_3b_1x1", 80),
    _conv("Conv2d_4a_3x3", 192, 3),
)
BLOCKS = {
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": _block_b(),
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": _block_d(),
    "Mixed_7b": _block_e("avg"),
    "Mixed_7c": _block_e("max"),
}
SPATIAL_BLOCK = "Mixed_6d"  # the graph's `mixed_6`, whose `conv` is branch1x1


class ConvUnit(nn.Module):
    """Convolution, batch norm with the graph's epsilon, and ReLU."""

    def __init__(self, in_channels: int, spec: Conv, padding: tuple[int, int]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, spec.out_channels, spec.kernel, spec.stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(spec.out_channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class MixedBlock(nn.Module):
    """Branches over the same input, concatenated along the channels."""

    def __init__(self, in_channels: int, branches: list[Branch]) -> None:
        super().__init__()
        self.branches = branches
        self.out_channels = 0
        for branch in branches:
            width = in_channels
            for step in branch:
                convs = step if isinstance(step, tuple) else (step,) if isinstance(step, Conv) else ()
                for spec in convs:
                    padding = (0, 0) if spec.stride == 2 else (spec.kernel[0] // 2, spec.kernel[1] // 2)
                    setattr(self, spec.name, ConvUnit(width, spec, padding))
                width = sum(spec.out_channels for spec in convs) or width
            self.out_channels += width

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for branch in self.branches:
            y = x
            for step in branch:
                y = self._step(step, y)
            outputs.append(y)
        return torch.cat(outputs, dim=1)

    def _step(self, step: Step, x: Tensor) -> Tensor:
        if isinstance(step, tuple):
            return torch.cat([self.get_submodule(spec.name)(x) for spec in step], dim=1)
        if isinstance(step, Conv):
            result: Tensor = self.get_submodule(step.name)(x)
            return result
        if step == "avg":
            return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        if step == "max":
            return F.max_pool2d(x, 3, stride=1, padding=1)
        return F.max_pool2d(x, 3, stride=2)


class InceptionV3(nn.Module):
    """Inception network with random weights; `inception_weights` loads weights from files."""

    def __init__(self) -> None:
        super().__init__()
        width = 3
        for spec in STEM:
            padding = (1, 1) if spec.name == "Conv2d_2b_3x3" else (0, 0)
            setattr(self, spec.name, ConvUnit(width, spec, padding))
            width = spec.out_channels
        for name, branches in BLOCKS.items():
            block = MixedBlock(width, branches)
            setattr(self, name, block)
            width = block.out_channels
        self.fc = nn.Linear(POOL, CLASSES)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the outputs for `images` `[N, 3, H, W]` with values 0..255, which are resized to 299 x 299.

        `pool_3` is `[N, 2048]`. `mixed_6` `[N, 2023]` holds the first 7 channels of `mixed_6/conv` after its ReLU, in
        NHWC order. `logits` `[N, 1008]` leave out the bias, as in the ADM suite's Inception score.
        """
        x = (bilinear_tensorflow(images.to(self.fc.weight.dtype), SIDE, SIDE) - 128) / 128
        for number, spec in enumerate(STEM):
            x = self.get_submodule(spec.name)(x)
            if number in (2, 4):
                x = F.max_pool2d(x, 3, stride=2)
        spatial = x
        for name in BLOCKS:
            block = self.get_submodule(name)
            if name == SPATIAL_BLOCK:
                spatial = block.get_submodule("branch1x1")(x)[:, :SPATIAL_CHANNELS]
            x = block(x)  # [N, 768, 17, 17] in Mixed_6*, [N, 2048, 8, 8] at the end
        pool = x.mean(dim=(2, 3))
        return {
            "pool_3": pool,
            "mixed_6": spatial.permute(0, 2, 3, 1).flatten(1),
            "logits": F.linear(pool, self.fc.weight),
        }


def tensorflow_scopes() -> Iterator[tuple[str, str]]:
    """Return (scope in TensorFlow's graph, module here) of every convolution, such as `mixed_6/conv`, `Mixed_6d.branch1x1`.

    In the graph a branch of one plain convolution is `conv`; the others are `tower`, `tower_1`, ... in order, their
    convolutions `conv`, `conv_1`, ..., and parallel ones `mixed/conv`, `mixed/conv_1`.
    """
    for number, spec in enumerate(STEM):
        yield _numbered("conv", number), spec.name
    for number, (name, branches) in enumerate(BLOCKS.items()):
        towers = 0
        for branch in branches:
            if len(branch) == 1 and isinstance(branch[0], Conv):
                yield f"{_numbered('mixed', number)}/conv", f"{name}.{branch[0].name}"
                continue
            scope = f"{_numbered('mixed', number)}/{_numbered('tower', towers)}"
            towers += 1
            convs = [step for step in branch if isinstance(step, Conv)]
            pairs = [spec for step in branch if isinstance(step, tuple) for spec in step]
            for index, spec in enumerate(convs):
                yield f"{scope}/{_numbered('conv', index)}", f"{name}.{spec.name}"
            for index, spec in enumerate(pairs):
                yield f"{scope}/mixed/{_numbered('conv', index)}", f"{name}.{spec.name}"


def _numbered(name: str, number: int) -> str:
    return f"{name}_{number}" if number else name
