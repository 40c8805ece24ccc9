"""Metrics by name: required files, the path from images to figures, and the reference."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import adm_reference as adm
import numpy as np
import pytest
import torch
from torch import Tensor

from dqtool import report
from dqtool.errors import ArtifactError, EnvironmentFault
from dqtool.metrics import METRICS, Files, available
from dqtool.metrics.batches import NpzImages
from dqtool.metrics.measuring import Meter
from dqtool.metrics.reference import Reference, save_statistics
from dqtool.metrics.registry import EXTRACTORS, ExtractorEntry, check_needs, option_flag, path_digest


def noise(count: int, seed: int, smooth: int) -> Tensor:
    """Images uint8 `[N, 24, 24, 3]` of noise, blurrier with `smooth`."""
    x = torch.rand(count, 3, 24, 24, generator=torch.Generator().manual_seed(seed))
    x = torch.nn.functional.avg_pool2d(x, smooth, 1, smooth // 2)[..., :24, :24]
    return (x * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def in_batches(images: Tensor, size: int) -> Iterator[tuple[Tensor, None]]:
    yield from ((part, None) for part in images.split(size))


def suite_file(path: Path, **arrays: np.ndarray) -> str:
    np.savez(path, **arrays)
    return str(path)


@pytest.fixture(scope="module")
def warnings() -> Iterator[list[str]]:
    found: list[str] = []
    patch = pytest.MonkeyPatch()
    patch.setattr(report, "warn", found.append)
    yield found
    patch.undo()


def test_images_to_figures_as_the_suite_takes_them(
    inception_weights: Path, tmp_path: Path, warnings: list[str]
) -> None:
    real, fake = noise(8, 1, 3), noise(7, 2, 5)
    reference = suite_file(tmp_path / "ref.npz", arr_0=real.numpy())
    meter = Meter(["fid", "is", "pr"], Files(inception_weights=str(inception_weights), ref_stats=reference))
    found = meter.measure(in_batches(fake, 4))

    model: Any = meter.extractors["inception"]
    with torch.no_grad():
        a, b = (model.model(images.permute(0, 3, 1, 2)) for images in (real, fake))
    pools = [x["pool_3"].double().numpy() for x in (a, b)]
    expected = adm.precision_recall(*pools)
    assert (found["precision"], found["recall"]) == pytest.approx(expected, rel=1e-4)
    assert found["is"] == pytest.approx(adm.inception_score(b["logits"].double().softmax(1).numpy()), rel=1e-4)
    # With fewer samples than features, the suite's root of a singular product is rough; the same number through the
    # samples' own products, tr (C1 C2)^½ being the nuclear norm of their cross product, is not.
    x, y = ((p - p.mean(0)) / (len(p) - 1) ** 0.5 for p in pools)
    cross = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    distance = ((pools[0].mean(0) - pools[1].mean(0)) ** 2).sum() + (x**2).sum() + (y**2).sum() - 2 * cross
    assert found["fid"] == pytest.approx(distance, rel=1e-4)
    assert set(found["extractors"]) == {"fid", "is", "is.std", "precision", "recall"}
    assert found["extractors"]["fid"] == {
        "name": "inception-2015-12-05",
        "file": "inception.pth",
        "sha256": path_digest(inception_weights),
    }
    assert any("fid of 7 images is biased" in text and "20480" in text for text in warnings)


class Features:
    """In place of the network: `pool_3` from the first pixels of an image, near each other and far from the origin."""

    weights_sha256 = "abc"

    def __call__(self, images: Tensor, _texts: list[str] | None = None) -> dict[str, Tensor]:
        flat = images.flatten(1)[:, :256].float() / 255 + 8
        return {"pool_3": flat, "mixed_6": flat[:, :2], "logits": flat}

    def describe(self) -> dict[str, str]:
        return {}


def test_precision_and_recall_are_of_the_suites_half_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    monkeypatch.setitem(EXTRACTORS, "inception", ExtractorEntry("inception_weights", lambda _path: Features()))
    real, fake = noise(140, 5, 3), noise(150, 6, 3)
    reference = suite_file(tmp_path / "ref.npz", arr_0=real.numpy())
    found = Meter(["pr"], Files(inception_weights="w", ref_stats=reference)).measure(in_batches(fake, 64))
    pools = [Features()(images)["pool_3"].numpy() for images in (real, fake)]
    half, full = adm.precision_recall(*pools, np.float16), adm.precision_recall(*pools, np.float64)
    assert (found["precision"], found["recall"]) == pytest.approx(half, rel=1e-4)
    for rounded, exact in zip(half, full, strict=True):
        assert abs(rounded - exact) > 0.01, "this would not tell one from the other"


def test_distance_to_the_images_of_the_reference_model(monkeypatch: pytest.MonkeyPatch, warnings: list[str]) -> None:
    monkeypatch.setitem(EXTRACTORS, "inception", ExtractorEntry("inception_weights", lambda _path: Features()))
    exact, fake = noise(300, 5, 3), noise(310, 6, 5)
    meter = Meter(["fid-reference"], Files(inception_weights="w"))
    assert meter.measure(in_batches(fake, 64)) == {"extractors": {}}, "there is nothing to compare with yet"
    assert meter.measure(in_batches(exact, 64), of_reference=True) == {"extractors": {}}
    found = meter.measure(in_batches(fake, 64))
    pools = [Features()(images)["pool_3"].double().numpy() for images in (fake, exact)]
    expected = adm.frechet_distance(*[s for pool in pools for s in (pool.mean(0), np.cov(pool, rowvar=False))])
    assert found["fid_from_reference"] == pytest.approx(expected, rel=1e-4)
    assert set(found["extractors"]) == {"fid_from_reference"}
    assert meter.measure(in_batches(exact, 50))["fid_from_reference"] == pytest.approx(0, abs=1e-5)
    assert any("fid-reference of 310 images is biased" in text for text in warnings)


class Folder:
    """Images in memory that read like a folder."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def read(self, batch_size: int) -> Iterator[Tensor]:
        yield from self.images.split(batch_size)


