"""Options of `dqtool distill`."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any

from dqtool.core.quantization import QuantizationSpec
from dqtool.errors import UsageError
from dqtool.stages.options.declared import Option
from dqtool.stages.options.shared import ARTIFACT, LARGEST_SEED, OUTPUT

if TYPE_CHECKING:
    from dqtool.training.methods import Method

__all__ = ["DistillOptions", "corrects", "method_and_options", "with_sampler_defaults"]


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
    bits: Annotated[str, Option("Weights/activations, 2 to 8 or 16 for float.", "W/A")] = "4/4"
    steps: Annotated[int | None, Option("To check: the steps the input was calibrated for.", "N", least=1)] = None
    iters: Annotated[
        int | None, Option("Iterations per block, or of the network where a method trains it whole.", "N", least=0)
    ] = None
    refine_iters: Annotated[
        int | None,
        Option(
            "For bkd: iterations of the pass over all blocks; left out: 0 for samplers that extrapolate (PLMS, LMS).",
            "N",
            least=0,
        ),
    ] = None
    method: Annotated[
        str,
        Option(
            "How weights are learned: bkd, bkd-blockwise, on-policy, ptq, adaround, lsq, lora-qat, "
            "qat-partial or per-step.",
            "NAME",
        ),
    ] = "bkd"
    seed: Annotated[int, Option("Seed of the training.", "N", least=0, most=LARGEST_SEED)] = 0
    keep: Annotated[tuple[str, ...], Option("Other bits for some layers; may be repeated.", "REGEX=W/A")] = ()
    softmax_bits: Annotated[int, Option("Bits of the attention's softmax output.", "N")] = 8
    static: Annotated[bool, Option("One activation range for all steps.")] = False
    batch_size: Annotated[
        int | None, Option("Samples per iteration; left out: 32.", "N", least=1, show_default=False)
    ] = None
    blocks: Annotated[str | None, Option("Train these blocks only; the others stay as initialised.", "REGEX")] = None
    preset: Annotated[
        str,
        Option(
            "standard: every layer; nonstandard: upsampled and skip convolutions and attention products stay float.",
            "NAME",
        ),
    ] = "standard"
    train_samples: Annotated[
        int | None, Option("Points of the trajectory to train on; left out: all.", "N", least=1)
    ] = None
    cache_memory: Annotated[int, Option("Cached activations beyond this go to disk (TMPDIR).", "MIB", least=0)] = 6144
    low_memory: Annotated[
        bool, Option("All cached activations to disk, few samples at once: the same up to rounding, slower.")
    ] = False
    correct_noise: Annotated[
        bool | None,
        Option(
            "Take the errors of slope, detail and mean out of every step's predictions, with tables fitted "
            "after training; left out: where bkd, bkd-blockwise or on-policy trained something, but for "
            "samplers that extrapolate (PLMS, LMS).",
            show_default=False,
        ),
    ] = None
    strict: Annotated[
        bool, Option("End with an error where training diverges, in place of leaving that block as calibrated.")
    ] = False

    def __post_init__(self) -> None:
        """Refuse, before anything runs, what no artifact could make right.

        Raises:
            UsageError: bits, `--keep` patterns, a method or a preset that don't exist, or options that contradict each
                other.
        """
        _ = self.spec
        method, _ = method_and_options(self)
        if self.blocks is not None and not method.by_blocks:
            raise UsageError(
                f"--method {method.name} trains the network as a whole", where="--blocks", fix="Leave it out"
            )
        if self.correct_noise and self.static:
            raise UsageError(
                "--static leaves one quantizer for all steps, and the correction is one of each step",
                where="--correct-noise",
                fix="Leave one of the two out",
            )
        try:
            re.compile(self.blocks or "")
        except (re.error, RecursionError, OverflowError) as e:
            raise UsageError(f"'{self.blocks}' is no regular expression: {e}", where="--blocks") from e

    @cached_property
    def spec(self) -> QuantizationSpec:
        """`bits`, `keep`, `softmax_bits` and `preset`, parsed."""
        return QuantizationSpec.parse(self.bits, self.keep, self.softmax_bits, self.preset)


def with_sampler_defaults(options: DistillOptions, scheduler: str) -> DistillOptions:
    """Return the options with the defaults for a scheduler of this class.

    With an `EXTRAPOLATING` one, our methods leave out the second pass and don't correct predictions, unless the user
    asks for them.
    """
    from dqtool.training.methods import method_of
    from dqtool.training.options import EXTRAPOLATING

    method = method_of(options.method)
    if scheduler not in EXTRAPOLATING or not method.corrects:
        return options
    passes = options.refine_iters
    if passes is None and any(each.name == "refine_iters" for each in fields(method.options)):
        passes = 0
    return replace(options, refine_iters=passes, correct_noise=bool(options.correct_noise))


def method_and_options(options: DistillOptions) -> tuple[Method, Any]:
    """Return the training method and its options, with defaults filled in.

    Raises:
        UsageError: there is no such method, or something was given that it has no use for.
    """
    from dqtool.training.methods import method_of, method_options

    method = method_of(options.method)
    given = {"iters": options.iters, "refine_iters": options.refine_iters, "batch_size": options.batch_size}
    return method, method_options(method, given)


def corrects(options: DistillOptions) -> bool:
    """Say whether the network's predictions will be corrected at each step. `options` are those of `with_sampler_defaults`."""
    if options.correct_noise is not None:
        return options.correct_noise
    method, recipe = method_and_options(options)
    trains = any(getattr(recipe, name, 0) for name in ("iters", "refine_iters"))
    return method.corrects and trains and not options.static
