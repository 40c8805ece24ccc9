"""Arguments and options that several commands take, and how lists are read from them."""

from __future__ import annotations

from typing import Annotated

import typer

from dqtool.errors import UsageError

__all__ = [
    "Artifact",
    "Conditions",
    "CorrectNoise",
    "Directory",
    "Guidance",
    "ImageSize",
    "InceptionWeights",
    "Output",
    "PipelineDirectory",
    "Prompts",
    "RandomConditions",
    "split_list",
    "split_numbers",
]

Artifact = Annotated[
    str | None,
    typer.Argument(help="The stage before's output. Left out: a line from a pipe, else that stage's default name."),
]
Output = Annotated[str, typer.Option("--output", "-o", metavar="FILE", help="Where to write.")]
Guidance = Annotated[
    float | None,
    typer.Option(
        metavar="F", help="Weight of classifier-free guidance; left out: as calibrated, or as the model's card says."
    ),
]
Prompts = Annotated[
    str | None, typer.Option(metavar="FILE", help="Prompts, one a line; left out: those of the model's card.")
]
Conditions = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Precomputed conditions, .safetensors or .npz: NAME [K, ...] for each and, for guidance, null.NAME [1, ...].",
    ),
]
PipelineDirectory = Annotated[
    str | None,
    typer.Option("--pipeline", metavar="DIR", help="A pipeline whose text encoders and tokenizers encode the prompts."),
]
RandomConditions = Annotated[
    bool,
    typer.Option(
        "--random-conditions", help="Allow random conditions for a model without text encoder; costs quality."
    ),
]
Directory = Annotated[str, typer.Option("--output", "-o", metavar="DIR", help="The directory to write.")]
InceptionWeights = Annotated[
    str | None, typer.Option(metavar="FILE", help="For fid, sfid, is, pr: FID's Inception network, .pth, .pt or .pb.")
]
ImageSize = Annotated[
    int | None, typer.Option(metavar="N", help="Measure the centre N x N, the shorter side brought to N (COCO: 300).")
]
CorrectNoise = Annotated[
    bool,
    typer.Option("--correct-noise", help="Take quantization's part out of predicted noise (PTQD), as measured first."),
]


def split_list(text: str) -> tuple[str, ...]:
    """`"a,b"` as ("a", "b"); "none" and nothing are ()."""
    return tuple(part.strip() for part in text.split(",") if part.strip() not in ("", "none"))


def split_numbers(text: str | None, where: str) -> tuple[int, ...]:
    """`"1,4"` as (1, 4); None is ().

    Raises:
        UsageError: something else than whole numbers.
    """
    parts = split_list(text or "")
    if not all(part.isdecimal() for part in parts):
        raise UsageError(f"'{text}' is no list of whole numbers", where=where, fix="Example: 1,4,16")
    return tuple(map(int, parts))
