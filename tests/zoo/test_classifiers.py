"""Short trainings of the classifiers: the losses that they had when each had a loop of its own."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from dqtool.zoo import train_classifier, train_garment_classifier
from dqtool.zoo.data import digits


def garments() -> tuple[torch.Tensor, torch.Tensor]:
    """64 images of noise in place of Fashion-MNIST."""
    images = torch.rand(64, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return images, torch.arange(64) % 10


@pytest.mark.parametrize(
    ("module", "data", "losses"),
    [
        (train_classifier, "digits", (2.3035, 2.2663)),
        (train_garment_classifier, "fashion", (2.3268, 2.3051)),
    ],
)
def test_a_seed_gives_the_same_losses(
    module: ModuleType,
    data: str,
    losses: tuple[float, float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    images, labels = garments() if data == "fashion" else digits()["train"]
    monkeypatch.setattr(module, data, lambda: {"train": (images[:64], labels[:64])})
    threads = torch.get_num_threads()
    try:
        model = module.train(0, 2, batch_size=16)
    finally:
        torch.set_num_threads(threads)
    told = [float(line.split()[3]) for line in capsys.readouterr().err.splitlines()]
    assert told == pytest.approx(losses, abs=1e-3)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    hidden = model(images[:64])[0].double()
    torch.testing.assert_close(model.reference_mean, hidden.mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model.reference_cov, hidden.T.cov(), rtol=1e-3, atol=1e-6)
