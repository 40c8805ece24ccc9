import math

import pytest
import torch

from dqtool.errors import UsageError
from dqtool.metrics.inception_score import RunningInceptionScore, inception_score


def test_bounds() -> None:
    sure = torch.nn.functional.one_hot(torch.arange(1000) % 10, 10) * 1000.0
    assert inception_score(sure) == pytest.approx((10, 0))
    assert inception_score(torch.zeros(1000, 10)) == pytest.approx((1, 0))
    assert inception_score(sure[:1].repeat(100, 1)) == pytest.approx((1, 0))


def test_definition_and_splits() -> None:
    logits = torch.randn(103, 10, generator=torch.Generator().manual_seed(0)) * 3
    p = logits.double().softmax(1)
    scores = []
    for part in p.tensor_split(4):
        scores.append(math.exp((part * (part.log() - part.mean(0).log())).sum(1).mean()))
    mean, deviation = inception_score(logits, splits=4)
    assert mean == pytest.approx(sum(scores) / 4)
    assert deviation == pytest.approx((sum((s - mean) ** 2 for s in scores) / 4) ** 0.5)


def test_too_few_samples() -> None:
    with pytest.raises(UsageError, match="9 samples"):
        inception_score(torch.zeros(9, 10))


@pytest.mark.parametrize(
    ("count", "warned"), [(201, True), (219, True), (220, False), (250, False), (200, False), (5, False)]
)
def test_a_last_part_of_few_images_is_warned_of(capsys: pytest.CaptureFixture, count: int, warned: bool) -> None:
    running = RunningInceptionScore(split_size=100)
    running.update(torch.zeros(count, 4))
    running.finish()
    assert ("a multiple of 100" in capsys.readouterr().err) is warned
