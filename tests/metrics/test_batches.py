"""Folders of images and npz files in the ADM suite's layout."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dqtool.artifacts.npz import npz_arrays, npz_names
from dqtool.errors import ArtifactError, EnvironmentFault, UsageError
from dqtool.metrics.batches import ImageFolder, NpzImages, write_npz

IMAGES = torch.randint(0, 256, (7, 6, 5, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def pictures(root: Path, sizes: list[tuple[int, int]]) -> Path:
    root.mkdir(exist_ok=True)
    for number, size in enumerate(sizes):
        noise = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / f"{number:03}.png")
    return root


def test_a_file_of_ours_is_one_of_the_suite(tmp_path: Path) -> None:
    path = tmp_path / "out.npz"
    mu = np.arange(4.0)
    write_npz(path, (7, IMAGES.split(3)), {"mu": mu}, {"seed": 1})
    with np.load(path) as archive:  # read like the suite
        assert archive["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(archive["arr_0"], IMAGES.numpy())
        np.testing.assert_array_equal(archive["mu"], mu)
        assert json.loads(str(archive["dqtool"])) == {"seed": 1}
    assert npz_names(path) == ["arr_0", "mu", "dqtool"]
    before = path.read_bytes()
    write_npz(path, (7, IMAGES.split(2)), {"mu": mu}, {"seed": 1})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("compress", [False, True])
def test_a_file_of_the_suite_is_read_in_batches(tmp_path: Path, compress: bool) -> None:
    path = tmp_path / "in.npz"
    (np.savez_compressed if compress else np.savez)(path, IMAGES.numpy(), np.arange(7))
    images = NpzImages(path)
    assert len(images) == 7
    parts = list(images.read(3))
    assert [len(part) for part in parts] == [3, 3, 1]
    assert torch.equal(torch.cat(parts), IMAGES)
    assert torch.equal(torch.cat(list(images.read(100))), IMAGES)


def test_grey_becomes_three_channels(tmp_path: Path) -> None:
    write_npz(tmp_path / "g.npz", (7, [IMAGES[..., :1]]), {}, {})
    with np.load(tmp_path / "g.npz") as archive:
        assert archive["arr_0"].shape == (7, 6, 5, 3)
        np.testing.assert_array_equal(archive["arr_0"][..., 2], IMAGES[..., 0].numpy())


def test_files_that_are_something_else(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault):
        NpzImages(tmp_path / "missing.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(ArtifactError, match="no npz"):
        NpzImages(tmp_path / "text.npz")
    np.savez(tmp_path / "mu.npz", mu=np.zeros(3))
    with pytest.raises(ArtifactError, match="no images"):
        NpzImages(tmp_path / "mu.npz")
    with pytest.raises(ArtifactError, match="no sigma, only mu"):
        npz_arrays(tmp_path / "mu.npz", ["mu", "sigma"])
    for bad in (np.zeros((2, 3, 3, 3)), np.zeros((2, 3, 3, 4), np.uint8), np.zeros((0, 3, 3, 3), np.uint8)):
        np.savez(tmp_path / "bad.npz", bad)
        with pytest.raises(ArtifactError, match="should be uint8"):
            NpzImages(tmp_path / "bad.npz")
    np.savez(tmp_path / "pickle.npz", mu=np.array([{}], dtype=object))
    with pytest.raises(ArtifactError):
        npz_arrays(tmp_path / "pickle.npz", ["mu"])
    with zipfile.ZipFile(tmp_path / "short.npz", "w") as archive:
        np.savez(tmp_path / "whole.npz", IMAGES.numpy())
        with zipfile.ZipFile(tmp_path / "whole.npz") as whole:
            archive.writestr("arr_0.npy", whole.read("arr_0.npy")[:-50])
    with pytest.raises(ArtifactError, match="middle of arr_0"):
        list(NpzImages(tmp_path / "short.npz").read(100))


def test_what_can_not_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault):
        write_npz(tmp_path / "no" / "x.npz", None, {}, {})

    def fails():
        yield IMAGES
        raise ArtifactError("broken image")

    with pytest.raises(ArtifactError):
        write_npz(tmp_path / "x.npz", (14, fails()), {}, {})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_read_in_order_of_names(tmp_path: Path) -> None:
    root = pictures(tmp_path / "images", [(8, 8)] * 5)
    (root / "b").mkdir()
    Image.new("L", (8, 8), 77).save(root / "b" / "z.JPG", format="jpeg")
    (root / "notes.txt").write_text("no image")
    images = ImageFolder(root)
    assert len(images) == 6
    whole = torch.cat(list(images.read(4)))
    assert whole.shape == (6, 8, 8, 3)
    assert torch.equal(whole[1], torch.from_numpy(np.array(Image.open(root / "001.png"))))
    assert (whole[5] == 77).all()


def test_sizes_that_differ_need_a_choice(tmp_path: Path) -> None:
    root = pictures(tmp_path / "images", [(40, 30), (64, 64)])
    with pytest.raises(UsageError, match="40x30 and 64x64") as caught:
        list(ImageFolder(root).read(8))
    assert "--image-size" in str(caught.value)
    assert torch.cat(list(ImageFolder(root, 16).read(8))).shape == (2, 16, 16, 3)


def test_folders_that_will_not_do(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault):
        ImageFolder(tmp_path / "missing")
    with pytest.raises(ArtifactError, match="no images"):
        ImageFolder(tmp_path)
    root = pictures(tmp_path / "images", [(8, 8)])
    (root / "broken.png").write_bytes((root / "000.png").read_bytes()[:60])
    with pytest.raises(ArtifactError, match=r"broken\.png"):
        list(ImageFolder(root).read(8))


@pytest.mark.parametrize("name", ["native.png", "native.tif", "big.tif", "wide.tif"])
def test_grey_of_16_bits_is_brought_to_8(tmp_path: Path, name: str) -> None:
    values = np.array([[0, 128, 129], [257, 32768, 65535]])
    dtype = {"big.tif": ">u2", "wide.tif": "<i4"}.get(name, "<u2")
    Image.fromarray(values.astype(dtype)).save(tmp_path / name)
    with Image.open(tmp_path / name) as image:
        assert image.mode.startswith("I")
    whole = torch.cat(list(ImageFolder(tmp_path).read(1)))
    assert whole.shape == (1, 2, 3, 3)
    for channel in range(3):
        assert whole[0, ..., channel].tolist() == [[0, 0, 1], [1, 128, 255]]


@pytest.mark.parametrize("values", [np.full((2, 2), 0.5, "<f4"), np.full((2, 2), 1 << 16), np.full((2, 2), -1)])
def test_pixels_of_32_bits_are_refused(tmp_path: Path, values: np.ndarray) -> None:
    Image.fromarray(values if values.dtype.kind == "f" else values.astype("<i4")).save(tmp_path / "deep.tif")
    with pytest.raises(ArtifactError, match="32-bit") as caught:
        list(ImageFolder(tmp_path).read(1))
    assert "deep.tif" in str(caught.value)


def test_an_image_of_too_many_pixels_or_another_format_is_refused(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("1", (8000, 6000)).save(tmp_path / "a.png")
    with pytest.raises(ArtifactError, match="48,000,000 pixels"):
        list(ImageFolder(tmp_path).read(1))
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n")
    with pytest.raises(ArtifactError, match="can't be read"):
        list(ImageFolder(tmp_path).read(1))
