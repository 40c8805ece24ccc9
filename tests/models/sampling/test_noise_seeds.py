"""Noise of images: a function of use, seed and index, and of nothing else."""

from __future__ import annotations

import torch

from dqtool.models.sampling.sampler import CALIBRATION, IMAGES, image_seeds, initial_noise


def test_calibration_and_evaluation_share_no_noise_for_any_pair_of_seeds() -> None:
    pairs = [(use, seed) for use in (CALIBRATION, IMAGES) for seed in (*range(40), 499, 500, 1000, 2**32 - 1)]
    seeds = [each for use, seed in pairs for each in image_seeds(range(200), seed, use)]
    both = set(seeds) | {each + 1 for each in seeds}
    assert len(both) == 2 * len(seeds)
    assert all(0 <= each < 2**63 for each in both)


def test_seeds_that_met_before_are_apart() -> None:
    """Seed 499 of calibration began 998,503 images before seed 0 of evaluation, when seeds were sums."""
    shape, index = (1, 8, 8), 500_000_000 - 499 * 1_000_003
    calibrated = initial_noise(shape, range(index, index + 1), 499, CALIBRATION)
    assert not torch.equal(calibrated, initial_noise(shape, range(1), 0, IMAGES))


def test_noise_does_not_depend_on_the_other_images() -> None:
    assert image_seeds(range(3, 5), 7) == image_seeds(range(5), 7)[3:]
