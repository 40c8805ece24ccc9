"""Options of `dqtool stats`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from dqtool.stages.options.declared import INPUT, Option
from dqtool.stages.options.shared import IMAGE_SIZE, INCEPTION_WEIGHTS

__all__ = ["StatsOptions"]


@dataclass(frozen=True)
class StatsOptions:
    """Options of `dqtool stats`. `directory` may also be an npz file of images."""

    directory: Annotated[
        str, Option("Images to read: a directory, or an npz file with arr_0.", "DIR_OR_NPZ", positional=True)
    ]
    output: Annotated[str, Option("File to write.", "FILE.npz", short="-o", panel=INPUT)] = "stats.npz"
    inception_weights: Annotated[str | None, INCEPTION_WEIGHTS] = None
    image_size: Annotated[int | None, IMAGE_SIZE] = None
    keep_images: Annotated[
        int,
        Option(
            "Images that the file keeps. The metric pr (precision and recall) needs them; 0 makes a small file.",
            "N",
            least=0,
        ),
    ] = 10000
