"""`dqtool export`: a diffusers directory."""

from __future__ import annotations

from typing import Annotated

import typer

from dqtool.cli.app import command
from dqtool.cli.options import Artifact, Directory
from dqtool.cli.output import run_stage
from dqtool.stages.common import Common


@command("dqtool export distilled.safetensors -o exported")
def export(
    common: Common,
    artifact: Artifact = None,
    output: Directory = "exported",
    format: Annotated[
        str, typer.Option(metavar="NAME", help="dq: packed bits; dense: float weights on the quantized grid.")
    ] = "dq",
) -> None:
    """Write a diffusers directory.

    `import dqtool; DiffusionPipeline.from_pretrained(DIR)` and `dqtool.load(DIR)` read it.
    """
    run_stage("export", **locals())
