"""The 2015 Inception graph a second time, in TensorFlow's terms (scopes, NHWC, SAME and VALID), and files of its weights.

The weights are drawn while the graph runs for the first time, so that no shape is taken from dqtool.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Constants = dict[str, np.ndarray]


class Graph:
    """`run(images)` gives the pool, the first 7 channels of mixed_6/conv, and the softmax input; float64."""

    def __init__(self, seed: int = 0, unit_gamma: bool = False) -> None:
        self.random = np.random.default_rng(seed)
        self.unit_gamma = unit_gamma
        self.constants: Constants = {}

    def constant(self, name: str, make) -> Tensor:
        if name not in self.constants:
            self.constants[name] = np.asarray(make(), dtype=np.float32)
        return torch.from_numpy(self.constants[name]).double()

    def conv(self, x: Tensor, scope: str, out: int, kh: int, kw: int, stride: int = 1, padding: str = "SAME") -> Tensor:
        draw, n = self.random, x.shape[1]
        weights = self.constant(
            f"{scope}/conv2d_params", lambda: draw.normal(size=(kh, kw, n, out)) * (2 / (kh * kw * n)) ** 0.5
        )
        x = self.window(x, kh, kw, padding)
        x = F.conv2d(x, weights.permute(3, 2, 0, 1), stride=stride)
        norm = f"{scope}/batchnorm"
        beta = self.constant(f"{norm}/beta", lambda: draw.normal(size=out) * 0.1)
        gamma = self.constant(f"{norm}/gamma", lambda: np.ones(out) if self.unit_gamma else draw.uniform(0.8, 1.2, out))
        mean = self.constant(f"{norm}/moving_mean", lambda: draw.normal(size=out) * 0.1)
        variance = self.constant(f"{norm}/moving_variance", lambda: draw.uniform(0.5, 1.5, out))
        shape = (1, -1, 1, 1)
        x = (x - mean.view(shape)) / (variance.view(shape) + 0.001).sqrt() * gamma.view(shape) + beta.view(shape)
        return x.clamp(min=0)

    @staticmethod
    def window(x: Tensor, kh: int, kw: int, padding: str, value: float = 0.0) -> Tensor:
        if padding == "VALID":
            return x
        return F.pad(x, (kw // 2, kw // 2, kh // 2, kh // 2), value=value)  # stride 1, odd kernels

    def average(self, x: Tensor) -> Tensor:
        ones = torch.ones_like(x[:1, :1])
        kernel = torch.ones(1, 1, 3, 3, dtype=x.dtype)
        count = F.conv2d(F.pad(ones, (1, 1, 1, 1)), kernel)
        total = F.conv2d(F.pad(x, (1, 1, 1, 1)).flatten(0, 1)[:, None], kernel).view(x.shape)
        return total / count

    def maximum(self, x: Tensor, stride: int, padding: str) -> Tensor:
        x = self.window(x, 3, 3, padding, value=float("-inf"))
        return x.unfold(2, 3, stride).unfold(3, 3, stride).amax(dim=(-2, -1))

    def run(self, images: Tensor) -> dict[str, Tensor]:
        """`images` uint8 `[N, H, W, 3]`."""
        x = (self.resize(images.numpy().astype(np.float32)) - 128) * 0.0078125
        x = x.double().permute(0, 3, 1, 2)
        x = self.conv(x, "conv", 32, 3, 3, 2, "VALID")
        x = self.conv(x, "conv_1", 32, 3, 3, 1, "VALID")
        x = self.conv(x, "conv_2", 64, 3, 3)
        x = self.maximum(x, 2, "VALID")
        x = self.conv(x, "conv_3", 80, 1, 1, 1, "VALID")
        x = self.conv(x, "conv_4", 192, 3, 3, 1, "VALID")
        x = self.maximum(x, 2, "VALID")
        for name, pool in (("mixed", 32), ("mixed_1", 64), ("mixed_2", 64)):
            five = self.conv(self.conv(x, f"{name}/tower/conv", 48, 1, 1), f"{name}/tower/conv_1", 64, 5, 5)
            three = self.conv(x, f"{name}/tower_1/conv", 64, 1, 1)
            three = self.conv(self.conv(three, f"{name}/tower_1/conv_1", 96, 3, 3), f"{name}/tower_1/conv_2", 96, 3, 3)
            pooled = self.conv(self.average(x), f"{name}/tower_2/conv", pool, 1, 1)
            x = torch.cat([self.conv(x, f"{name}/conv", 64, 1, 1), five, three, pooled], 1)
        three = self.conv(self.conv(x, "mixed_3/tower/conv", 64, 1, 1), "mixed_3/tower/conv_1", 96, 3, 3)
        three = self.conv(three, "mixed_3/tower/conv_2", 96, 3, 3, 2, "VALID")
        x = torch.cat([self.conv(x, "mixed_3/conv", 384, 3, 3, 2, "VALID"), three, self.maximum(x, 2, "VALID")], 1)
        spatial = x
        for name, width in (("mixed_4", 128), ("mixed_5", 160), ("mixed_6", 160), ("mixed_7", 192)):
            one = self.conv(x, f"{name}/conv", 192, 1, 1)
            if name == "mixed_6":
                spatial = one.permute(0, 2, 3, 1)[..., :7]
            seven = self.conv(self.conv(x, f"{name}/tower/conv", width, 1, 1), f"{name}/tower/conv_1", width, 1, 7)
            seven = self.conv(seven, f"{name}/tower/conv_2", 192, 7, 1)
            double = self.conv(self.conv(x, f"{name}/tower_1/conv", width, 1, 1), f"{name}/tower_1/conv_1", width, 7, 1)
            double = self.conv(
                self.conv(double, f"{name}/tower_1/conv_2", width, 1, 7), f"{name}/tower_1/conv_3", width, 7, 1
            )
            double = self.conv(double, f"{name}/tower_1/conv_4", 192, 1, 7)
            x = torch.cat([one, seven, double, self.conv(self.average(x), f"{name}/tower_2/conv", 192, 1, 1)], 1)
        three = self.conv(self.conv(x, "mixed_8/tower/conv", 192, 1, 1), "mixed_8/tower/conv_1", 320, 3, 3, 2, "VALID")
        seven = self.conv(self.conv(x, "mixed_8/tower_1/conv", 192, 1, 1), "mixed_8/tower_1/conv_1", 192, 1, 7)
        seven = self.conv(seven, "mixed_8/tower_1/conv_2", 192, 7, 1)
        seven = self.conv(seven, "mixed_8/tower_1/conv_3", 192, 3, 3, 2, "VALID")
        x = torch.cat([three, seven, self.maximum(x, 2, "VALID")], 1)
        for name in ("mixed_9", "mixed_10"):
            a = self.conv(x, f"{name}/tower/conv", 384, 1, 1)
            b = self.conv(self.conv(x, f"{name}/tower_1/conv", 448, 1, 1), f"{name}/tower_1/conv_1", 384, 3, 3)
            pooled = self.average(x) if name == "mixed_9" else self.maximum(x, 1, "SAME")
            x = torch.cat(
                [
                    self.conv(x, f"{name}/conv", 320, 1, 1),
                    self.conv(a, f"{name}/tower/mixed/conv", 384, 1, 3),
                    self.conv(a, f"{name}/tower/mixed/conv_1", 384, 3, 1),
                    self.conv(b, f"{name}/tower_1/mixed/conv", 384, 1, 3),
                    self.conv(b, f"{name}/tower_1/mixed/conv_1", 384, 3, 1),
                    self.conv(pooled, f"{name}/tower_2/conv", 192, 1, 1),
                ],
                1,
            )
        pool = x.mean(dim=(2, 3))
        weights = self.constant("softmax/weights", lambda: self.random.normal(size=(2048, 1008)) * 0.02)
        self.constant("softmax/biases", lambda: self.random.normal(size=1008))
        return {"pool_3": pool, "mixed_6": spatial.reshape(len(x), -1), "logits": pool @ weights}

    @staticmethod
    def resize(images: np.ndarray) -> Tensor:
        """TensorFlow 1's `resize_bilinear` to 299 x 299, pixel by pixel as its kernel is written."""
        height, width = images.shape[1:3]
        out = np.zeros((len(images), 299, 299, 3), dtype=np.float32)
        scale_y, scale_x = np.float32(height / 299), np.float32(width / 299)
        for row in range(299):
            y = np.float32(row) * scale_y
            top = int(y)
            bottom, dy = min(top + 1, height - 1), np.float32(y - np.float32(top))
            for column in range(299):
                x = np.float32(column) * scale_x
                left = int(x)
                right, dx = min(left + 1, width - 1), np.float32(x - np.float32(left))
                upper = images[:, top, left] + (images[:, top, right] - images[:, top, left]) * dx
                lower = images[:, bottom, left] + (images[:, bottom, right] - images[:, bottom, left]) * dx
                out[:, row, column] = upper + (lower - upper) * dy
        return torch.from_numpy(out)


