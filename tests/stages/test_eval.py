"""Evaluation against the reference: its own figures, the cache of its images, and what a wrong reference does."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_pipeline

from dqtool.artifacts import open_artifact
from dqtool.artifacts.records import LayerRecord
from dqtool.core.bits import bits_label
from dqtool.errors import ArtifactError, EnvironmentFault, UsageError
from dqtool.metrics.grid import save_grid, to_uint8
from dqtool.models.sampling.image_cache import cached_images
from dqtool.runtimes import pick
from dqtool.runtimes.choice import runtime_order
from dqtool.stages.dilate import DilateOptions, dilate
from dqtool.stages.eval import EvalOptions, evaluate
from dqtool.stages.options.sample import SampleOptions
from dqtool.stages.shared.settings import RunSettings

QUIET = RunSettings(quiet=True)


def figures(made: Path, tmp_path: Path, artifact: str, **options: object) -> dict:
    output = evaluate(
        EvalOptions(
            str(made / artifact), str(tmp_path / "e.json"), str(made / "tiny"), samples=6, batch_size=4, **options
        ),  # type: ignore[arg-type]
        QUIET,
    )
    return json.loads(Path(output).read_text())["metrics"]


def test_the_float_artifact_is_the_reference_itself(made: Path, tmp_path: Path) -> None:
    found = figures(made, tmp_path, "calibrated.safetensors")
    assert found["psnr"]["mean"] > 90
    assert found["cost"]["size_ratio"] == 1
    assert max(found["layer_errors"].values()) < 1e-9


def test_distilled_and_exported_give_the_same_figures(made: Path, tmp_path: Path) -> None:
    one, other = (figures(made, tmp_path, name, runtime="simulate") for name in ("distilled.safetensors", "exported"))
    assert one["psnr"] == other["psnr"]
    assert one["layer_errors"] == other["layer_errors"]
    assert set(one["layer_errors"]) == {
        layer.name for layer in open_artifact(made / "exported").manifest.layers if layer.kind != "attention"
    }
    assert one["cost"]["bops_ratio"] > 20


def test_the_report_names_the_seeds_and_the_method_of_the_whole_chain(made: Path, tmp_path: Path) -> None:
    figures(made, tmp_path, "exported", runtime="simulate", seed=7)
    report = json.loads((tmp_path / "e.json").read_text())
    assert report["parameters"]["seed"] == 7
    history = report["inputs"][0]["history"]
    assert [made_by["stage"] for made_by in history] == ["dilate", "calibrate", "distill", "export"]
    for made_by, name in zip(history[:3], ("dilated", "calibrated", "distilled"), strict=True):
        assert made_by["parameters"] == json.loads((made / f"{name}.json").read_text())["parameters"]
    assert history[1]["parameters"]["seed"] == 0
    assert history[2]["parameters"]["method"] == "bkd"
    assert open_artifact(made / "exported").as_input().history[2].parameters.method == "bkd"


def test_digits_are_compared_with_the_references_own(made: Path, tmp_path: Path) -> None:
    model = tiny_pipeline(tmp_path / "digits", sample_size=16, in_channels=1, out_channels=1)
    dilated = dilate(DilateOptions(str(model), str(tmp_path / "d.safetensors"), scaling="none"), QUIET)
    options = EvalOptions(dilated, str(tmp_path / "e.json"), samples=12, steps=2, metrics=("digits",))
    found = json.loads(Path(evaluate(options, QUIET)).read_text())
    assert found["metrics"]["fd.digits_from_reference"] == pytest.approx(0, abs=1e-6)
    assert found["metrics"]["fd.digits"] == pytest.approx(found["metrics"]["reference"]["fd.digits"])
    assert "fd.digits_from_reference" not in found["metrics"]["reference"]
    evaluate(replace(options, floor=True), QUIET)
    with_floor = json.loads((tmp_path / "e.json").read_text())["metrics"]
    assert with_floor["fd.digits"] == found["metrics"]["fd.digits"]
    assert with_floor["reference"]["fd.digits_from_reference"] > 1e-3, "two sets of equal models with different noise"
    assert found["parameters"]["figures_added"] == {"digits": 1}, "older reports are made again"


def test_metrics_can_be_chosen(made: Path, tmp_path: Path) -> None:
    found = figures(made, tmp_path, "exported", metrics=("cost",))
    assert set(found) == {"cost"}


def test_a_runtime_is_compared_with_the_simulation_of_a_directory(made: Path, tmp_path: Path) -> None:
    directory = str(made / "exported")
    options = EvalOptions(directory, str(tmp_path / "e.json"), directory, samples=3, runtime="onednn")
    found = json.loads(Path(evaluate(options, QUIET)).read_text())["metrics"]
    assert found["reference_is"] == f"{directory} in the simulate runtime" and found["runtime"] == "cpu"
    assert found["psnr"]["mean"] > 20
    assert "layer_errors" not in found
    same = EvalOptions(directory, str(tmp_path / "s.json"), directory, samples=3, metrics=("similarity",))
    assert json.loads(Path(evaluate(same, QUIET)).read_text())["metrics"]["psnr"]["mean"] > 90


def test_the_default_engine_is_the_fastest_and_layers_are_measured_in_the_simulation(
    made: Path, tmp_path: Path
) -> None:
    kept = {"metrics": ("similarity", "layers")}
    fast = figures(made, tmp_path, "exported", **kept)
    exact = figures(made, tmp_path, "exported", runtime="simulate", **kept)
    assert EvalOptions().runtime == SampleOptions("exported").runtime == "auto"
    order, _ = runtime_order(open_artifact(made / "exported"))
    assert fast["runtime"] == next(runtime.name for runtime, reason in pick(order) if reason is None)
    assert exact["runtime"] == "simulate"
    assert fast["layer_errors"] == exact["layer_errors"]


def test_artifacts_before_the_export_run_in_the_simulation(made: Path, tmp_path: Path) -> None:
    output = str(tmp_path / "e.json")
    options = EvalOptions(str(made / "distilled.safetensors"), output, samples=2, metrics=("similarity",))
    assert json.loads(Path(evaluate(options, QUIET)).read_text())["parameters"]["runtime"] == "simulate"


@pytest.mark.parametrize("runtime", ["cpu", "magic"])
def test_runtimes_are_for_exported_directories(made: Path, tmp_path: Path, runtime: str) -> None:
    for name in ("calibrated.safetensors", "distilled.safetensors"):
        options = EvalOptions(str(made / name), str(tmp_path / "e.json"), samples=2, runtime=runtime)
        with pytest.raises(UsageError, match=f"'{runtime}'.*exported directories"):
            evaluate(options, QUIET)
    assert os.listdir(tmp_path) == []


def test_another_model_is_no_reference(made: Path, tmp_path: Path) -> None:
    other = tiny_pipeline(tmp_path / "other", seed=9)
    with pytest.raises(ArtifactError, match="not the model"):
        evaluate(EvalOptions(str(made / "exported"), str(tmp_path / "e.json"), str(other), samples=2), QUIET)


def test_reference_images_are_made_once_and_a_damaged_cache_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DQTOOL_CACHE", str(tmp_path))
    made: list[int] = []

    def make() -> torch.Tensor:
        made.append(1)
        return torch.full((2, 1, 4, 4), float(len(made)))

    assert cached_images({"seed": 1}, make).mean() == 1
    assert cached_images({"seed": 1}, make).mean() == 1
    assert cached_images({"seed": 2}, make).mean() == 2
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(b"no")
    assert cached_images({"seed": 1}, make).mean() == 3


def test_grid_has_a_panel_for_each_network(tmp_path: Path) -> None:
    from PIL import Image

    images = torch.linspace(-1, 1, 10 * 16 * 16).view(10, 1, 16, 16)
    save_grid([("a", images), ("b", images)], str(tmp_path / "g.png"), rows=2, columns=4)
    with Image.open(tmp_path / "g.png") as picture:
        assert picture.width > 2 * 4 * 16
    assert os.listdir(tmp_path) == ["g.png"]
    with pytest.raises(EnvironmentFault):
        save_grid([("a", images)], str(tmp_path / "no" / "g.png"))
    assert to_uint8(torch.tensor([-1.0, 0.0, 1.0]).view(1, 1, 1, 3)).flatten().tolist() == [0, 128, 255]


def test_a_grid_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    def fails(_image: Image.Image, target: Any, **_options: object) -> None:
        (target.write if hasattr(target, "write") else Path(target).write_bytes)(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fails)
    with pytest.raises(EnvironmentFault, match="disk is full"):
        save_grid([("a", torch.zeros(1, 1, 4, 4))], str(tmp_path / "g.png"))
    assert os.listdir(tmp_path) == []


def test_label_is_the_width_of_most_of_the_work() -> None:
    layers = [
        LayerRecord("a", "conv2d", (1, 1, 1, 1), 10, bits=(4, 4)),
        LayerRecord("b", "linear", (1, 1), 1, bits=(8, 8)),
        LayerRecord("c", "attention", (1, 1), 99, bits=(8, 4)),
    ]
    assert bits_label(layers) == "4/4"
    assert bits_label([replace(layers[0], bits=None)]) == "float"
