"""`dqtool bench`: time and memory of an exported network."""

from __future__ import annotations

from typing import Annotated

import typer

from dqtool.cli.app import command
from dqtool.cli.options import split_list, split_numbers
from dqtool.cli.output import on_standard_error, print_report
from dqtool.stages.options.declared import INPUT, RESOURCES
from dqtool.stages.shared.settings import RunSettings


@command(
    "dqtool bench exported --runtime all --against fp32,bf16,nncf-int8",
    "dqtool bench --arch ddpm-cifar10 --bits 4/4 --batch 1,4,16",
)
def bench(
    settings: RunSettings,
    artifact: Annotated[
        str | None,
        typer.Argument(
            metavar="[DIR]",
            help="Exported directory to time. Default: the path that a pipe brings, else exported/.",
        ),
    ] = None,
    arch: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Published architecture to time with random weights, in place of a directory: "
            "{dqtool.models.architectures:ARCHITECTURES}.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    bits: Annotated[
        str, typer.Option(metavar="W/A", help="Bits of weights and activations for --arch.", rich_help_panel=INPUT)
    ] = "4/4",
    runtime: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Runtime to time: {dqtool.runtimes:RUNTIMES}, auto, all or none. May be repeated. Default: auto.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    against: Annotated[
        str,
        typer.Option(
            metavar="A,B,...",
            help="Alternatives to compare with: {dqtool.bench.contenders:CONTENDERS}, or none.",
            rich_help_panel=INPUT,
        ),
    ] = "fp32,bf16",
    batch: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Batch sizes. Default: 1,4,16, or those of the architecture.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Threads to compute with. Default: PyTorch's choice.", rich_help_panel=RESOURCES
        ),
    ] = None,
    seconds: Annotated[
        float,
        typer.Option(
            metavar="F",
            help="Seconds to measure each batch size for. Raise it on a busy machine.",
            rich_help_panel=RESOURCES,
        ),
    ] = 10.0,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Float model to compare with. Default: the exported weights as float32.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    memory: Annotated[
        bool,
        typer.Option(
            help="Measure load time and peak memory too, each in a fresh process.",
            rich_help_panel=RESOURCES,
        ),
    ] = True,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="FILE.json", help="File to write the report to, as JSON.", rich_help_panel=INPUT
        ),
    ] = None,
) -> None:
    """Compare speed and memory with float and other quantizers.

    All contenders run in one process and take turns. Ratios are to eager float32 in its faster memory format.
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
        result = measure(options, settings)
    print_report(result, render(result), settings)