def write_graphdef(constants: Constants, path: Path) -> Path:
    """A frozen graph: one Const node for each array, between nodes of other kinds."""

    def varint(value: int) -> bytes:
        out = b""
        while value > 127:
            out, value = out + bytes([value & 127 | 128]), value >> 7
        return out + bytes([value])

    def field(number: int, content: bytes) -> bytes:
        return varint(number << 3 | 2) + varint(len(content)) + content

    def node(name: str, op: str, tensor: bytes | None) -> bytes:
        kind = varint(6 << 3) + varint(1)  # AttrValue.type = DT_FLOAT
        attributes = field(5, field(1, b"dtype") + field(2, kind))
        if tensor is not None:
            attributes += field(5, field(1, b"value") + field(2, field(8, tensor)))
        return field(1, field(1, name.encode()) + field(2, op.encode()) + field(3, b"input:0") + attributes)

    with path.open("wb") as stream:
        stream.write(node("ExpandDims", "ExpandDims", None))
        integers = varint(1 << 3) + varint(3) + field(4, struct.pack("<i", 7))
        stream.write(node("conv/shape", "Const", integers))
        for name, array in constants.items():
            shape = b"".join(field(2, varint(1 << 3) + varint(size)) for size in array.shape)
            stream.write(
                node(
                    name,
                    "Const",
                    varint(1 << 3) + varint(1) + field(2, shape) + field(4, array.astype("<f4").tobytes()),
                )
            )
            stream.write(node(name.replace("/", "_"), "Identity", None))
    return path