def fake_inception(images: Tensor) -> dict[str, Tensor]:
    """Three pixels, twice, in as many features as the network has."""
    flat = images.flatten(1).float()[:, :3]
    return {
        "pool_3": torch.nn.functional.pad(flat, (0, 2045)),
        "mixed_6": torch.nn.functional.pad(flat, (0, 2020)),
        "logits": flat,
    }


def test_statistics_are_in_the_suites_layout(tmp_path: Path) -> None:
    images = noise(70, 3, 1)
    path = tmp_path / "stats.npz"
    save_statistics(Folder(images), path, fake_inception, keep=10, about={"inception_sha256": "abc"})
    with np.load(path) as archive:
        assert set(archive) == {"arr_0", "mu", "sigma", "mu_s", "sigma_s", "dqtool"}
        pool = fake_inception(images)["pool_3"].double().numpy()
        np.testing.assert_allclose(archive["mu"], pool.mean(0), rtol=1e-9)
        np.testing.assert_allclose(archive["sigma"], np.cov(pool, rowvar=False), rtol=1e-9, atol=1e-9)
        assert archive["mu_s"].shape == (2023,)
        assert archive["sigma_s"].shape == (2023, 2023)
        np.testing.assert_array_equal(archive["arr_0"], images[::7].numpy())
    reference = Reference(path, fake_inception, "abc")
    mean, cov = reference.statistics("pool_3")  # over all 70, not the 10 that were kept
    np.testing.assert_allclose(mean.numpy(), pool.mean(0))
    assert cov.dtype == torch.float64
    assert len(reference.manifold.features) == 10
    assert len(NpzImages(path)) == 10


def test_what_the_file_lacks_is_computed_from_its_images(tmp_path: Path) -> None:
    images = noise(20, 4, 1)
    reference = Reference(suite_file(tmp_path / "r.npz", arr_0=images.numpy()), fake_inception)
    pool = fake_inception(images)["pool_3"].double().numpy()
    np.testing.assert_allclose(reference.statistics("pool_3")[0].numpy(), pool.mean(0))
    np.testing.assert_allclose(
        reference.statistics("mixed_6")[1].numpy(), np.cov(pool[:, :2023], rowvar=False), atol=1e-9
    )


def test_references_that_will_not_do(tmp_path: Path, warnings: list[str]) -> None:
    statistics = {"mu": np.zeros(2048), "sigma": np.eye(2048)}
    only = Reference(suite_file(tmp_path / "fid.npz", **statistics), fake_inception)
    assert only.statistics("pool_3")[1].shape == (2048, 2048)
    with pytest.raises(ArtifactError, match="no mu_s"):
        only.statistics("mixed_6")
    with pytest.raises(ArtifactError, match="statistics only"):
        only.check_images()
    wrong = Reference(suite_file(tmp_path / "w.npz", mu=np.zeros(64), sigma=np.eye(64)), fake_inception)
    with pytest.raises(ArtifactError, match=r"\[64\]"):
        wrong.statistics("pool_3")
    save_statistics(
        Folder(noise(4, 0, 1)), tmp_path / "s.npz", fake_inception, keep=0, about={"inception_sha256": "abc"}
    )
    assert not Reference(tmp_path / "s.npz", fake_inception, "abc").has_images
    assert not any("other Inception weights" in text for text in warnings)
    Reference(tmp_path / "s.npz", fake_inception, "def")
    assert any("other Inception weights" in text for text in warnings)


def test_each_metric_says_which_option_it_lacks() -> None:
    for name, metric in METRICS.items():
        for field in metric.files:
            others = {f: "x" for f in ("inception_weights", "clip", "aesthetic_weights", "ref_stats") if f != field}
            with pytest.raises(EnvironmentFault, match=option_flag(field)):
                check_needs([name], Files(**others))
    everything = Files("a", "b", "c", "d")
    with_files = tuple(name for name, metric in METRICS.items() if metric.files)
    check_needs(METRICS, everything)
    assert available(everything, prompts=True) == with_files
    assert available(everything, prompts=False) == tuple(name for name in with_files if name != "clip")
    assert available(Files(inception_weights="a"), prompts=False) == ("fid-reference", "is")
    assert available(Files(), prompts=True) == ()


def test_digest_of_a_directory_is_of_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a").write_text("1")
    first = path_digest(tmp_path)
    (tmp_path / ".cache").write_text("ignored")
    assert path_digest(tmp_path) == first
    (tmp_path / "sub" / "a").rename(tmp_path / "sub" / "b")
    assert path_digest(tmp_path) != first
