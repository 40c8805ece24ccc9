"""`dqtool stats`: reference statistics of images."""

from __future__ import annotations

from typing import Annotated

import typer

from dqtool.cli.app import command
from dqtool.cli.options import ImageSize, InceptionWeights
from dqtool.cli.output import run_stage
from dqtool.stages.common import Common


@command(
    "dqtool stats val2014 --image-size 300 --inception-weights pt_inception-2015-12-05.pth -o coco.npz",
    "dqtool stats imagenet/train --image-size 256 --inception-weights classify_image_graph_def.pb -o imagenet.npz",
)
def stats(
    directory: Annotated[
        str, typer.Argument(metavar="DIR_OR_NPZ", help="Images: a directory, or an npz file with arr_0.")
    ],
    common: Common,
    output: Annotated[str, typer.Option("--output", "-o", metavar="FILE.npz", help="Where to write.")] = "stats.npz",
    inception_weights: InceptionWeights = None,
    image_size: ImageSize = None,
    keep_images: Annotated[
        int, typer.Option(metavar="N", help="Images to keep in the file, for precision and recall.")
    ] = 10_000,
) -> None:
    """Compute reference statistics of a folder of images.

    For `dqtool eval --ref-stats`, and for the ADM evaluation suite, whose layout they have.
    """
    run_stage("stats", **locals())