def write_torchscript(constants: Constants, path: Path) -> Path:
    """An archive with the names of NVIDIA's: `layers.mixed.tower.conv.weight`, in mixed_9 and 10 `tower_mixed_conv`."""

    class Scope(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    root = Scope()
    root.layers = Scope()
    leaves = {"batchnorm/beta": "beta", "batchnorm/moving_mean": "mean", "batchnorm/moving_variance": "var"}
    for name, array in constants.items():
        scope, _, leaf = name.partition("/conv2d_params") if "conv2d_params" in name else name.partition("/batchnorm")
        if "softmax" in name:
            continue
        leaf = "weight" if "conv2d_params" in name else leaves.get(f"batchnorm{leaf}", "")
        if not leaf:
            continue  # gamma
        parts = scope.split("/")
        if parts[0] in ("mixed_9", "mixed_10"):
            parts = [parts[0], "_".join(parts[1:])]
        module: nn.Module = root.layers
        for part in parts:
            if not hasattr(module, part):
                module.add_module(part, Scope())
            module = getattr(module, part)
        value = torch.from_numpy(array)
        module.register_buffer(leaf, value.permute(3, 2, 0, 1).contiguous() if leaf == "weight" else value)
    root.output = nn.Linear(2048, 1008)
    root.output.weight.data = torch.from_numpy(constants["softmax/weights"]).T.contiguous()
    root.output.bias.data = torch.from_numpy(constants["softmax/biases"])
    torch.jit.script(root).save(str(path))
    return path
