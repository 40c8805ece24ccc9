"""Recipes of the published models: each takes a checkpoint's path, and its dry run says what will come of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dqtool.artifacts.header import file_header
from dqtool.errors import UsageError
from dqtool.models.architectures import ARCHITECTURES
from dqtool.recipe import load_recipe
from dqtool.stages.planning.plan import plan_recipe
from dqtool.stages.registry import chained_stages, option_types
from dqtool.stages.run import steps_of_recipe
from dqtool.stages.shared.settings import RunSettings

RECIPES = sorted((Path(__file__).parents[1] / "recipes" / "published").glob("*.yaml"))
MODELS = {
    "cifar10": "ddpm-cifar10",
    "bedroom": "ldm4-bedroom",
    "church": "ldm8-church",
    "imagenet": "ldm4-imagenet",
    "coco": "sd14",
    "dit": "dit-xl2",
}


def test_every_published_model_has_its_recipes() -> None:
    assert {path.stem.split("-")[0] for path in RECIPES} == set(MODELS)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_options_are_known_and_a_model_is_asked_for(path: Path) -> None:
    with pytest.raises(UsageError, match="names no model") as caught:
        load_recipe(path, [], {name: option_types(name) for name in chained_stages()})
    assert "--set model=" in str(caught.value)
    _, steps = steps_of_recipe(str(path), ["model=somewhere"])
    assert [name for name, _ in steps] == list(chained_stages())
    bits = path.stem.rsplit("-", 1)[1]
    assert dict(steps)["distill"]["bits"] == f"{bits[1]}/{bits[3]}"
    assert dict(steps)["calibrate"]["samples"] >= dict(steps)["calibrate"]["steps"]


def sparse_model(directory: Path, arch: str) -> Path:
    """A component directory at full size whose weights take no disk: all but the header is a hole."""
    import torch

    from dqtool.models.families import family_of

    published = ARCHITECTURES[arch]
    with torch.device("meta"):
        network = family_of(published.class_name, arch).build(published.config)
    shapes = {name: ("F32", tuple(tensor.shape)) for name, tensor in network.state_dict().items()}
    header, _, data = file_header(shapes)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(published.network_config()))
    with open(directory / "diffusion_pytorch_model.safetensors", "wb") as stream:
        stream.write(header)
        stream.truncate(len(header) + data)
    return directory


@pytest.mark.parametrize("name", ["bedroom-w4a4", "church-w6a6", "imagenet-plms20-w4a4", "dit-xl2-w8a8"])
def test_the_plan_of_every_other_model_counts_what_was_published(tmp_path: Path, name: str) -> None:
    arch = ARCHITECTURES[MODELS[name.split("-")[0]]]
    model = sparse_model(tmp_path / "model", arch.name)
    path = next(path for path in RECIPES if path.stem == name)
    drawn = ["calibrate.random-conditions=true"] if name.startswith("imagenet") else []
    plan = plan_recipe(
        str(path), [f"model={model}", *drawn], RunSettings(dry_run=True, quiet=True), str(tmp_path / "results")
    )
    work = next(stage["work"] for stage in plan["stages"] if stage["stage"] == "distill")
    assert work["parameters"] == pytest.approx(arch.parameters, rel=0.01)
    bits = int(name[-1])
    assert work["bytes_float32"] / work["bytes"] == pytest.approx(32 / bits, rel=0.05)
    assert work["bops_float32"] / work["bops"] == pytest.approx((32 / bits) ** 2, rel=0.07)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("name", ["cifar10-w4a4", "coco-sd14-w6a6"])
def test_the_dry_run_tells_sizes_and_bit_operations(tmp_path: Path, run: Any, name: str) -> None:
    path = next(path for path in RECIPES if path.stem == name)
    arch = ARCHITECTURES[MODELS[name.split("-")[0]]]
    sparse_model(tmp_path / "model", arch.name)
    drawn = [] if name.startswith("cifar10") else ["--set", "calibrate.random-conditions=true"]
    result = run("run", str(path), "--set", "model=model", *drawn, "--dry-run", "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    plan = {stage["stage"]: stage for stage in json.loads(result.stdout)["stages"]}
    work = plan["distill"]["work"]
    assert work["parameters"] == pytest.approx(arch.parameters, rel=0.01)
    if name == "coco-sd14-w6a6":
        assert work["bytes_float32"] / work["bytes"] == pytest.approx(5.3, rel=0.01)
        assert work["bops_float32"] / work["bops"] == pytest.approx(27.9, rel=0.01)
    assert not (tmp_path / "results").exists()


# Settings of arXiv 2409.14307 (Tables 1 and 2, Sections 5 and appendices B to D); CIFAR-10's grid and DiT's sampler are those
# of the reference code and of PTQ4DiT, which the paper follows. What is missing here the paper does not say.
PAPER: dict[str, dict[str, Any]] = {
    "cifar10": {"steps": 100, "sampler": "ddim", "eta": 0.0, "samples": 5120, "images": 50000, "spacing": "quad", "clip": False},
    "bedroom": {"steps": 100, "sampler": "ddim", "eta": 1.0, "samples": 5120, "images": 50000},
    "church": {"steps": 100, "sampler": "ddim", "eta": 0.0, "samples": 5120, "images": 50000},
    "imagenet": {"steps": 20, "sampler": "ddim", "eta": 0.0, "guidance": 3.0, "samples": 1024, "images": 50000},
    "imagenet-plms20": {"steps": 20, "sampler": "plms", "samples": 1024, "images": 50000},
    "imagenet-dpmsolver20": {"steps": 20, "sampler": "dpmsolver", "samples": 1024, "images": 50000},
    "imagenet-ddim100": {"steps": 100, "sampler": "ddim", "samples": 1024, "images": 50000},
    "coco-sd14": {"steps": 50, "samples": 512, "images": 10000, "crop": 300},
    "dit-xl2": {"steps": 100, "sampler": "ddpm", "variance": "learned_range", "guidance": 1.5, "images": 10000},
}  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_settings_are_those_of_the_paper_and_guesses_are_named(path: Path) -> None:
    recipe, steps = steps_of_recipe(str(path), ["model=somewhere"])
    stages = dict(steps)
    found = {**stages["calibrate"], "images": stages["eval"]["samples"], "crop": stages["eval"].get("image_size")}
    wanted = PAPER[path.stem.rsplit("-", 1)[0]]
    assert {key: found.get(key) for key in wanted} == wanted
    assert stages["dilate"]["scaling"] == "wd"
    assert stages["calibrate"]["scaling"] == "keep"
    assert stages["distill"]["preset"] == recipe.preset == "paper"
    assert "Guesses, where the paper is silent: " in str(recipe.description)
    assert "iterations" in str(recipe.description).split("Guesses")[1]
