"""`dqtool bench`: time and memory."""

from __future__ import annotations

from typing import Annotated

import typer

from dqtool.cli.app import command
from dqtool.cli.options import split_list, split_numbers
from dqtool.cli.output import on_standard_error, print_report
from dqtool.stages.common import Common


@command(
    "dqtool bench exported --runtime all --against fp32,bf16,nncf-int8",
    "dqtool bench --arch ddpm-cifar10 --bits 4/4 --batch 1,4,16",
)
def bench(
    common: Common,
    artifact: Annotated[
        str | None,
        typer.Argument(metavar="[DIR]", help="An exported directory; left out: from a pipe, or exported/."),
    ] = None,
    arch: Annotated[
        str | None, typer.Option(metavar="NAME", help="Instead: a published architecture with random weights.")
    ] = None,
    bits: Annotated[str, typer.Option(metavar="W/A", help="Bits of --arch.")] = "4/4",
    runtime: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A runtime, auto, all or none; may be repeated. Left out: auto."),
    ] = None,
    against: Annotated[
        str,
        typer.Option(
            metavar="A,B,...",
            help="fp32, bf16, fp32-compile, bf16-compile, fp32-openvino, bf16-openvino, nncf-int8, or none.",
        ),
    ] = "fp32,bf16",
    batch: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Batch sizes; left out: 1,4,16, or those of --arch.")
    ] = None,
    threads: Annotated[int | None, typer.Option(metavar="N", help="Left out: PyTorch's choice.")] = None,
    seconds: Annotated[float, typer.Option(metavar="F", help="Time to measure each batch size for.")] = 10.0,
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The float model; left out: the exported weights as float32.")
    ] = None,
    memory: Annotated[bool, typer.Option(help="Measure load time and peak memory too, in fresh processes.")] = True,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE.json", help="Write the report as JSON as well.")
    ] = None,
) -> None:
    """Time the network, next to what one would use instead.

    All contenders run in one process, turn by turn; ratios are to the faster memory format of eager float32.
    """
    from dqtool.stages.bench import BenchOptions, render
    from dqtool.stages.bench import bench as measure

    options = BenchOptions(
        artifact,
        arch,
        bits,
        tuple(runtime or ()),
        split_list(against),
        split_numbers(batch, "--batch"),
        threads,
        seconds,
        reference,
        memory,
        output,
    )
    with on_standard_error():
        result = measure(options, common)
    print_report(result, render(result), common)
