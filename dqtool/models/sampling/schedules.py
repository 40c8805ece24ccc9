"""The noise schedule of a model: its own, the one that is told, or one that must be asked for. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

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
"""diffusers' networks whose pipelines sample by flow matching, and whose schedule (its shift) differs between models. SD3 and
Flux are not among them: their families know theirs."""

_BARE = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_schedule": "linear"}


def choose_schedule(
    class_name: str, config: Mapping[str, Any], own: Mapping[str, Any] | None, asks: str | None, told: ModelHints
) -> tuple[dict[str, Any] | None, str | None]:
    """Return the scheduler config of a network (None: what its family samples with) and what of it is not known.

    `own` is the schedule of the model's pipeline or file, `asks` what that leaves open.

    Raises:
        UsageError: what is told does not fit together.
        ArtifactError: what is told as a scheduler is none.
    """
    if told.scheduler is not None:
        own, asks = finite_config(scheduler_config(told.scheduler)), None
    elif own is None and class_name == "UNet2DConditionModel":
        own, asks = published_schedule(config) or (None, asks)
    if told.prediction_type is not None:
        family = class_name in ("SD3Transformer2DModel", "FluxTransformer2DModel")
        if own is None and family and told.prediction_type == "flow_prediction":
            return None, asks
        return with_prediction_type(own or _BARE, told.prediction_type), None
    if own is None and class_name in FLOW_CLASSES:
        return None, (
            f"The noise schedule of a {class_name} can't be told from its weights: such networks are trained by flow "
            "matching, each model with a shift of its own"
        )
    return None if own is None else dict(own), asks


def finite_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's config as a manifest can hold it. JSON knows no infinity, which stands only for "no limit", the
    default of its key, so that leaving it out says the same."""
    return {
        key: value
        for key, value in config.items()
        if key != "_use_default_values" and not (isinstance(value, float) and not math.isfinite(value))
    }
