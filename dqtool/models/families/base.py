"""The interface of adapters, and the table of all adapters."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from dqtool.artifacts.jsonvalues import ForeignConfig
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
"""Largest number of values of one sample."""


class Family(ABC):
    """Adapter for a network class.

    A denoising input is `x` `[N, C, H, W]`, a timestep and a dict of conditions, tensors whose first dimension is the
    sample.

    Attributes:
        sample: argument of the network's forward that holds `x`.
        timestep: argument of the forward that holds the time.
        timestep_divisor: the network receives the scheduler's timestep divided by this number.
        guidance: default weight of classifier-free guidance of the family's pipelines (1: none).
        traced_size: a trace holds only for its own height and width, as where positions become constants.
        scheduler: noise schedule of a network without a pipeline (None: the one of `models/sampling/schedulers.py`).
    """

    name: ClassVar[str]
    class_name: str
    block_classes: ClassVar[tuple[str, ...]]
    sample: str = "sample"
    timestep: str = "timestep"
    timestep_divisor: float = 1.0
    guidance: float = 1.0
    traced_size: bool = False
    scheduler: ClassVar[ForeignConfig | None] = None

    def build(self, config: ForeignConfig) -> nn.Module:
        """Return the network with random weights, from a diffusers config.

        Raises:
            ArtifactError: the config is invalid for the class, or diffusers refuses it.
        """
        cls = self.check(config)
        with bounded_parameters(), built(self.class_name, CONFIG):
            return apply_config_extras(cls.from_config(dict(config)), config)

    def check(self, config: ForeignConfig) -> Any:
        """Check a config and return the diffusers class of the network.

        Raises:
            ArtifactError: a value is invalid for the class (the message names its key), or samples are too large.
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

    def sample_shape(self, config: ForeignConfig) -> tuple[int, ...]:
        """Return the shape of one sample, `(C, H, W)`: by default from `in_channels` and `sample_size`."""
        return square_sample(config)

    def tokens(self, config: ForeignConfig) -> int:
        """Return the number of image tokens of one sample, by which some flow schedules are shifted."""
        patch = int(config.get("patch_size") or 1)
        _, height, width = self.sample_shape(config)
        return (height // patch) * (width // patch)

    def conditions(self, config: ForeignConfig, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Return random conditions for `batch` samples; empty for an unconditional network."""
        return {}

    def make_conditions(self, config: ForeignConfig, request: Request, companions: Companions | None) -> Conditions:
        """Return the conditions under which images are sampled. The default is random ones, for lack of text or labels.

        Raises:
            UsageError: the network needs conditions and the request does not allow random ones, or the request has
                guidance or prompts, which this network does not support.
        """
        embed = self.embedder(config)
        if embed is None:
            return random_conditions(self.conditions, config, request)
        found = random_conditions(self.conditions, config, replace(request, guidance=None))
        return with_embedded(found, request.weight(self.default_guidance(config)), embed)

    def time(self, config: ForeignConfig) -> NetworkTime:
        """Return the conversion of the scheduler's timestep to the value that the network receives."""
        return NetworkTime(self.timestep_divisor, linear_sigmas=self.timestep_divisor != 1)

    def default_guidance(self, config: ForeignConfig) -> float:
        """Return the guidance to use where the user and the model's card name none."""
        return self.guidance

    def complete(self, config: ForeignConfig, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the conditions that follow from config and shapes (sizes, masks), for `given` ones `[K, ...]` each."""
        return {}

    def condition_channels(self, config: ForeignConfig) -> int:
        """Return the number of the input's channels that hold `IMAGE_CONDITION` instead of the noisy image."""
        return 0

    def default_image_guidance(self, config: ForeignConfig) -> float | None:
        """Return the weight of guidance towards an image, for networks that edit images; None for others."""
        return None

    def embeds_guidance(self, config: ForeignConfig) -> bool:
        """Return whether the network takes guidance as an input, so that its pipeline calls it once per step."""
        return False

    def embed_guidance(self, config: ForeignConfig, guidance: float, rows: int) -> dict[str, Tensor]:
        """Return the condition that holds the guidance of such a network, `[rows, ...]`."""
        return {}

    def embedder(self, config: ForeignConfig) -> Callable[[float, int], dict[str, Tensor]] | None:
        """Return `embed_guidance` as a function of guidance and rows; None for networks without a guidance input."""
        return partial(self.embed_guidance, config) if self.embeds_guidance(config) else None

    def arguments(self, x: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the keyword arguments of the network's forward. `timestep`, a scalar or `[N]`, is the network's, not the scheduler's."""
        return {self.sample: x, "timestep": timestep, **conditions}

    def predict(self, model: nn.Module, x: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """Return the network's prediction, shaped like `x` or with twice the channels for a learned variance.

        Inputs may be on any device; the prediction is on the network's.
        """
        result: Tensor = model(**to_device_of(model, self.arguments(x, timestep, conditions)), return_dict=False)[0]
        return result

    def example(self, config: ForeignConfig, batch: int = 1, seed: int = 0) -> dict[str, Any]:
        """Return the arguments of one forward on random input, for tracing and comparing networks."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(batch, *self.sample_shape(config), generator=generator)
        timestep = self.time(config).given(torch.randint(0, 1000, (batch,), generator=generator))
        return self.arguments(x, timestep, self.conditions(config, batch, generator))

    def prediction_row(self, config: ForeignConfig) -> tuple[int, ...]:
        """Return the shape that holds one number per output channel and broadcasts against one output sample.

        Samples of fewer than three dimensions (tokens, whose number may change) have one number for all.
        """
        sample = self.sample_shape(config)
        if len(sample) < 3:
            return (1,) * len(sample)
        if self.condition_channels(config):
            return (sample[0] - self.condition_channels(config), *(1,) * (len(sample) - 1))
        learns_variance = config.get("out_channels") == 2 * config.get("in_channels", sample[0])
        learns_variance = learns_variance or bool(config.get("learn_sigma"))  # HunyuanDiT and Lumina
        return (sample[0] * (1 + learns_variance), *(1,) * (len(sample) - 1))

    def per_channel(self, values: Tensor, fill: float, config: ForeignConfig) -> Tensor:
        """Return `values` `[T, C]`, one per channel of a sample, as `[T, *prediction_row]`.

        Output channels beyond those of a sample (a learned variance) get the value `fill`.
        """
        row = self.prediction_row(config)
        if len(row) < 3:
            return values.mean(1).view(-1, *row)
        beyond = values.new_full((len(values), row[0] - values.shape[1]), fill)
        return torch.cat([values, beyond], 1).view(-1, *row)

    def graph(self, network: nn.Module, config: ForeignConfig) -> NetworkGraph:
        """Return the graph of a network of this family, which may be on `meta`; it is recorded on first use."""
        return NetworkGraph(network, self.example(config), self.sample, self.timestep, self.block_classes)

    def proof_config(self, config: ForeignConfig) -> ForeignConfig:
        """Return the cheapest config that runs every layer on every channel, for comparisons of weights."""
        return config

    def input_properties(self, companions: Companions) -> ForeignConfig:
        """Return config entries for properties of the inputs that only the surrounding pipeline defines."""
        return {}

    def tied_modules(self, config: ForeignConfig) -> Sequence[tuple[str, str]]:
        """Return pairs (copy, original) of names of modules that the class builds several times though the model has one."""
        return ()


FAMILIES: dict[str, Family] = {}
"""Adapters by the diffusers class they serve."""


def register(cls: type[Family]) -> type[Family]:
    """Add an adapter to `FAMILIES`. A class decorator."""
    FAMILIES[cls.class_name] = cls()
    return cls


def image_side(latent: tuple[int, ...], companions: Companions | None) -> list[int]:
    """Return height and width of the image of a latent; 8 pixels per latent where there is no autoencoder."""
    if companions is None or companions.decoder_name is None:
        return [8 * side for side in latent[1:]]
    return list(companions.image_shape(latent)[1:])


def square_sample(config: ForeignConfig) -> tuple[int, int, int]:
    """Return `(C, H, W)` from the config's `in_channels` and `sample_size`.

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


def small_sample(config: ForeignConfig) -> ForeignConfig:
    """Return a UNet's config with large samples reduced to the smallest size that all its resolutions need.

    Convolutions and attention use the same weights at every size.
    """
    size = config["sample_size"]
    least = max(16, 2 ** len(config["block_out_channels"]))
    large = min([size] if isinstance(size, int) else size) > 2 * least
    return {**config, "sample_size": least} if large else config


def timestep_vector(timestep: Tensor, x: Tensor) -> Tensor:
    """Return the timestep as `[N]`, for networks that take no scalar."""
    return torch.as_tensor(timestep).reshape(-1).expand(len(x))
