"""`dqtool bench`: time and memory of an exported network."""

from __future__ import annotations

from dqtool.cli.app import command
from dqtool.cli.output import on_standard_error, print_report
from dqtool.stages.options.bench import BenchOptions
from dqtool.stages.shared.settings import RunSettings


@command(
    BenchOptions,
    "dqtool bench exported --runtime all --against fp32,bf16,nncf-int8",
    "dqtool bench --arch ddpm-cifar10 --bits 4/4 --batch 1,4,16",
    "dqtool bench exported --against none --roofline",
    "dqtool bench --arch sd14 --device cuda --batch 2,8",
)
def bench(options: BenchOptions, settings: RunSettings) -> None:
    """Compare speed and memory with float and other quantizers.

    All contenders run in one process and take turns. Ratios are to eager float32 in its faster memory format. With --device cuda
    each has the GPU to itself, and the report adds its memory and what the design of the products reaches there.
    """
    from dqtool.stages.bench import bench as measure
    from dqtool.stages.bench import render

    with on_standard_error():
        result = measure(options, settings)
    print_report(result.to_json(), render(result), settings)
