"""Sample grids as PNG: one panel for each network, with the same seed at the same place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dqtool.artifacts.files import target_of, whole_file
from dqtool.artifacts.outputs import GENERATOR

__all__ = ["save_grid", "to_uint8"]


BETWEEN = 90
"""Grey value of the line between two images."""


def to_uint8(images: Tensor) -> Tensor:
    """Convert images `[N, C, H, W]` in [-1, 1] to uint8 `[N, H, W, C]`."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


def save_grid(panels: Sequence[tuple[str, Tensor]], path: str, rows: int = 8, columns: int = 8) -> None:
    """Write one PNG with a captioned panel of `rows` x `columns` images for each (caption, images `[N, C, H, W]`, -1 to 1).

    Small images are enlarged without smoothing. Raises `EnvironmentFault` when the file can't be written.
    """
    from PIL import Image, ImageDraw, ImageFont
    from PIL.PngImagePlugin import PngInfo

    sides = []
    for caption, images in panels:
        pixels = to_uint8(images[: rows * columns])
        n, height, width, channels = pixels.shape
        down = -(-n // columns)
        canvas = torch.full((down * (height + 1), columns * (width + 1), channels), BETWEEN, dtype=torch.uint8)
        for i in range(n):
            top, left = i // columns * (height + 1), i % columns * (width + 1)
            canvas[top : top + height, left : left + width] = pixels[i]
        picture = Image.fromarray(canvas.squeeze(-1).numpy() if channels == 1 else canvas.numpy()).convert("RGB")
        zoom = max(1, 384 // picture.width)
        picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
        side = Image.new("RGB", (picture.width, picture.height + 20), "white")
        side.paste(picture, (0, 20))
        ImageDraw.Draw(side).text((2, 2), caption, fill="black", font=ImageFont.load_default(14))
        sides.append(side)
    gap = 12
    width = sum(s.width for s in sides) + gap * (len(sides) - 1)
    whole = Image.new("RGB", (width, max(s.height for s in sides)), "white")
    left = 0
    for side in sides:
        whole.paste(side, (left, 0))
        left += side.width + gap
    with whole_file(target_of(path)) as new:
        note = PngInfo()
        note.add_text("Software", GENERATOR)
        whole.save(new, format="PNG", pnginfo=note)
