"""The full-precision model's trajectory: how many points of each step are kept, and the points themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dqtool import report
from dqtool.artifacts import CallCheckpoints, Checkpoints, Workspace
from dqtool.core.device import to_cpu
from dqtool.core.draws import DrawInput, draw_method
from dqtool.distributed import gather_rows, row_counts, world_size
from dqtool.errors import NumericError
from dqtool.models.conditions.conditioning import Conditions
from dqtool.models.sampling.sampler import CALIBRATION, Sampler, image_seeds, initial_noise
from dqtool.models.sampling.teacher_precision import precision_label
from dqtool.nn.steps import look_up
from dqtool.stages.options.calibrate import CalibrateOptions

__all__ = ["STATISTICS_SAMPLES", "TrajectoryRecorder"]

SKIPPED = (0.2, 0.4, 0.6, 0.8)
"""Shares of the steps that trajectories from images leave out: one minus the strength of img2img."""

STATISTICS_SAMPLES = 64
"""Samples of a step that its histograms are made of. Each brings thousands of values per layer, and more change nothing."""


@dataclass(frozen=True)
class TrajectoryRecorder:
    """Records what `network` sees while `sampler` makes images of `shape`, at `timesteps` `[T]`.

    With `starts`, samples `[N, C, H, W]` of real images, half as many trajectories more begin at these, with noise.
    """

    network: nn.Module
    shape: tuple[int, ...]
    sampler: Sampler
    timesteps: Tensor
    options: CalibrateOptions
    generator: torch.Generator
    starts: Tensor | None = None

    def quotas(self, conditions: Conditions, blocks: Sequence[str]) -> Tensor:
        """Return the number of points of each step to keep, `[T]`.

        A draw that looks at features gets those of one batch of images, from the middle one of `blocks` (in execution order;
        the UNets' own middle where there is one).
        """
        draw, options = draw_method(self.options.draw), self.options
        steps = len(self.timesteps)
        if not draw.needs_features:
            return draw.function(DrawInput(steps, options.samples, self.generator))
        middle = next((name for name in blocks if name.startswith("mid_block")), blocks[len(blocks) // 2])
        latest: list[Tensor] = []
        found: dict[int, Tensor] = {}

        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            latest[:] = [output if isinstance(output, torch.Tensor) else output[0]]

        def see(x: Tensor, timestep: Tensor, _prediction: Tensor) -> None:
            seen = latest[0].detach().float()
            if len(seen) < len(x):  # this process ran its own part
                seen = gather_rows(seen, row_counts(len(x)))
            found.setdefault(self._row_of(timestep), to_cpu(seen.clone()))

        images = min(options.batch_size, options.samples)
        handle = self.network.get_submodule(middle).register_forward_hook(keep)
        try:
            for _ in self._batches(images, images, conditions.evenly(images), see):
                pass
        finally:
            handle.remove()
        features = torch.stack([found[row] for row in range(steps)])
        return draw.function(DrawInput(steps, options.samples, self.generator, features))

    def images(self, quotas: Tensor, conditions: Conditions) -> int:
        """Return the number of images to sample. With guidance, a step of one image makes two points or three."""
        return -(-int(quotas.max()) // self.sampler.inputs_per_image(conditions.guided))

    def record(
        self, conditions: Conditions, quotas: Tensor, workspace: Workspace
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Sample images and return `quotas[t]` points of every step, taken at random, and the points for statistics.

        With guidance every input of a call counts: the network is asked without and with the condition. Points for statistics are
        the same where every step keeps equally many, else up to `STATISTICS_SAMPLES` of every step. `conditions` are those
        of `images` images.

        Each holds `trajectory.x` `[N, C, H, W]` and `trajectory.rows` `[N]` (row of the step in `timesteps`), ordered by
        step; for a conditional network also one table `condition.NAME` `[K, ...]` for each condition, and
        `trajectory.subjects` `[N]`, the row of each sample in them. Finished batches of images go to `workspace`. Where
        several processes share a command, each of them samples a batch at a time, and all of them return the same.

        Raises:
            NumericError: the model's own samples are not finite.
        """
        steps, halves = len(self.timesteps), self.sampler.inputs_per_image(conditions.guided)
        images, batch_size = self.images(quotas, conditions), self.options.batch_size
        pools: list[list[Tensor]] = [[] for _ in range(steps)]
        owners: list[list[Tensor]] = [[] for _ in range(steps)]
        precision = precision_label(self.network)
        kept = Checkpoints(workspace, f"trajectory by {batch_size}{precision}")
        together, sampled = batch_size * world_size(), 0
        finished = sum(_images_in(found) for found in kept.found.values())
        batches = len(kept.found) + -(-(images - finished) // together)
        begun = self._parts_from_images(images)
        total = batches * steps + sum(steps - skipped for _part, skipped in begun)
        with report.progress("calibrate: trajectory", total) as progress:
            seen: list[tuple[int, Tensor]] = []

            def see(x: Tensor, timestep: Tensor, _prediction: Tensor) -> None:
                # [n, halves, ...]: a point's inputs beside each other.
                seen.append((self._row_of(timestep), to_cpu(torch.stack(x.chunk(halves), 1))))
                progress.advance()

            def pool(points: Iterable[tuple[int, Tensor]]) -> None:
                nonlocal sampled
                count = 0
                for row, x in points:
                    pools[row].append(x)
                    owners[row].append(torch.arange(sampled, sampled + len(x)))
                    count = len(x)
                sampled += count

            def take(kept: Checkpoints, run: Callable[[CallCheckpoints], Iterator[Tensor]]) -> None:
                for found in kept.found.values():
                    pool([(int(name.split()[1]), x) for name, x in sorted(found.items())])
                    progress.skip(len(found))
                for index, batch in enumerate(run(CallCheckpoints(workspace, kept.name)), len(kept.found)):
                    if not bool(torch.isfinite(batch).all()):
                        raise NumericError(
                            "The full-precision model's own samples are not finite",
                            where="calibrate",
                            fix="Check the model's scheduler config and the sampler",
                        )
                    pool(seen)
                    kept.add(index, {f"{call:05d} {row}": x for call, (row, x) in enumerate(seen)})
                    seen.clear()

            take(kept, lambda calls: self._batches(images, together, conditions, see, sampled, calls))
            kept = Checkpoints(workspace, f"trajectory from images by {batch_size}{precision}")
            take(kept, partial(self._from_images, begun[len(kept.found) :], conditions, see))

        def taken(wanted: Sequence[int]) -> dict[str, Tensor]:
            xs, rows, asked = [], [], []
            for row, quota in enumerate(wanted):
                points = torch.cat(pools[row])
                chosen = torch.randperm(len(points), generator=self.generator)[: -(-quota // halves)].sort().values
                xs.append(points[chosen].flatten(0, 1)[:quota])
                subjects = conditions.rows(0, sampled)[torch.cat(owners[row])[chosen]]
                if conditions.guided:
                    null = torch.full_like(subjects, len(conditions) - 1)
                    subjects = torch.stack([*[null] * (halves - 1), subjects], 1).flatten()
                asked.append(subjects[:quota])
                rows.append(torch.full((quota,), row))
            found = {"trajectory.x": torch.cat(xs), "trajectory.rows": torch.cat(rows)}
            if conditions.table:
                found["trajectory.subjects"] = torch.cat(asked)
                found |= {f"condition.{name}": values for name, values in conditions.table.items()}
            return found

        points = taken(quotas.tolist())
        if int(quotas.max()) - int(quotas.min()) <= 1:
            return points, points
        return points, taken([min(STATISTICS_SAMPLES, images * halves)] * steps)

    def _parts_from_images(self, first: int) -> list[tuple[range, int]]:
        """Return the batches of samples that begin at noised images, and the number of steps that each leaves out.

        A batch is a range of indices, which begin at `first`.

        A quarter of the samples leaves out a fifth of the steps, the next two, three and four fifths.
        """
        if self.starts is None or len(self.timesteps) == 1:
            return []
        count, steps = -(-first // 2), len(self.timesteps)
        return [
            (range(int(batch[0]), int(batch[-1]) + 1), min(max(1, round(steps * share)), steps - 1))
            for share, indices in zip(SKIPPED, torch.arange(first, first + count).chunk(len(SKIPPED)), strict=False)
            for batch in indices.split(self.options.batch_size)
        ]

    def _from_images(
        self,
        parts: Sequence[tuple[range, int]],
        conditions: Conditions,
        see: Callable[[Tensor, Tensor, Tensor], None],
        calls: CallCheckpoints,
    ) -> Iterator[Tensor]:
        """Yield the samples of each of `parts`, see `_parts_from_images` and `_batches`."""
        for chosen, skipped in parts:
            assert self.starts is not None
            calls.begin(chosen.start)
            yield self.sampler.run(
                self.network,
                initial_noise(self.shape, chosen, self.options.seed, CALIBRATION),
                conditions.given(chosen.start, chosen.stop),
                image_seeds(chosen, self.options.seed, CALIBRATION),
                see,
                conditions.null,
                calls,
                self.starts[torch.tensor(chosen) % len(self.starts)],
                skipped,
            )

    def _batches(
        self,
        images: int,
        batch_size: int,
        conditions: Conditions,
        see: Callable[[Tensor, Tensor, Tensor], None],
        first: int = 0,
        calls: CallCheckpoints | None = None,
    ) -> Iterator[Tensor]:
        """Yield sampled images batch by batch, from the image `first` on. `see` is called with what the network sees."""
        return self.sampler.batches(
            self.network,
            self.shape,
            images,
            self.options.seed,
            batch_size,
            conditions.given,
            see,
            CALIBRATION,
            conditions.null,
            first,
            calls,
        )

    def _row_of(self, timestep: Tensor) -> int:
        """Return the row of `timestep` in the sampler's own table.

        Raises:
            NumericError: the sampler asks for a timestep that its table lacks.
        """
        row, missed = look_up(timestep.detach().reshape(1).cpu(), self.timesteps)
        if bool(missed):
            raise NumericError(
                f"The sampler asks for timestep {float(timestep):g}, which is not in its list",
                where="calibrate",
                fix="Choose another --sampler",
            )
        return int(row)


def _images_in(found: Mapping[str, Tensor]) -> int:
    """Return the number of images of a finished batch."""
    return len(next(iter(found.values())))
