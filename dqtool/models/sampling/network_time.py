"""Conversion of the scheduler's timestep to the value that a network receives.

Pipelines of diffusers pass the scheduler's `t`, `t / 1000`, or `1 - t / 1000`, and some negate the prediction before they
give it to the scheduler. Step tables are keyed by the value that the network receives. The tables here follow diffusers'
pipelines. A class that is not listed receives `t`; for an unknown flow-matching class the user must pass
`dqtool dilate --time-scale`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dqtool.artifacts.jsonvalues import ForeignConfig
from dqtool.errors import UsageError
from dqtool.models.sampling.schedules import FLOW_CLASSES
from dqtool.models.sources.hints import is_flow

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TIME", "NetworkTime", "network_time"]

TIME = "_time"
"""Config key of `NetworkTime.record()` for a network without an adapter. diffusers ignores keys with an underscore."""

DIVIDED = frozenset(
    f"{name}Transformer2DModel"
    for name in (
        "AuraFlow",
        "BriaFibo2",
        "Chroma",
        "Flux2",
        "Krea2",
        "LongCatImage",
        "NucleusMoEImage",
        "OvisImage",
        "PRX",
        "QwenImage",
        "QwenImage21",
    )
) | {"LongCatAudioDiTTransformer"}
"""Networks whose pipelines pass `t / 1000`."""

REVERSED = frozenset(
    {"Ideogram4Transformer2DModel", "Lumina2Transformer2DModel", "LuminaNextDiT2DModel", "ZImageTransformer2DModel"}
)
"""Networks whose pipelines pass `1 - t / 1000`."""

NEGATED = frozenset(
    {
        "HiDreamImageTransformer2DModel",
        "Lumina2Transformer2DModel",
        "LuminaNextDiT2DModel",
        "NucleusMoEImageTransformer2DModel",
        "ZImageTransformer2DModel",
    }
)
"""Networks whose pipelines negate the prediction."""

LINEAR_SIGMAS = frozenset(
    f"{name}Transformer{dims}Model"
    for dims, names in {
        "2D": "Bria BriaFibo BriaFibo2 Chroma DreamLite Flux2 Krea2 LongCatImage Lumina2 NucleusMoEImage OvisImage QwenImage "
        "QwenImage21",
        "3D": "LTXVideo LTX2Video MotifVideo",
    }.items()
    for name in names.split()
) | {"LongCatAudioDiTTransformer"}
"""Networks whose pipelines give the scheduler evenly spaced sigmas from 1 to 1 / steps."""

ASKED = frozenset({"CosmosTransformer3DModel", "SanaWMTransformer3DModel"})
"""Networks whose pipelines differ in the time that they pass, so that the class does not determine it."""


@dataclass(frozen=True)
class NetworkTime:
    """Time of a network: it receives `t / divisor + offset`, or one minus that (`reversed`), in float32 where `floating`.

    With `negated` the scheduler takes the negated prediction. With `linear_sigmas` a flow schedule starts from evenly
    spaced sigmas, 1 to 1 / steps.
    """

    divisor: float = 1.0
    offset: float = 0.0
    reversed: bool = False
    negated: bool = False
    linear_sigmas: bool = False
    floating: bool = False

    def given(self, timestep: Tensor) -> Tensor:
        """Return the value that the network receives for the scheduler's `timestep`, which may have any shape."""
        import torch

        time = timestep.to(torch.float32) if self.floating and timestep.dtype != torch.float64 else timestep
        time = time if self.divisor == 1 else time / self.divisor
        time = time if self.offset == 0 else time + self.offset
        return 1 - time if self.reversed else time

    def record(self) -> dict[str, Any]:
        """Return the fields that differ from the scheduler's own time, for a config."""
        default = asdict(NetworkTime())
        return {key: value for key, value in asdict(self).items() if value != default[key]}


def network_time(
    class_name: str, config: ForeignConfig, scheduler: ForeignConfig | None, scale: float | None
) -> NetworkTime:
    """Return the time, in float32, of a network of the diffusers class `class_name`.

    With `scale`, given by the user, the network receives `scale * t`, or `1 + scale * t` for a negative scale.

    Raises:
        UsageError: the class does not determine the time and there is no `scale`, or the scale is zero.
    """
    common = {"floating": True, "negated": class_name in NEGATED, "linear_sigmas": class_name in LINEAR_SIGMAS}
    if scale is not None:
        if scale == 0:
            raise UsageError("A network that knows no time has no steps", where="--time-scale", fix="Give 0.001, say")
        return NetworkTime(1 / abs(scale), reversed=scale < 0, **common)
    if class_name in DIVIDED or class_name in REVERSED:
        return NetworkTime(1000.0, reversed=class_name in REVERSED, **common)
    if class_name == "GlmImageTransformer2DModel":
        return NetworkTime(offset=-1.0, **common)
    if class_name == "SanaTransformer2DModel" and not config.get("guidance_embeds"):
        return NetworkTime(1 / float(config.get("timestep_scale") or 1.0), **common)
    flow = scheduler is not None and is_flow(scheduler)
    ambiguous = class_name in ASKED or (class_name == "SanaTransformer2DModel" and bool(config.get("guidance_embeds")))
    if flow and (ambiguous or class_name not in FLOW_CLASSES):
        raise UsageError(
            f"The class {class_name} does not determine the time that the network receives",
            where="--family generic",
            fix="Say what its pipeline passes for the scheduler's timestep t with --time-scale: 1 for t, 0.001 for "
            "t / 1000, -0.001 for 1 - t / 1000",
        )
    return NetworkTime(**common)
