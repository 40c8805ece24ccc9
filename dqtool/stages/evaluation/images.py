"""Images from a network: its sampler, its conditions, and the decoder of its latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dqtool import distributed, report
from dqtool.artifacts import Artifact, CallCheckpoints, Checkpoints
from dqtool.artifacts.jsonvalues import ForeignConfig
from dqtool.artifacts.records import SamplingRecord
from dqtool.core.device import to_cpu
from dqtool.core.out_of_memory import with_smaller_batches
from dqtool.models.components.companions import Companions, companions_of_artifact, companions_of_source
from dqtool.models.conditions.conditioning import Conditions, Request
from dqtool.models.conditions.external import ConditionSource
from dqtool.models.families import family_of
from dqtool.models.networks.loading import network_of
from dqtool.models.sampling.sampler import Sampler
from dqtool.models.sampling.teacher_precision import precision_label
from dqtool.models.sources.resolve import ModelSource
from dqtool.stages.shared.artifact_models import conditions_of, sampler_of
from dqtool.training.tensor_store import TensorStore

__all__ = ["ImageMaker", "first_channels", "maker_of_artifact", "maker_of_source", "makes_latents"]

IN_MEMORY = 4 << 30
"""Bytes of images past which they go to a file."""


@dataclass
class ImageMaker:
    """Sampler, conditions and decoder that draw images from a network of one model. `decode` is None if the network makes
    images itself, or if the decoder is missing (`latents` is True then)."""

    sampler: Sampler
    conditions: Conditions
    shape: tuple[int, ...]
    decode: Callable[[Tensor], Tensor] | None = None
    latents: bool = False

    def draw(
        self,
        network: nn.Module,
        count: int,
        seed: int,
        batch_size: int,
        what: str,
        kept: Callable[[str], Checkpoints] | None = None,
    ) -> Tensor:
        """Return `count` images `[N, C, H, W]` in [-1, 1] (latents as they are); image i depends on `seed` and i alone.

        More than `IN_MEMORY` bytes of them (50,000 of 256 pixels are 39 GB) lie in a mapped temporary file. Where memory
        runs out, fewer are sampled together. `kept(name)` gives the batches that an earlier run finished, and takes in
        those of this one. Where several processes share a command, each of them samples `batch_size` images at a time, and
        the main one alone returns them; the others return an empty tensor.
        """
        return with_smaller_batches(
            lambda size: self._draw(
                network, count, seed, size, what, kept and kept(f"{what} by {size}{precision_label(network)}")
            ),
            batch_size,
            what,
        )

    def _draw(
        self, network: nn.Module, count: int, seed: int, batch_size: int, what: str, kept: Checkpoints | None
    ) -> Tensor:
        images, done = torch.empty(0), 0
        found = {} if kept is None else kept.found
        with report.progress(what, count, "image") as progress:

            def take(batch: Tensor) -> None:
                nonlocal images, done
                if distributed.is_main():
                    if not done:
                        images = TensorStore(IN_MEMORY).empty(count, batch)
                    images[done : done + len(batch)] = batch
                done += len(batch)

            for part in found.values():
                take(part["images"])
                progress.skip(len(part["images"]))
            running = self.sampler.batches(
                network,
                self.shape,
                count,
                seed,
                batch_size * distributed.world_size(),
                self.conditions.given,
                null=self.conditions.null,
                first=done,
                calls=None if kept is None else CallCheckpoints(kept.workspace, kept.name),
            )
            for index, x in enumerate(running, len(found)):
                batch = to_cpu(
                    x
                    if self.latents
                    else x.clamp(-1, 1)
                    if self.decode is None
                    else distributed.by_rows(self.decode, x, rows=len(x))
                )
                take(batch)
                if kept is not None:
                    kept.add(index, {"images": batch})
                progress.advance(len(batch))
        return images


def maker_of_artifact(
    artifact: Artifact,
    count: int,
    seed: int,
    steps: int | None = None,
    sampler: str | None = None,
    guidance: float | None = None,
    prompts: Sequence[str] | None = None,
    source: ConditionSource | None = None,
) -> ImageMaker:
    """Return the maker for the networks of an artifact, and for its reference; by default as it was calibrated. `source`
    gives the conditions that the artifact's own components don't make.

    Raises:
        UsageError: guidance, prompts or a sampler that this model knows nothing of, or nothing makes its conditions.
    """
    sampling = artifact.manifest.sampling
    if guidance is None and sampling is not None:
        guidance = sampling.guidance if sampling.embedded_guidance is None else sampling.embedded_guidance
    conditions = conditions_of(artifact, Request(count, seed, guidance, prompts), source)
    chosen = sampler_of(artifact, conditions, steps, sampler)
    return _maker(chosen, conditions, artifact.manifest.network.config, companions_of_artifact(artifact))


def maker_of_source(source: ModelSource, count: int, seed: int, steps: int) -> ImageMaker:
    """Return the maker of a full-precision model, with the settings of its pipeline."""
    family, companions = family_of(source.class_name, source.given), companions_of_source(source)
    config = {**source.config, **({} if companions is None else family.input_properties(companions))}
    request = Request(count, seed, card={} if companions is None else companions.card)
    conditions = family.make_conditions(config, request, companions)
    weight = family.default_image_guidance(config) if conditions.guided else None
    sampling = SamplingRecord(source.scheduler or family.scheduler or {}, steps, eta=0.0, image_guidance=weight)
    sampler = Sampler.calibrated(family, config, sampling, conditions.guidance)
    return _maker(sampler, conditions, config, companions)


def _maker(
    sampler: Sampler, conditions: Conditions, config: ForeignConfig, companions: Companions | None
) -> ImageMaker:
    shape = sampler.family.sample_shape(config)
    decode = None if companions is None else companions.decoder()
    return ImageMaker(sampler, conditions, shape, decode, latents=_are_latents(shape, companions))


def _are_latents(shape: tuple[int, ...], companions: Companions | None) -> bool:
    return (companions is None or companions.decoder_name is None) and shape[0] not in (1, 3)


def makes_latents(artifact: Artifact) -> bool:
    """Return whether the samples of an artifact's networks stay latents because the decoder is missing. Loads nothing."""
    family, config = network_of(artifact.manifest.network)
    return _are_latents(family.sample_shape(config), companions_of_artifact(artifact))


def first_channels(panels: Sequence[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Return the first channel of each (caption, latents `[N, C, H, W]`) for a picture, and warn."""
    report.warn("this model comes without its decoder: the picture shows the first channel of its latents")
    return [(caption, latents[:, :1]) for caption, latents in panels]
