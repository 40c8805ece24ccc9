"""Options of `dqtool distill`."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any

from dqtool.core.quantization import PAPER, STANDARD, QuantizationSpec
from dqtool.errors import UsageError
from dqtool.stages.options.declared import INPUT, RESOURCES, Option
from dqtool.stages.options.shared import ARTIFACT, LARGEST_SEED, OUTPUT

if TYPE_CHECKING:
    from dqtool.training.methods import Method

__all__ = [
    "AUTO",
    "DistillOptions",
    "Targets",
    "corrects_predictions",
    "method_and_options",
    "repair_iters_of",
    "with_sampler_defaults",
]

AUTO = "auto"
"""Value of `--bits` that chooses the bits of every layer by measured errors."""


@dataclass(frozen=True)
class Targets:
    """Targets of `--bits auto`: PSNR in dB before training, file size in MB (10^6 bytes), bit operations in 10^9."""

    psnr: float | None = None
    megabytes: float | None = None
    gigabops: float | None = None

    def to_json(self) -> dict[str, float]:
        """Return those that were given."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class DistillOptions:
    """Options of `dqtool distill`.

    `iters`, `refine_iters` and `batch_size` None stand for the method's own. `cache_memory`, MiB, changes nothing in the
    result. `correct_noise` None corrects predictions where the method does so by default and something was trained. A
    training that diverges leaves its block as calibrated, which the manifest's metric `warnings` notes, unless it is
    `strict`. See also `with_sampler_defaults`.
    """

    artifact: Annotated[str | None, ARTIFACT] = None
    output: Annotated[str, OUTPUT] = "distilled.safetensors"
    bits: Annotated[
        str,
        Option(
            "Bits of weights and activations, 2 to 8 each, or 16 for float. 8/8 is the safest, 4/4 the smallest and fastest; "
            "4/16 quantizes weights alone; auto gives every layer its own by measured errors.",
            "W/A|auto",
        ),
    ] = "4/4"
    target_psnr: Annotated[
        float | None,
        Option(
            "PSNR of samples that --bits auto must reach, in dB and before training. Higher takes more bits.",
            "F",
            least=0,
        ),
    ] = None
    target_size: Annotated[
        float | None, Option("Size of the file that --bits auto must not exceed, in MB.", "MB", least=0)
    ] = None
    target_bops: Annotated[
        float | None,
        Option("Bit operations of a forward pass that --bits auto must not exceed, in 10^9.", "F", least=0),
    ] = None
    protect: Annotated[
        float | None,
        Option(
            "Extra bytes and bit operations, in percent, that may go to the operands which cost samples most. Default: 30 "
            "where the bits are predicted to give samples of less than 40 dB before training, up to 60 where that leaves them "
            "below 30 dB (8/8: 40), else 0.",
            "PERCENT",
            least=0,
            show_default=False,
        ),
    ] = None
    passes: Annotated[
        int,
        Option(
            "Backward passes that --bits auto and --protect measure errors by. More are steadier and slower.",
            "N",
            least=1,
        ),
    ] = 32
    steps: Annotated[
        int | None,
        Option(
            "Sampling steps that the input must be calibrated for. Give it as a check.",
            "N",
            least=1,
            panel=INPUT,
        ),
    ] = None
    iters: Annotated[
        int | None,
        Option(
            "Training iterations for each block, or for the network if the method trains it as a whole. More improve "
            "quality slowly; 0 trains nothing. Default: the method's own.",
            "N",
            least=0,
        ),
    ] = None
    refine_iters: Annotated[
        int | None,
        Option(
            "Iterations of the second pass of bkd (over all blocks together) and bkd-blockwise (on the quantized model's own "
            "samples). Default: the method's own, and 0 for samplers that extrapolate (PLMS, LMS).",
            "N",
            least=0,
        ),
    ] = None
    rate: Annotated[
        float,
        Option(
            "Factor on the learning rates of bkd, bkd-blockwise, on-policy and lsq. Lower it when the loss jumps, raise it "
            "for few iterations.",
            "F",
            least=0,
        ),
    ] = 1.0
    method: Annotated[
        str,
        Option(
            "Training method: {dqtool.training.methods:METHODS}. ptq trains nothing and takes seconds.",
            "NAME",
        ),
    ] = "bkd"
    seed: Annotated[
        int, Option("Seed of the training. Change it to see how much results vary.", "N", least=0, most=LARGEST_SEED)
    ] = 0
    keep: Annotated[
        tuple[str, ...],
        Option(
            "Bits of the layers whose names match, 16/16 for float. Use it for the layers that `dqtool "
            "sensitivity` lists first. May be repeated.",
            "REGEX=W/A",
        ),
    ] = ()
    softmax_bits: Annotated[
        int,
        Option("Bits of the attention's softmax output, 2 to 8, or 16 for float. Change it to compare methods.", "N"),
    ] = 8
    low_rank: Annotated[
        int,
        Option(
            "Rank of a 16-bit branch beside every product whose weights have fewer than 8 bits (SVDQuant); 0 for none. Give "
            "16 to 32 to wide networks at 4 bits; it costs bytes and time, and narrow layers gain more from 8 bits.",
            "N",
            least=0,
            most=4096,
        ),
    ] = 0
    static: Annotated[
        bool,
        Option(
            "Use one activation range for all steps, in place of one for each. It costs quality. `export --format "
            "compressed-tensors` needs it for quantized inputs."
        ),
    ] = False
    batch_size: Annotated[
        int | None,
        Option(
            "Samples in each iteration, of blocks and of all blocks. Default: 32. Lower it when memory runs out.",
            "N",
            least=1,
            show_default=False,
            panel=RESOURCES,
        ),
    ] = None
    blocks: Annotated[
        str | None,
        Option(
            "Blocks to train, by name. The others stay as initialised. Give one block to try something quickly.",
            "REGEX",
        ),
    ] = None
    parallel_blocks: Annotated[
        bool,
        Option(
            "Train blocks at once, each by one process from the float network's activations, then repair them in order. It "
            "costs quality; give it where many processes (--nproc, torchrun) save days.",
        ),
    ] = False
    repair_iters: Annotated[
        int | None,
        Option(
            "Iterations of the repair of each block with --parallel-blocks. More improve quality and take longer, since they "
            "go in order. Default: a quarter of --iters.",
            "N",
            least=0,
            show_default=False,
        ),
    ] = None
    preset: Annotated[
        str,
        Option(
            "Layers to quantize. standard: every layer. nonstandard: upsampled and skip convolutions and attention "
            "products stay float, as in EfficientDM. paper: every layer, trained once block by block without a pass over all "
            "blocks and without corrected predictions; needs `dilate --scaling wd` and `calibrate --scaling keep`.",
            "NAME",
        ),
    ] = "standard"
    train_samples: Annotated[
        int | None,
        Option(
            "Calibration samples to train on. Fewer take less memory and time. Default: all.",
            "N",
            least=1,
            panel=RESOURCES,
        ),
    ] = None
    cache_memory: Annotated[
        int,
        Option("Memory for cached activations. Those beyond it go to disk (TMPDIR).", "MIB", least=0, panel=RESOURCES),
    ] = 6144
    low_memory: Annotated[
        bool,
        Option(
            "Keep all cached activations on disk and run few samples at once. Results are equal up to rounding; training "
            "is slower.",
            panel=RESOURCES,
        ),
    ] = False
    correct_noise: Annotated[
        bool | None,
        Option(
            "Correct the slope, detail and mean of the predictions at each step, with tables fitted after training. "
            "Default: yes after training with bkd, bkd-blockwise or on-policy, except for samplers that extrapolate "
            "(PLMS, LMS).",
            show_default=False,
        ),
    ] = None
    strict: Annotated[
        bool,
        Option("Stop with an error when training diverges. Without it, the block that diverged stays as calibrated."),
    ] = False

    def __post_init__(self) -> None:
        """Check the options that can be checked without an artifact.

        Raises:
            UsageError: bits or patterns can't be read, there is no such method or preset, or options contradict each
                other.
        """
        _ = self.spec
        check_targets(self)
        if self.preset == PAPER:
            _check_paper(self)
        method, _ = method_and_options(self)
        if self.blocks is not None and not method.by_blocks:
            raise UsageError(
                f"--method {method.name} trains the network as a whole", where="--blocks", fix="Leave it out"
            )
        if self.correct_noise and self.static:
            raise UsageError(
                "--static keeps one quantizer for all steps, and --correct-noise has a correction for each step",
                where="--correct-noise",
                fix="Leave one of the two out",
            )
        if self.parallel_blocks and not method.at_once:
            raise UsageError(
                f"--method {method.name} does not train blocks apart from each other",
                where="--parallel-blocks",
                fix="Leave it out, or choose bkd or bkd-blockwise",
            )
        if self.repair_iters is not None and not self.parallel_blocks:
            raise UsageError(
                "Only blocks that were trained at once are repaired",
                where="--repair-iters",
                fix="Leave it out, or give --parallel-blocks",
            )
        try:
            re.compile(self.blocks or "")
        except (re.error, RecursionError, OverflowError) as e:
            raise UsageError(f"'{self.blocks}' is not a regular expression: {e}", where="--blocks") from e

    @cached_property
    def spec(self) -> QuantizationSpec:
        """`bits`, `keep`, `softmax_bits` and `preset`, parsed."""
        return QuantizationSpec.parse(
            "8/8" if self.bits == AUTO else self.bits, self.keep, self.softmax_bits, self.preset
        )

    @property
    def targets(self) -> Targets:
        """Target of `--bits auto`: the given ones, else `DEFAULT_PSNR`."""
        given = Targets(self.target_psnr, self.target_size, self.target_bops)
        return given if given.to_json() else Targets(DEFAULT_PSNR)

    @property
    def may_protect(self) -> bool:
        """True if dqtool decides whether operands are protected: uniform bits, and nothing that the user chose for layers."""
        quantizes = self.bits != AUTO and (self.spec.bits.quantizes_weight or self.spec.bits.quantizes_input)
        plain = self.preset == STANDARD and not self.keep and not self.low_rank and not self.static
        return quantizes and self.protect is None and plain


