"""`dqtool eval` with the metrics that need files: figures and what they rest on in the report, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Run
from helpers import NETWORK, load_json, refused

from dqtool.errors import EnvironmentFault, UsageError
from dqtool.metrics import METRICS, Files
from dqtool.metrics.digits import DIGITS
from dqtool.metrics.frechet import statistics
from dqtool.metrics.manifold import Manifold
from dqtool.metrics.registry import path_digest
from dqtool.stages.evaluation.image_metrics import choose_metrics


@pytest.fixture
def references(chain: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    np.savez(chain / "ref.npz", noise)
    return chain


def test_figures_name_their_files_and_samples_are_kept(run: Run, references: Path, inception_weights: Path) -> None:
    command = [
        "eval",
        "exported",
        "--reference",
        "tiny",
        "--samples",
        "5",
        "--metrics",
        "is,pr,fid-reference,similarity",
    ]
    command += ["--inception-weights", str(inception_weights), "--ref-stats", "ref.npz", "--save-samples", "s.npz"]
    result = run(*command, "--json", "-o", "out.json", cwd=references)
    assert result.returncode == 0, result.stderr
    figures = load_json(result.stdout)["metrics"]
    assert 1 <= figures["is"] <= 5
    assert 0 <= figures["precision"] <= 1
    assert {"is", "precision", "recall"} <= set(figures["reference"])
    assert figures["fid_from_reference"] > 0
    assert "fid_from_reference" not in figures["reference"]
    assert "FID to full precision" in result.stderr
    assert figures["extractors"]["precision"]["sha256"] == path_digest(inception_weights)
    assert figures["files"]["ref_stats"] == {"file": "ref.npz", "sha256": path_digest(references / "ref.npz")}
    assert -1 <= figures["ssim"]["mean"] <= 1
    assert "is of 5 images is biased" in result.stderr
    assert "precision" in result.stderr
    with np.load(references / "s.npz") as archive:
        assert archive["arr_0"].shape == (5, 8, 8, 3)
        assert json.loads(str(archive["dqtool"]))["images"] == 5
    assert "cached" in run(*command, "-o", "out.json", cwd=references).stderr
    noise = np.random.default_rng(1).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    np.savez(references / "ref.npz", noise)
    plan = run(*command, "--dry-run", "--json", "-o", "out.json", cwd=references)
    assert not load_json(plan.stdout)["cached"], "other reference statistics are another evaluation"


def test_what_is_refused(run: Run, references: Path, inception_weights: Path) -> None:
    command = ["eval", "exported", "--samples", "4"]
    weights = ["--inception-weights", str(inception_weights)]
    assert "--inception-weights" in refused(run, references, 4, *command, "--metrics", "fid")
    assert "--ref-stats" in refused(run, references, 4, *command, *weights, "--metrics", "fid")
    assert "--inception-weights" in refused(run, references, 4, *command, "--ref-stats", "ref.npz")
    assert "no such file" in refused(run, references, 4, *command, *weights, "--ref-stats", "missing.npz")
    assert "takes none" in refused(run, references, 2, *command, "--clip", "tiny")
    assert "takes none" in refused(run, references, 2, *command, "--clip", "tiny", "--metrics", "clip")
    assert "--clip" in refused(run, references, 4, *command, "--aesthetic-weights", "tiny.pth")
    assert "fid, fid-reference, sfid, is, pr" in refused(run, references, 2, *command, "--metrics", "lpips")
    assert "overwrite its own input" in refused(
        run, references, 2, *command, *weights, "--ref-stats", "ref.npz", "--save-samples", "ref.npz"
    )
    (references / "bad.pth").write_text("no weights")
    assert "bad.pth" in refused(run, references, 3, *command, "--metrics", "is", "--inception-weights", "bad.pth")


LEAST_SAMPLES = {name: metric.least_samples for name, metric in METRICS.items() if metric.least_samples}


@pytest.mark.parametrize(("metric", "least"), LEAST_SAMPLES.items())
def test_too_few_samples_are_refused_before_any_is_drawn(run: Run, references: Path, metric: str, least: int) -> None:
    (references / "w.pth").write_text("never read")
    command = ["eval", "exported", "--metrics", metric, "--inception-weights", "w.pth", "--ref-stats", "ref.npz"]
    text = refused(run, references, 2, *command, "--samples", str(least - 1))
    assert f"'{metric}' needs at least {least} samples" in text
    assert run(*command, "--samples", str(least), "--dry-run", cwd=references).returncode == 0


def test_the_least_samples_are_those_the_metrics_accept() -> None:
    images = torch.randn(LEAST_SAMPLES["digits"], 1, 16, 16, generator=torch.Generator().manual_seed(0))
    DIGITS.evaluate(images)
    with pytest.raises(UsageError):
        DIGITS.evaluate(images[1:])
    Manifold.of(images[: LEAST_SAMPLES["pr"]].flatten(1), half=True)
    with pytest.raises(UsageError):
        Manifold.of(images[: LEAST_SAMPLES["pr"] - 1].flatten(1), half=True)
    statistics(images[: LEAST_SAMPLES["fid"]].flatten(1))
    with pytest.raises(UsageError):
        statistics(images[: LEAST_SAMPLES["fid"] - 1].flatten(1))


@pytest.mark.parametrize("channels", [4, 16])
def test_latents_are_compared_and_shown_but_are_no_images(run: Run, tmp_path: Path, channels: int) -> None:
    from diffusers import UNet2DModel
    from PIL import Image

    torch.manual_seed(0)
    UNet2DModel(**NETWORK | {"in_channels": channels, "out_channels": channels}).save_pretrained(tmp_path / "bare")
    assert run("dilate", "bare", "--scaling", "wd", cwd=tmp_path).returncode == 0
    (tmp_path / "w.pth").write_text("never read")
    command = ["eval", "dilated.safetensors", "--samples", "3", "--steps", "2"]
    images = ["--metrics", "is,similarity", "--inception-weights", "w.pth"]
    for arguments, where in ((images, "--metrics is"), (["--save-samples", "s.npz"], "--save-samples")):
        failed = run(*command, *arguments, cwd=tmp_path)
        assert failed.returncode == 2
        assert "samples are latents" in failed.stderr
        assert where in failed.stderr
        assert "samples:" not in failed.stderr, "nothing was drawn"
        assert not (tmp_path / "eval.json").exists()
    done = run(*command, "--metrics", "similarity", "--grid", "g.png", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert load_json(done.stdout)["metrics"]["psnr"]["mean"] > 80
    assert "first channel" in done.stderr
    with Image.open(tmp_path / "g.png") as picture:
        red, green, blue = picture.convert("RGB").split()
    assert red.tobytes() == green.tobytes() == blue.tobytes()


def test_left_out_metrics_are_those_the_files_allow(tmp_path: Path) -> None:
    whole, only, plain = (str(tmp_path / f"{name}.npz") for name in ("whole", "only", "plain"))
    np.savez(whole, arr_0=np.zeros(1), mu=np.zeros(1), mu_s=np.zeros(1))
    np.savez(only, mu=np.zeros(1), sigma=np.zeros(1))
    np.savez(plain, np.zeros(1))
    for path, expected in (
        (whole, ("fid", "fid-reference", "sfid", "is", "pr")),
        (plain, ("fid", "fid-reference", "sfid", "is", "pr")),
        (only, ("fid", "fid-reference", "is")),
    ):
        assert choose_metrics(None, Files(inception_weights="w", ref_stats=path), prompts=False) == expected
    assert choose_metrics(None, Files(clip="c"), prompts=True) == ("clip",)
    assert choose_metrics(None, Files(clip="c", aesthetic_weights="a"), prompts=False) == ("aesthetic",)
    assert choose_metrics(("digits", "is"), Files(inception_weights="w"), prompts=False) == ("is",)
    assert choose_metrics(None, Files(), prompts=True) == ()
    with pytest.raises(UsageError):
        choose_metrics(("clip",), Files(clip="c"), prompts=False)
    with pytest.raises(EnvironmentFault, match="--clip"):
        choose_metrics(("clip",), Files(), prompts=True)


def test_prompts_reach_the_clip_score(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tiny_text import D, tiny_clip, tiny_stable_diffusion

    from dqtool.metrics.batches import NpzImages
    from dqtool.metrics.clip import ClipEncoder, clip_score

    tiny_stable_diffusion(tmp_path / "sd")
    tiny_clip(tmp_path / "clip")
    torch.save({"weight": torch.randn(1, D), "bias": torch.zeros(1)}, tmp_path / "head.pth")
    prompts = ["a cat", "dogs", "z"]
    (tmp_path / "drawbench.csv").write_text("Prompts,Category\n" + "".join(f"{prompt},x\n" for prompt in prompts))
    assert run("dilate", "sd", cwd=tmp_path).returncode == 0
    command = ["eval", "dilated.safetensors", "--samples", "4", "--steps", "2", "--prompts", "drawbench.csv"]
    command += ["--clip", "clip", "--aesthetic-weights", "head.pth", "--metrics", "clip,aesthetic"]
    result = run(*command, "--save-samples", "s.npz", "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    figures = load_json(result.stdout)["metrics"]
    encoder = ClipEncoder(tmp_path / "clip")
    images = torch.cat(list(NpzImages(tmp_path / "s.npz").read(4)))
    expected = clip_score(encoder.images(images), encoder.texts([*prompts, prompts[0]])).mean()
    assert figures["clip"] == pytest.approx(float(expected), rel=1e-4)
    assert figures["extractors"]["aesthetic"]["name"] == "clip"
    assert set(figures["files"]) == {"clip", "aesthetic_weights"}
