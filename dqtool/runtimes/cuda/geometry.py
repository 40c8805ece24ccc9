"""Integer arguments of the `cuda` runtime's operations, passed as one list so that a graph holds them as constants."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Geometry", "Padding"]


class Geometry(NamedTuple):
    """A layer's product. `channel_bytes` is the padded number of codes of a pixel in one group."""

    out_channels: int
    in_channels: int
    groups: int
    channel_bytes: int
    is_conv: int
    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    dilation_h: int
    dilation_w: int
    bits: int
    signed: int

    @property
    def row(self) -> int:
        """Return the codes of a pixel."""
        return self.groups * self.channel_bytes

    @property
    def k(self) -> int:
        """Return the codes of a row of the weight."""
        return self.kernel_h * self.kernel_w * self.channel_bytes


class Padding(NamedTuple):
    """Codes of an image: the channels of a group, their padded number, the groups, and the image's size and place in them."""

    width: int
    channel_bytes: int
    groups: int
    height: int
    width_padded: int
    top: int
    left: int
    up: int
