"""Time as a network receives it, which is not always the scheduler's timestep.

Pipelines of diffusers pass the scheduler's `t` as it is, `t / 1000`, or `1 - t / 1000`, and some turn the sign of the
prediction before the scheduler sees it. Step tables are keyed by the value that the network receives. The facts here
are those of diffusers' pipelines; a class that is not listed passes `t`, and a flow-matching class that dqtool does not
know is asked for (`dqtool dilate --time-scale`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dqtool.errors import UsageError
from dqtool.models.sampling.schedules import FLOW_CLASSES
from dqtool.models.sources.hints import is_flow

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TIME", "NetworkTime", "network_time"]

TIME = "_time"
"""Config key for the time of a network without an adapter, `NetworkTime.record()`. diffusers ignores such keys."""

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
"""Networks whose pipelines turn the sign of the prediction."""

LINEAR_SIGMAS = frozenset(
    f"{name}Transformer{dims}Model"
    for dims, names in {
        "2D": "Bria BriaFibo BriaFibo2 Chroma DreamLite Flux2 Krea2 LongCatImage Lumina2 NucleusMoEImage OvisImage QwenImage "
        "QwenImage21",
        "3D": "LTXVideo LTX2Video MotifVideo",
    }.items()
    for name in names.split()
) | {"LongCatAudioDiTTransformer"}
"""Networks whose pipelines give the scheduler sigmas from 1 to 1 / steps, evenly."""

ASKED = frozenset({"CosmosTransformer3DModel", "SanaWMTransformer3DModel"})
"""Networks whose pipelines differ from each other in what they pass, so that the class does not tell."""


@dataclass(frozen=True)
class NetworkTime:
    """The network receives `t / divisor + offset`, or one minus that (`reversed`), in float32 where `floating`.

    `negated`: the scheduler takes the prediction with its sign turned. `linear_sigmas`: a flow schedule starts from evenly
    spaced sigmas, 1 to 1 / steps.
    """

    divisor: float = 1.0
    offset: float = 0.0
    reversed: bool = False
    negated: bool = False
    linear_sigmas: bool = False
    floating: bool = False

    def given(self, timestep: Tensor) -> Tensor:
        """Return the scheduler's `timestep`, of any shape, as the network receives it."""
        import torch

        time = timestep.to(torch.float32) if self.floating and timestep.dtype != torch.float64 else timestep
        time = time if self.divisor == 1 else time / self.divisor
        time = time if self.offset == 0 else time + self.offset
        return 1 - time if self.reversed else time

    def record(self) -> dict[str, Any]:
        """Return what differs from the scheduler's own time, as a config keeps it."""
        default = asdict(NetworkTime())
        return {key: value for key, value in asdict(self).items() if value != default[key]}


def network_time(
    class_name: str, config: Mapping[str, Any], scheduler: Mapping[str, Any] | None, scale: float | None
) -> NetworkTime:
    """Return the time of a network of diffusers' class `class_name`, in float32; `scale` is what the user says of it:
    the network receives `scale * t`, or `1 + scale * t` for a negative one.

    Raises:
        UsageError: the class does not tell and the user neither, or the scale is zero.
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
            f"What time a {class_name} receives can't be told from its class",
            where="--family generic",
            fix="Say what its pipeline passes for the scheduler's timestep t with --time-scale: 1 for t, 0.001 for "
            "t / 1000, -0.001 for 1 - t / 1000",
        )
    return NetworkTime(**common)
