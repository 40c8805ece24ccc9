"""Choice of a model's noise schedule: the user's, the model's own, or that of a published architecture. Imports no torch."""

from __future__ import annotations

import math

from dqtool.artifacts.jsonvalues import ForeignConfig
from dqtool.models.sources.hints import ModelHints, scheduler_config, with_prediction_type
from dqtool.models.sources.original.stable_diffusion import published_schedule

__all__ = ["FLOW_CLASSES", "choose_schedule", "finite_config"]

FLOW_CLASSES = frozenset(
    f"{name}Transformer{dims}Model"
    for dims, names in {
        "1D": "AceStep",
        "2D": "AuraFlow Bria BriaFibo BriaFibo2 Chroma CogView4 ErnieImage Flux2 Flux3 GlmImage HiDreamImage HunyuanImage "
        "Ideogram4 Krea2 LongCatImage Lumina2 NucleusMoEImage OmniGen OvisImage PRX QwenImage QwenImage21 Sana ZImage",
        "3D": "ChronoEdit Cosmos EasyAnimate HunyuanVideo15 HunyuanVideoFramepack HunyuanVideo JoyImageEditPlus JoyImageEdit "
        "Kandinsky5 Kandinsky6SR Kandinsky6 LTX2Video LTXVideo Mochi SanaVideo SanaWM SkyReelsV2 WanAnimate Wan WanVACE",
    }.items()
    for name in names.split()
) | {"LuminaNextDiT2DModel", "Cosmos3OmniTransformer", "LongCatAudioDiTTransformer", "StableAudio3DiTModel"}
"""Diffusers networks whose pipelines sample by flow matching with a shift that differs between models. SD3 and Flux are not
among them, since their families define the schedule."""

_BARE = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_schedule": "linear"}


def choose_schedule(
    class_name: str,
    config: ForeignConfig,
    own: ForeignConfig | None,
    unknown_schedule: str | None,
    hints: ModelHints,
) -> tuple[ForeignConfig | None, str | None]:
    """Return the scheduler config of a network (None: its family's) and a description of its unknown part (None: nothing).

    `own` is the schedule of the model's pipeline or file, and `unknown_schedule` describes what that does not define.

    Raises:
        UsageError: the hints contradict each other.
        ArtifactError: the scheduler that the hints name is no scheduler config.
    """
    if hints.scheduler is not None:
        own, unknown_schedule = finite_config(scheduler_config(hints.scheduler)), None
    elif own is None and class_name == "UNet2DConditionModel":
        own, unknown_schedule = published_schedule(config) or (None, unknown_schedule)
    if hints.prediction_type is not None:
        family = class_name in ("SD3Transformer2DModel", "FluxTransformer2DModel")
        if own is None and family and hints.prediction_type == "flow_prediction":
            return None, unknown_schedule
        return with_prediction_type(own or _BARE, hints.prediction_type), None
    if own is None and class_name in FLOW_CLASSES:
        return None, (
            f"The weights of a {class_name} don't determine its noise schedule: such networks are trained by flow "
            "matching, each model with a shift of its own"
        )
    return None if own is None else dict(own), unknown_schedule


def finite_config(config: ForeignConfig) -> ForeignConfig:
    """Return a scheduler's config without infinite values, which JSON lacks.

    Infinity means "no limit", the default of its key, so leaving it out changes nothing.
    """
    return {
        key: value
        for key, value in config.items()
        if key != "_use_default_values" and not (isinstance(value, float) and not math.isfinite(value))
    }
