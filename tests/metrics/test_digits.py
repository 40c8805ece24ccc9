import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dqtool.errors import ArtifactError, EnvironmentFault, UsageError
from dqtool.metrics.classifiers import CONFIDENT
from dqtool.metrics.digits import DIGITS
from dqtool.metrics.frechet import statistics


@pytest.fixture(scope="module")
def real() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    pytest.importorskip("sklearn")
    from dqtool.zoo.data import digits as dataset

    return dataset()


def test_held_out_digits_are_read(real: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    images, labels = real["held_out"]
    read, confidence = DIGITS.classify(images)
    assert (read == labels).double().mean() >= 0.98
    assert (confidence > CONFIDENT).double().mean() >= 0.95


def test_scores_of_real_digits(real: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    # Golden numbers of `python -m dqtool.zoo.train_classifier`; other CPUs round differently.
    result = DIGITS.evaluate(real["held_out"][0])
    labels, confidence = DIGITS.classify(real["held_out"][0])
    assert result["fd.digits"] == pytest.approx(2.84, abs=0.03)
    assert result["is.digits"] == pytest.approx(8.81, abs=0.03)
    assert result["confident_share"] == pytest.approx(0.982, abs=0.005)
    assert result["samples"] == 450
    assert labels.shape == confidence.shape == (450,)


def test_the_reference_is_that_of_the_training_digits(real: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    mean, cov = statistics(DIGITS.features(real["train"][0])[0])
    torch.testing.assert_close(mean, DIGITS.load().reference_mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cov, DIGITS.load().reference_cov, rtol=1e-3, atol=1e-3)
    assert DIGITS.load().reference_cov.dtype == torch.float64


def test_garbage_is_not_read_with_confidence() -> None:
    torch.manual_seed(0)
    noise = torch.randn(500, 1, 16, 16).clamp(-1, 1)
    blank = torch.full((500, 1, 16, 16), -1.0) + 0.05 * torch.rand(500, 1, 16, 16)
    for garbage in (noise, blank):
        result = DIGITS.evaluate(garbage)
        assert result["confident_share"] < 0.02
        assert result["fd.digits"] > 100


def test_distance_between_two_sets_is_of_what_differs_alone(real: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    images = real["held_out"][0]
    assert DIGITS.distance(images, images) == pytest.approx(0, abs=1e-6)
    a, b = images[:225], images[225:]
    apart = DIGITS.distance(a, b)
    assert apart == pytest.approx(DIGITS.distance(b, a), rel=1e-6)
    softened = 0.99 * images
    assert 0 < DIGITS.distance(softened, images) < apart / 10, "what both sets share of chance is in neither"


def test_results_do_not_depend_on_the_batch_size() -> None:
    images = torch.rand(20, 1, 16, 16) * 2 - 1
    labels, confidence = DIGITS.classify(images)
    again, other = DIGITS.classify(images, batch_size=7)
    assert torch.equal(labels, again)
    torch.testing.assert_close(confidence, other, rtol=1e-4, atol=1e-5)


def test_other_sizes_are_resized_and_other_channels_refused() -> None:
    assert DIGITS.features(torch.rand(3, 1, 32, 32))[0].shape == (3, 32)
    for shape in ((3, 3, 16, 16), (3, 16, 16), (0, 1, 16, 16)):
        with pytest.raises(UsageError, match="digit metrics"):
            DIGITS.features(torch.zeros(shape))


def test_reports_name_the_extractor() -> None:
    described = DIGITS.describe()
    assert described["name"] == "digits-classifier"
    assert described["sha256"] == hashlib.sha256(DIGITS.weights.read_bytes()).hexdigest()


def test_missing_and_damaged_weights(tmp_path: Path) -> None:
    moved = replace(DIGITS, weights=tmp_path / "weights.safetensors")
    with pytest.raises(EnvironmentFault, match="missing"):
        moved.load()
    (tmp_path / "weights.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0nonsense")
    with pytest.raises(ArtifactError, match="damaged"):
        moved.load()
