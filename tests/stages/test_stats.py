"""`dqtool stats`: reference statistics from a folder, cached, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import Run
from helpers import load_json, refused
from PIL import Image


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for number in range(5):
        noise = np.random.default_rng(number).integers(0, 256, (20, 24 + number % 2, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "images" / f"{number}.png")
    return tmp_path


def test_statistics_of_a_folder(run: Run, work: Path, inception_weights: Path) -> None:
    command = [
        "stats",
        "images",
        "--inception-weights",
        str(inception_weights),
        "--image-size",
        "16",
        "--keep-images",
        "3",
    ]
    plan = run(*command, "--dry-run", "--json", cwd=work)
    assert load_json(plan.stdout)["work"] == {"images": 5}
    assert not (work / "stats.npz").exists()
    result = run(*command, cwd=work)
    assert (result.returncode, result.stdout) == (0, "stats.npz\n"), result.stderr
    with np.load(work / "stats.npz") as archive:
        assert archive["arr_0"].shape == (3, 16, 16, 3)
        assert archive["sigma"].shape == (2048, 2048)
        assert archive["sigma"].std() > 0
    before = (work / "stats.npz").stat().st_mtime_ns
    again = run(*command, cwd=work)
    assert "cached" in again.stderr
    assert (work / "stats.npz").stat().st_mtime_ns == before
    (work / "images" / "0.png").unlink()
    changed = run(*command, cwd=work)
    assert "from 4 images" in changed.stderr


def test_what_it_refuses(run: Run, work: Path, inception_weights: Path) -> None:
    weights = ["--inception-weights", str(inception_weights)]
    assert "--inception-weights" in refused(run, work, 4, "stats", "images")
    assert "missing" in refused(run, work, 4, "stats", "missing", *weights)
    assert "no such file" in refused(run, work, 4, "stats", "images", "--inception-weights", "missing.pth")
    assert "--image-size" in refused(run, work, 2, "stats", "images", *weights)
    assert "--image-size" in refused(run, work, 2, "stats", "images", *weights, "--image-size", "0")
    (work / "weights.pth").write_text("no weights")
    assert "weights.pth" in refused(
        run, work, 3, "stats", "images", "--image-size", "16", "--inception-weights", "weights.pth"
    )
    assert "does not exist" in refused(run, work, 4, "stats", "images", *weights, "-o", "no/stats.npz")
    np.savez(work / "x.npz", mu=np.zeros(3))
    assert "arr_0" in refused(run, work, 3, "stats", "x.npz", *weights)
    assert "overwrite its own input" in refused(
        run, work, 2, "stats", "images", "--inception-weights", "weights.pth", "-o", "weights.pth"
    )
