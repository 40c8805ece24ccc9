"""Fashion-MNIST's files, and a short training that is interrupted."""

from __future__ import annotations

import gzip
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from dqtool.errors import ArtifactError, EnvironmentFault
from dqtool.zoo import data, train_fashion


def write_idx(path: Path, values: torch.Tensor) -> None:
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(gzip.compress(bytes([0, 0, 8, values.dim()]) + sizes + values.numpy().tobytes()))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve images in place of 60,000, and six in place of 10,000."""
    monkeypatch.setattr(data, "SPLITS", (("train", "train", 12), ("held_out", "t10k", 6)))
    for _, stem, count in data.SPLITS:
        images = (torch.arange(count * 28 * 28) % 256).to(torch.uint8).reshape(count, 28, 28)
        write_idx(tmp_path / f"{stem}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{stem}-labels-idx1-ubyte.gz", (torch.arange(count) % 10).to(torch.uint8))
    return tmp_path


def test_images_have_a_black_border(folder: Path) -> None:
    images, labels = data.fashion(folder)["train"]
    assert images.shape == (12, 1, 32, 32)
    assert labels.tolist() == [*range(10), 0, 1]
    assert (images.min(), images.max()) == (-1, 1)
    border = torch.ones(32, 32, dtype=torch.bool)
    border[2:30, 2:30] = False
    assert (images[:, 0, border] == -1).all()
    assert images[0, 0, 2, 2:5].tolist() == pytest.approx([-1, 1 / 127.5 - 1, 2 / 127.5 - 1])


@pytest.mark.parametrize("count", [5, 7])
def test_files_of_another_size_are_refused(folder: Path, count: int) -> None:
    write_idx(folder / "t10k-labels-idx1-ubyte.gz", torch.zeros(count, dtype=torch.uint8))
    with pytest.raises(ArtifactError, match="t10k-labels"):
        data.fashion(folder)


def test_a_missing_data_set_names_its_package(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="apt-get install dataset-fashion-mnist"):
        data.fashion(tmp_path)


def test_an_interrupted_training_goes_on_to_the_same_weights(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    monkeypatch.setattr(train_fashion, "fashion", lambda: data.fashion(folder))
    monkeypatch.setattr(train_fashion, "UNET", {**train_fashion.UNET, "block_out_channels": (8, 8, 8)})
    monkeypatch.setattr("dqtool.zoo.fitting.SAVED_EVERY", 2)

    def train(name: str, state: str, stop: int | None = None) -> dict[str, torch.Tensor]:
        given = {"out": tmp_path / name, "state": tmp_path / state, "device": "cpu", "batch_size": 4, "lr": 1e-3}
        with monkeypatch.context() as patched:
            if stop is not None:
                real = train_fashion.Conditioned.forward
                calls = iter(range(stop))
                patched.setattr(train_fashion.Conditioned, "forward", lambda self, *a: (next(calls), real(self, *a))[1])
            train_fashion.train(Namespace(**given, iters=4, seed=0))
        return load_file(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors")

    whole = train("whole", "a.pt")
    with pytest.raises(StopIteration):
        train("parts", "b.pt", stop=3)
    parts = train("parts", "b.pt")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert not (tmp_path / "parts" / "vae").exists()
