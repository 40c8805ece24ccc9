"""Options of `dqtool bench`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

from dqtool.core.quantization import QuantizationSpec
from dqtool.errors import UsageError
from dqtool.stages.options.declared import INPUT, RESOURCES, Option

__all__ = ["BenchOptions"]


@dataclass(frozen=True)
class BenchOptions:
    """Options of `dqtool bench`.

    `artifact` is an exported directory; `arch` is a published architecture to time with random weights in its place. An empty
    `batch` stands for 1, 4 and 16, or the architecture's own sizes; an empty `runtime` stands for `auto`.
    """

    artifact: Annotated[
        str | None,
        Option(
            "Exported directory to time. Default: the path that a pipe brings, else exported/.",
            "DIR",
            positional=True,
        ),
    ] = None
    arch: Annotated[
        str | None,
        Option(
            "Published architecture to time with random weights, in place of a directory: "
            "{dqtool.models.architectures:ARCHITECTURES}.",
            "NAME",
            panel=INPUT,
        ),
    ] = None
    bits: Annotated[str, Option("Bits of weights and activations for --arch.", "W/A", panel=INPUT)] = "4/4"
    runtime: Annotated[
        tuple[str, ...],
        Option(
            "Runtime to time: {dqtool.runtimes:RUNTIMES}, auto, all or none. May be repeated. Default: auto.",
            "NAME",
            panel=INPUT,
        ),
    ] = ()
    against: Annotated[
        tuple[str, ...],
        Option(
            "Alternatives to compare with: {dqtool.bench.contenders:CONTENDERS}, or none. With --device cuda: "
            "{dqtool.bench.gpu_names:GPU_CONTENDERS}; default there: all that are installed.",
            "A,B,...",
            separated=True,
            panel=INPUT,
        ),
    ] = ("fp32", "bf16")
    batch: Annotated[
        tuple[int, ...],
        Option(
            "Batch sizes. Default: 1,4,16, or those of the architecture.",
            "N,N,...",
            least=1,
            separated=True,
            panel=INPUT,
        ),
    ] = ()
    sample_size: Annotated[
        int | None,
        Option(
            "Height and width of a UNet's input, latents where it has an autoencoder. Default: the model's own.",
            "N",
            least=8,
            panel=INPUT,
        ),
    ] = None
    threads: Annotated[
        int | None, Option("Threads to compute with. Default: PyTorch's choice.", "N", least=1, panel=RESOURCES)
    ] = None
    seconds: Annotated[
        float,
        Option("Seconds to measure each batch size for. Raise it on a busy machine.", "F", least=0, panel=RESOURCES),
    ] = 10.0
    reference: Annotated[
        str | None,
        Option("Float model to compare with. Default: the exported weights as float32.", "MODEL", panel=INPUT),
    ] = None
    memory: Annotated[
        bool, Option("Measure load time and peak memory too, each in a fresh process.", panel=RESOURCES)
    ] = True
    roofline: Annotated[
        bool,
        Option(
            "Measure also what each kind of kernel of the cpu runtime reaches of the machine's peak, and the step by threads.",
            panel=RESOURCES,
        ),
    ] = False
    output: Annotated[
        str | None, Option("File to write the report to, as JSON.", "FILE.json", short="-o", panel=INPUT)
    ] = None

    def __post_init__(self) -> None:
        """Raise `UsageError` for bits or contenders that don't exist, and for options that contradict --arch."""
        from dqtool.bench.contenders import contender_names
        from dqtool.bench.gpu_names import GPU_CONTENDERS

        _ = self.spec
        contender_names([name for name in self.against if name not in GPU_CONTENDERS])
        if self.arch is not None and self.artifact is not None:
            raise UsageError("A directory and --arch were given", where="--arch", fix="Give one of them")
        if self.arch is not None and self.reference is not None:
            raise UsageError("--arch has random weights and no reference", where="--reference", fix="Leave it out")

    @cached_property
    def spec(self) -> QuantizationSpec:
        """`bits`, parsed."""
        return QuantizationSpec.parse(self.bits)
