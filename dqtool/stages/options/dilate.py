"""Options of `dqtool dilate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from dqtool.errors import UsageError
from dqtool.stages.options.declared import Option
from dqtool.stages.options.shared import OUTPUT

if TYPE_CHECKING:
    from dqtool.models.sources import ModelSource
    from dqtool.models.told import Told

__all__ = ["DilateOptions"]

WITHOUT_IMPORTS = ("wd", "none")
"""Values of `--scaling` that are accepted without importing torch."""


@dataclass(frozen=True)
class DilateOptions:
    """Options of `dqtool dilate`. `stats` and `bits` now belong to `calibrate`: giving them is an error that says so."""

    model: Annotated[
        str,
        Option(
            "A .safetensors file with config.json beside it, a diffusers directory, an original checkpoint, a"
            " Hub id, or zoo:NAME.",
            positional=True,
        ),
    ]
    output: Annotated[str, OUTPUT] = "dilated.safetensors"
    config: Annotated[str | None, Option("Its config.json or a directory with it, or the authors' YAML.", "FILE")] = (
        None
    )
    prediction_type: Annotated[
        str | None,
        Option(
            "What the network predicts, where its files don't say: epsilon, v_prediction, sample, flow_prediction.",
            "KIND",
        ),
    ] = None
    scheduler: Annotated[
        str | None, Option("A scheduler_config.json, or a directory with one: its noise schedule.", "FILE")
    ] = None
    variant: Annotated[str | None, Option("Which weights of several: fp16, bf16, ema, non_ema.", "NAME")] = None
    tokenizer: Annotated[str | None, Option("The tokenizer of a single file that holds its text encoders.", "DIR")] = (
        None
    )
    pipeline: Annotated[
        str | None, Option("A pipeline of the same kind, with all that the model comes without.", "DIR")
    ] = None
    scaling: Annotated[
        str,
        Option(
            "wd is Weight Dilation; none leaves the weights as they are. Scaling by activations: calibrate --scaling.",
            "NAME",
        ),
    ] = "wd"
    cap: Annotated[float, Option("The largest factor of a channel.", "F", least=1)] = 64.0
    threshold: Annotated[float, Option("Of wd: leave channels alone whose factor would be smaller.", "F", least=1)] = (
        1.0
    )
    family: Annotated[str | None, Option("generic: take a network of a class that has no adapter.", "NAME")] = None
    example: Annotated[str | None, Option("For generic: a tensor for each further argument, safetensors.", "FILE")] = (
        None
    )
    time_scale: Annotated[
        float | None,
        Option(
            "For generic: the network receives F * t for the scheduler's timestep t, or 1 + F * t where F is negative.",
            "F",
        ),
    ] = None
    components: Annotated[
        str | None, Option("Which network of a pipeline, one at a time; left out: its denoiser.", "NAME")
    ] = None
    lora: Annotated[tuple[str, ...], Option("A LoRA to add first; may be repeated.", "FILE[:WEIGHT]")] = ()
    fold: Annotated[bool, Option("Divide in what makes the input (norms, v, adaLN) where the algebra allows.")] = False
    stats: Annotated[str | None, Option("Moved: see calibrate --scaling.", hidden=True)] = None
    bits: Annotated[str | None, Option("Moved: see calibrate --bits.", hidden=True)] = None

    def __post_init__(self) -> None:
        """Raise `UsageError` for a scaling that looks at activations, and for options that `calibrate` has now."""
        if self.scaling not in WITHOUT_IMPORTS:
            from dqtool.scaling.methods import check_weight_method

            check_weight_method(self.scaling)
        if self.stats is not None:
            raise UsageError(
                "dilate reads weights alone and takes no statistics",
                where="--stats",
                fix="Leave it out; scaling by activations is `dqtool calibrate --scaling NAME`",
            )
        if self.bits is not None:
            raise UsageError(
                "dilate reads weights alone, and its factors depend on no bits",
                where="--bits",
                fix="Give it to the stage that compares outputs: `dqtool calibrate --bits W/A`",
            )

    def told(self) -> Told:
        """Return the user's statements about the model beyond its files."""
        from dqtool.models.told import Told

        return Told(self.prediction_type, self.scheduler, self.tokenizer, self.pipeline, self.variant)

    def source(self) -> ModelSource:
        """Return the model that is meant. Raises the errors of `resolve_model`."""
        from dqtool.models.sources import resolve_model

        return resolve_model(self.model, self.config, self.components, self.lora, self.told())
