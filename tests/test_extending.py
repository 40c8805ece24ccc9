"""Adding a family, scaling method, training method, runtime, metric or export format is one file and one registry line.

Each test writes a toy one, enters it in its registry, and uses it through the command line on the tiny model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import Run
from helpers import load_json
from torch import Tensor, nn

from dqtool.formats import FORMATS, Exported
from dqtool.metrics import METRICS, Figure, Metric
from dqtool.models.families import FAMILIES, register
from dqtool.models.families.unet2d import UNet2D
from dqtool.runtimes import RUNTIMES, Runtime, simulate
from dqtool.scaling.methods import METHODS as SCALINGS
from dqtool.scaling.methods.base import ScalingInput, ScalingMethod, ScalingResult
from dqtool.training.methods import METHODS as TRAININGS
from dqtool.training.methods import Method


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """`module(name, **contents)`: a module as a file of its own would make it, for registries that import by name."""

    def make(name: str, **contents: Any) -> str:
        made = ModuleType(name)
        made.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, made)
        return name

    return make


def test_a_family(run: Run, chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []

    class Toy(UNet2D):
        class_name = "UNet2DModel"

        def predict(self, network: nn.Module, x: Tensor, *given: Any) -> Tensor:
            calls.append(tuple(x.shape))
            return super().predict(network, x, *given)

    monkeypatch.setitem(FAMILIES, "UNet2DModel", FAMILIES["UNet2DModel"])  # put back afterwards
    register(Toy)
    assert run("calibrate", "--steps", "2", "--samples", "4", "--force", cwd=chain).returncode == 0
    assert calls


def test_a_scaling_method(run: Run, chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def halved(given: ScalingInput) -> ScalingResult:
        return ScalingResult(torch.full((given.channels,), 0.5))

    monkeypatch.setitem(SCALINGS, "halved", ScalingMethod("halved", halved))
    result = run("dilate", "tiny", "--scaling", "halved", "-o", "halved.safetensors", "--json", cwd=chain)
    assert result.returncode == 0, result.stderr
    assert load_json(result.stdout)["metrics"]["mean_dilation"] == 0.5


def test_a_training_method(run: Run, chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Options:
        iters: int = 1

    def train(_task: Any, options: Options, _bars: Any) -> dict[str, Any]:
        return {"toy": options.iters}

    monkeypatch.setitem(TRAININGS, "toy", Method("toy", "trains nothing", Options, train, lambda o, _: f"{o.iters}"))
    result = run("distill", "--method", "toy", "--iters", "3", "--json", "-o", "toy.safetensors", cwd=chain)
    assert result.returncode == 0, result.stderr
    assert load_json(result.stdout)["metrics"]["toy"] == 3


def test_a_runtime(run: Run, chain: Path, monkeypatch: pytest.MonkeyPatch, module: Callable[..., str]) -> None:
    loaded: list[str] = []

    def load(artifact: Any) -> nn.Module:
        loaded.append(artifact.given)
        return simulate.load(artifact)

    name = module("toy_runtime", available=lambda: None, load=load)
    monkeypatch.setitem(RUNTIMES, "toy", Runtime("toy", name, "a toy", "as it is"))
    command = ("eval", "exported", "--runtime", "toy", "--samples", "2", "--metrics", "similarity", "-o", "toy.json")
    result = run(*command, cwd=chain)
    assert result.returncode == 0, result.stderr
    assert loaded == ["exported"]


def test_a_metric(run: Run, chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def brightness(images: Tensor, _expected: Tensor | None, _asked: Tensor | None) -> dict[str, Any]:
        return {"brightness": float(images.mean())}

    figure = Figure("brightness", "mean brightness", 0, 4)
    monkeypatch.setitem(METRICS, "brightness", Metric((figure,), compare=brightness, least_samples=2))
    command = ("eval", "exported", "--metrics", "brightness", "-o", "toy.json", "--json")
    result = run(*command, "--samples", "4", cwd=chain)
    assert result.returncode == 0, result.stderr
    assert -1 <= load_json(result.stdout)["metrics"]["brightness"] <= 1
    assert run(*command, "--samples", "1", cwd=chain).returncode == 2


def test_an_export_format(run: Run, chain: Path, monkeypatch: pytest.MonkeyPatch, module: Callable[..., str]) -> None:
    def prepare(distilled: Any) -> Exported:
        names = "\n".join(layer.name for layer in distilled.manifest.layers)

        def write(directory: Path) -> None:
            (directory / "layers.txt").write_text(names)

        config: Mapping[str, Any] = distilled.manifest.network.config
        return Exported(dict(config), distilled.manifest.layers, write, len(names), {"bytes": len(names)})

    monkeypatch.setitem(FORMATS, "toy", module("toy_format", prepare=prepare))
    result = run("export", "--format", "toy", "-o", "toy", cwd=chain)
    assert result.returncode == 0, result.stderr
    assert "conv_in" in next((chain / "toy").rglob("layers.txt")).read_text()
