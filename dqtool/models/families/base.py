"""What an adapter is, and the table of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from dqtool.core.device import to_device_of
from dqtool.errors import ArtifactError
from dqtool.graph.network import NetworkGraph
from dqtool.models.conditions.conditioning import Conditions, Request, random_conditions, with_embedded
from dqtool.models.config_extras import apply_config_extras
from dqtool.models.config_schema import bounded_parameters, built, check_network_config, diffusers_class
from dqtool.models.sampling.network_time import NetworkTime

if TYPE_CHECKING:
    from dqtool.models.components.companions import Companions

__all__ = ["FAMILIES", "Family", "image_side", "register", "square_sample", "timestep_vector"]

CONFIG = "model config"
LARGEST_SAMPLE = 1 << 24
"""Most values of one sample."""


class Family(ABC):
    """What dqtool must know of a network class.

    A denoising input is `x` `[N, C, H, W]`, a timestep and a dict of conditions, tensors whose first dimension is the
    sample. `sample` names the argument of the network's forward that holds `x`; the network is given the scheduler's
    timestep divided by `timestep_divisor`; `guidance` is what pipelines of this family guide with unless they are told
    otherwise (1: not at all), `traced_size` whether a trace of it holds for the height and width it was made with alone, as
    where positions become constants, `scheduler` the noise schedule of a network that comes without its pipeline (None: that of
    `models/sampling/sampler.py`).
    """

    name: ClassVar[str]
    class_name: str
    block_classes: ClassVar[tuple[str, ...]]
    sample: str = "sample"
    timestep_divisor: float = 1.0
    guidance: float = 1.0
    traced_size: bool = False
    scheduler: Mapping[str, Any] | None = None

    def build(self, config: Mapping[str, Any]) -> nn.Module:
        """Return the network with random weights, from a diffusers config.

        Raises:
            ArtifactError: the config is not one of this class, or diffusers refuses it.
        """
        cls = self.check(config)
        with bounded_parameters(), built(self.class_name, CONFIG):
            return apply_config_extras(cls.from_config(dict(config)), config)

    def check(self, config: Mapping[str, Any]) -> Any:
        """Check a config before anything is made by it; returns the diffusers class of the network.

        Raises:
            ArtifactError: names the key that is not what the class takes, or samples that are too large.
        """
        cls = diffusers_class(self.class_name, "ModelMixin", f"{CONFIG}, key _class_name")
        check_network_config(cls, config, CONFIG)
        with built(self.class_name, CONFIG):
            shape = self.sample_shape(config)
            self.tokens(config)
        if not all(isinstance(side, int) and side > 0 for side in shape) or prod(shape) > LARGEST_SAMPLE:
            raise ArtifactError(
                f"A sample of shape {list(shape)} is none, or has more than the {LARGEST_SAMPLE:,} values that dqtool takes",
                where=CONFIG,
            )
        return cls

    @abstractmethod
    def sample_shape(self, config: Mapping[str, Any]) -> tuple[int, ...]:
        """Shape of one sample, `(C, H, W)`."""

    def tokens(self, config: Mapping[str, Any]) -> int:
        """Image tokens of one sample, which some flow schedules are shifted by."""
        patch = int(config.get("patch_size") or 1)
        _, height, width = self.sample_shape(config)
        return (height // patch) * (width // patch)

    def conditions(self, config: Mapping[str, Any], batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Conditioning tensors for `batch` samples drawn at random, for networks that need some."""
        return {}

    def ask(self, config: Mapping[str, Any], request: Request, companions: Companions | None) -> Conditions:
        """Return the conditions that images are sampled under. Here: random ones, for lack of a text model or labels.

        Raises:
            UsageError: the network needs conditions and the request does not allow random ones, or guidance or prompts
                are asked for and this network knows none.
        """
        embed = self.embedder(config)
        if embed is None:
            return random_conditions(self.conditions, config, request)
        found = random_conditions(self.conditions, config, replace(request, guidance=None))
        return with_embedded(found, request.weight(self.default_guidance(config)), embed)

    def time(self, config: Mapping[str, Any]) -> NetworkTime:
        """What the network receives for a scheduler's timestep."""
        return NetworkTime(self.timestep_divisor, linear_sigmas=self.timestep_divisor != 1)

    def default_guidance(self, config: Mapping[str, Any]) -> float:
        """Guidance of this family's pipelines where the user and the model's card name none."""
        return self.guidance

    def complete(self, config: Mapping[str, Any], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Conditions beside the precomputed ones in `given`, `[K, ...]` each, that follow from config and shapes: sizes, masks."""
        return {}

    def channels_beside(self, config: Mapping[str, Any]) -> int:
        """How many of the sample's channels are no noisy image but a condition, `BESIDE`, behind it."""
        return 0

    def embeds_guidance(self, config: Mapping[str, Any]) -> bool:
        """Whether the network takes guidance as an input, so that its pipeline asks it once a step."""
        return False

    def embed_guidance(self, config: Mapping[str, Any], guidance: float, rows: int) -> dict[str, Tensor]:
        """The condition that tells such a network its guidance, `[rows, ...]`."""
        return {}

    def embedder(self, config: Mapping[str, Any]) -> Callable[[float, int], dict[str, Tensor]] | None:
        """`embed_guidance` as a function of guidance and rows; None for networks that don't take it."""
        return partial(self.embed_guidance, config) if self.embeds_guidance(config) else None

    def arguments(self, x: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]) -> dict[str, Any]:
        """Keyword arguments of the network's forward. `timestep` is a scalar or `[N]`, as the network is given it."""
        return {self.sample: x, "timestep": timestep, **conditions}

    def predict(self, model: nn.Module, x: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """The network's prediction: shaped like `x`, or with twice the channels where it learned its variance too, and
        on the network's device, wherever what it is given is."""
        return model(**to_device_of(model, self.arguments(x, timestep, conditions)), return_dict=False)[0]

    def example(self, config: Mapping[str, Any], batch: int = 1, seed: int = 0) -> dict[str, Any]:
        """Arguments for one forward on random input, to trace and to compare networks with."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(batch, *self.sample_shape(config), generator=generator)
        timestep = self.time(config).given(torch.randint(0, 1000, (batch,), generator=generator))
        return self.arguments(x, timestep, self.conditions(config, batch, generator))

    def prediction_row(self, config: Mapping[str, Any]) -> tuple[int, ...]:
        """The shape that holds one number for each channel the network returns, and broadcasts against one sample of it. Samples
        of fewer than three dimensions (tokens, whose number may change) have one number for all."""
        sample = self.sample_shape(config)
        if len(sample) < 3:
            return (1,) * len(sample)
        if self.channels_beside(config):
            return (sample[0] - self.channels_beside(config), *(1,) * (len(sample) - 1))
        learns_variance = config.get("out_channels") == 2 * config.get("in_channels", sample[0])
        return (sample[0] * (1 + learns_variance), *(1,) * (len(sample) - 1))

    def per_channel(self, values: Tensor, fill: float, config: Mapping[str, Any]) -> Tensor:
        """`values` `[T, C]`, one for each channel of a sample, as `[T, *prediction_row]`; `fill` for what the network returns
        beyond a sample's channels (a learned variance)."""
        row = self.prediction_row(config)
        if len(row) < 3:
            return values.mean(1).view(-1, *row)
        beyond = values.new_full((len(values), row[0] - values.shape[1]), fill)
        return torch.cat([values, beyond], 1).view(-1, *row)

    def graph(self, network: nn.Module, config: Mapping[str, Any]) -> NetworkGraph:
        """Return the structure of a network of this family, which may be on `meta`; it is recorded when it is first read."""
        return NetworkGraph(network, self.example(config), self.sample, block_classes=self.block_classes)

    def proof_config(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The config of the least work that runs every layer on every channel: what a comparison of weights needs."""
        return config

    def hints(self, companions: Companions) -> dict[str, Any]:
        """What the pipeline around the network knows of its inputs and its config does not say, as config entries."""
        return {}

    def tied_modules(self, config: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
        """Pairs (copy, original) of modules that the class builds several times though a model has one of them."""
        return ()


FAMILIES: dict[str, Family] = {}
"""Adapters by the diffusers class they serve."""


def register(cls: type[Family]) -> type[Family]:
    """Class decorator: make an adapter known."""
    FAMILIES[cls.class_name] = cls()
    return cls


def image_side(latent: tuple[int, ...], companions: Companions | None) -> list[int]:
    """Height and width of the image of a latent; 8 pixels a place without the pipeline's autoencoder."""
    if companions is None or companions.decoder_name is None:
        return [8 * side for side in latent[1:]]
    return list(companions.image_shape(latent)[1:])


def square_sample(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """`(C, H, W)` from `in_channels` and `sample_size`.

    Raises:
        ArtifactError: the config has no sample size.
    """
    size = config.get("sample_size")
    if size is None:
        raise ArtifactError(
            "The config does not say how large the network's samples are",
            where="model config, key sample_size",
            fix="Set sample_size, for example 32, in the config.json",
        )
    height, width = (size, size) if isinstance(size, int) else size
    return int(config["in_channels"]), height, width


def small_sample(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of a UNet with samples just large enough for its resolutions, where they are large: convolutions and
    attention run the same weights at every size."""
    size = config["sample_size"]
    least = max(16, 2 ** len(config["block_out_channels"]))
    large = min([size] if isinstance(size, int) else size) > 2 * least
    return {**config, "sample_size": least} if large else config


def timestep_vector(timestep: Tensor, x: Tensor) -> Tensor:
    """The timestep as `[N]`, for networks that take no scalar."""
    return torch.as_tensor(timestep).reshape(-1).expand(len(x))