REPAIR_SHARE = 4
"""Iterations of a block's training for one of its repair, by default."""

DEFAULT_PSNR = 35.0
"""dB that `--bits auto` aims at when nothing else is said."""


def check_targets(options: DistillOptions) -> None:
    """Refuse targets without `--bits auto`, and what has no meaning with it.

    Raises:
        UsageError: there are such options.
    """
    targets = {
        "--target-psnr": options.target_psnr,
        "--target-size": options.target_size,
        "--target-bops": options.target_bops,
    }
    given = [name for name, value in targets.items() if value is not None]
    if given and options.bits != AUTO:
        raise UsageError("Targets are for bits that dqtool chooses", where=", ".join(given), fix="Give --bits auto")
    if options.bits == AUTO and options.protect:
        raise UsageError("--bits auto protects by itself", where="--protect", fix="Leave it out")
    if (options.bits == AUTO or options.protect) and options.preset != STANDARD:
        raise UsageError(
            "Bits chosen by errors leave nothing to a preset", where="--preset", fix="Leave it out, or use --keep"
        )


def _check_paper(options: DistillOptions) -> None:
    """Raise `UsageError` for an option that contradicts the preset `paper`."""
    contradictions = {
        "--method": options.method != "bkd",
        "--refine-iters": bool(options.refine_iters),
        "--rate": options.rate != 1,
        "--correct-noise": bool(options.correct_noise),
        "--static": options.static,
        "--parallel-blocks": options.parallel_blocks,
    }
    for name, given in contradictions.items():
        if given:
            raise UsageError(
                "--preset paper trains blocks alone, with step quantizers and uncorrected predictions",
                where=name,
                fix="Leave one of the two out",
            )


