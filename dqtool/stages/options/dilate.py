"""Options of `dqtool dilate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from dqtool.errors import UsageError
from dqtool.stages.options.declared import INPUT, Option
from dqtool.stages.options.shared import OUTPUT

if TYPE_CHECKING:
    from dqtool.models.sources.hints import ModelHints
    from dqtool.models.sources.resolve import ModelSource

__all__ = ["DilateOptions"]

WITHOUT_IMPORTS = ("wd", "none")
"""Values of `--scaling` that are accepted without importing torch."""


@dataclass(frozen=True)
class DilateOptions:
    """Options of `dqtool dilate`. `stats` and `bits` moved to `calibrate`: giving them is an error that names the new place."""

    model: Annotated[
        str,
        Option(
            "Model to quantize: a .safetensors file with config.json beside it, a diffusers directory, an original "
            "checkpoint, a Hub id, or zoo:NAME.",
            positional=True,
        ),
    ]
    output: Annotated[str, OUTPUT] = "dilated.safetensors"
    config: Annotated[
        str | None,
        Option(
            "Configuration of a model file: a config.json, a directory with one, or the authors' YAML.",
            "FILE",
            panel=INPUT,
        ),
    ] = None
    prediction_type: Annotated[
        str | None,
        Option(
            "Quantity that the network predicts: epsilon, v_prediction, sample or flow_prediction. Give it when the "
            "model's files don't say.",
            "KIND",
            panel=INPUT,
        ),
    ] = None
    scheduler: Annotated[
        str | None,
        Option(
            "Noise schedule: a scheduler_config.json, or a directory with one. Give it when the model comes without one.",
            "FILE",
            panel=INPUT,
        ),
    ] = None
    variant: Annotated[
        str | None,
        Option(
            "Weights to take when a model has several: fp16, bf16, ema or non_ema.",
            "NAME",
            panel=INPUT,
        ),
    ] = None
    tokenizer: Annotated[
        str | None,
        Option(
            "Tokenizer for a single file that holds its text encoders. Give it when dqtool finds none.",
            "DIR",
            panel=INPUT,
        ),
    ] = None
    pipeline: Annotated[
        str | None,
        Option(
            "Pipeline of the same kind that provides the parts which the model lacks, such as its text encoders.",
            "DIR",
            panel=INPUT,
        ),
    ] = None
    scaling: Annotated[
        str,
        Option(
            "Scaling of the weights: wd is Weight Dilation, none leaves the weights as they are. Scaling methods that look "
            "at activations are options of `dqtool calibrate`.",
            "NAME",
        ),
    ] = "wd"
    cap: Annotated[float, Option("Largest factor of a channel. Lower it to change the weights less.", "F", least=1)] = (
        64.0
    )
    threshold: Annotated[
        float, Option("Smallest factor that wd applies. Raise it to leave more channels as they are.", "F", least=1)
    ] = 1.0
    family: Annotated[
        str | None,
        Option(
            "Family of the network. Give `generic` for a network whose class dqtool does not know.", "NAME", panel=INPUT
        ),
    ] = None
    example: Annotated[
        str | None,
        Option(
            "Example inputs for --family generic: a .safetensors file with a tensor for each further argument, and beside it a "
            ".json file for arguments of another kind.",
            "FILE",
            panel=INPUT,
        ),
    ] = None
    time_scale: Annotated[
        float | None,
        Option(
            "Time scale for --family generic: the network receives F * t for the scheduler's timestep t, or 1 + F * t "
            "where F is negative.",
            "F",
            panel=INPUT,
        ),
    ] = None
    components: Annotated[
        str | None,
        Option(
            "Network of the pipeline to quantize. Give it for pipelines that hold several, one run for each. Default: the denoiser.",
            "NAME",
            panel=INPUT,
        ),
    ] = None
    lora: Annotated[
        tuple[str, ...],
        Option("LoRA to merge into the weights first. May be repeated.", "FILE[:WEIGHT]", panel=INPUT),
    ] = ()
    fold: Annotated[
        bool,
        Option(
            "Fold the division of inputs into the layer before (norms, v, adaLN) where the algebra allows. The exported "
            "network then divides less."
        ),
    ] = False
    stats: Annotated[str | None, Option("Moved to `dqtool calibrate --scaling`.", hidden=True)] = None
    bits: Annotated[str | None, Option("Moved to `dqtool calibrate --bits`.", hidden=True)] = None

    def __post_init__(self) -> None:
        """Raise `UsageError` for a scaling that looks at activations, and for options that moved to `calibrate`."""
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

    def hints(self) -> ModelHints:
        """Return the user's statements about the model beyond its files."""
        from dqtool.models.sources.hints import ModelHints

        return ModelHints(self.prediction_type, self.scheduler, self.tokenizer, self.pipeline, self.variant)

    def source(self) -> ModelSource:
        """Return the model that is meant. Raises the errors of `resolve_model`."""
        from dqtool.models.sources.resolve import resolve_model

        return resolve_model(self.model, self.config, self.components, self.lora, self.hints())