def with_sampler_defaults(options: DistillOptions, scheduler: str) -> DistillOptions:
    """Return the options with the defaults for a scheduler of this class.

    For an `EXTRAPOLATING` scheduler, methods that correct predictions skip the correction and the second pass, unless
    the user asks for them.
    """
    from dqtool.training.methods import method_of
    from dqtool.training.options import EXTRAPOLATING

    method = method_of(options.method)
    if scheduler not in EXTRAPOLATING or not method.corrects_predictions or options.preset == PAPER:
        return options
    passes = options.refine_iters
    if passes is None and any(each.name == "refine_iters" for each in fields(method.options)):
        passes = 0
    return replace(options, refine_iters=passes, correct_noise=bool(options.correct_noise))


def method_and_options(options: DistillOptions) -> tuple[Method, Any]:
    """Return the training method and its options, with defaults filled in.

    Raises:
        UsageError: there is no such method, or it does not take an option that was given.
    """
    from dqtool.training.methods import method_of, method_options
    from dqtool.training.options import Rates

    method = method_of(options.method)
    given = {"iters": options.iters, "refine_iters": options.refine_iters, "batch_size": options.batch_size}
    if options.preset == PAPER:
        given["refine_iters"] = 0
    if options.batch_size is not None and any(each.name == "refine_batch_size" for each in fields(method.options)):
        given["refine_batch_size"] = options.batch_size
    found = method_options(method, given)
    if options.rate == 1:
        return method, found
    rates = {each.name: value for each in fields(found) if isinstance(value := getattr(found, each.name), Rates)}
    if not rates:
        raise UsageError(f"--method {method.name} has no use for this option", where="--rate", fix="Leave it out")
    return method, replace(found, **{name: value.times(options.rate) for name, value in rates.items()})


def corrects_predictions(options: DistillOptions) -> bool:
    """Return True if predictions will be corrected at each step. `options` come from `with_sampler_defaults`."""
    if options.preset == PAPER:
        return False
    if options.correct_noise is not None:
        return options.correct_noise
    method, recipe = method_and_options(options)
    trains = any(getattr(recipe, name, 0) for name in ("iters", "refine_iters"))
    return method.corrects_predictions and trains and not options.static


def repair_iters_of(options: DistillOptions) -> int | None:
    """Return the iterations that repair each block after all were trained at once; None where they are trained in order."""
    if not options.parallel_blocks:
        return None
    if options.repair_iters is not None:
        return options.repair_iters
    _, recipe = method_and_options(options)
    iters: int = recipe.iters
    return -(-iters // REPAIR_SHARE)
