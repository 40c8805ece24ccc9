"""Choice of the precision in which the float network samples: by agreement and by time, never on the CPU unless asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from torch import Tensor, nn

from dqtool.errors import UsageError
from dqtool.models.families import family_of
from dqtool.models.sampling import teacher_precision
from dqtool.models.sampling.sampler import CALIBRATION, Sampler, initial_noise, make_sampler
from dqtool.models.sampling.teacher_precision import (
    Form,
    choose,
    computed,
    precision_label,
    settle,
    sure_points,
)

Calls = list[Callable[[], Tensor]]


@pytest.fixture
def network() -> nn.Module:
    found: nn.Module = build("unet2d").eval().requires_grad_(False)
    return found


@pytest.fixture
def points(network: Any) -> Iterator[Any]:
    x = initial_noise((3, 8, 8), range(2), 0, CALIBRATION)
    return sure_points(torch.tensor([900.0, 600.0, 300.0, 0.0]), x, {})


def calls_of(network: nn.Module, points: Any) -> Calls:
    family = family_of("UNet2DModel", "test")
    return [lambda point=point: family.predict(network, *point) for point in points]


def timed(monkeypatch: pytest.MonkeyPatch, seconds: dict[Form, float]) -> list[Form]:
    """Give each form a time; return the forms that are timed, in order."""
    asked: list[Form] = []

    def took(network: nn.Module, _calls: Calls) -> float:
        conv: Any = next(m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1))
        last = conv.weight.is_contiguous(memory_format=torch.channels_last)
        asked.append(Form(precision_label(network).removeprefix(" in ") or "float32", last))
        return seconds.get(asked[-1], 1.0)

    monkeypatch.setattr(teacher_precision, "_seconds", took)
    return asked


def test_half_precision_needs_agreement_and_speed(
    network: nn.Module, points: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = calls_of(network, points)
    asked = timed(monkeypatch, {Form("bfloat16"): 0.4, Form("float16"): 0.5, Form("float16", True): 0.3})
    monkeypatch.setattr(teacher_precision, "LEAST", 20.0)
    found = choose(network, calls)
    assert found.form == Form("float16", True) and found.speedup == pytest.approx(1 / 0.3) and 20 < found.psnr < 100
    assert Form("bfloat16") not in asked  # it would be as fast, and less precise
    monkeypatch.setattr(teacher_precision, "LEAST", 150.0)
    assert choose(network, calls).form == Form()
    monkeypatch.setattr(teacher_precision, "LEAST", 20.0)
    timed(monkeypatch, dict.fromkeys((Form("float16"), Form("bfloat16")), 0.99))
    assert choose(network, calls).form == Form()


def test_channels_last_alone(network: nn.Module, points: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, {Form("float32", True): 0.8})
    monkeypatch.setattr(teacher_precision, "LEAST", 90.0)
    exact = calls_of(network, points)[0]()
    assert choose(network, calls_of(network, points)).form == Form("float32", True)
    assert precision_label(network) == "" and torch.equal(calls_of(network, points)[0](), exact)  # left as it was


def test_overflow_is_no_agreement(network: nn.Module, points: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, {Form("bfloat16"): 0.5, Form("float16"): 0.5})
    monkeypatch.setattr(teacher_precision, "LEAST", 20.0)

    def call() -> Tensor:
        y = torch.linspace(1, 2, 8)[None]
        name = precision_label(network)
        return y * torch.inf if "float16" in name and "bf" not in name else y * (1.01 if name else 1.0)

    assert choose(network, [call]).form.dtype == "bfloat16"


def test_on_the_cpu_nothing_is_measured_unless_asked(
    network: nn.Module, points: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = family_of("UNet2DModel", "test")
    monkeypatch.setattr(teacher_precision, "choose", lambda *_: pytest.fail("measured on the CPU"))
    assert settle(network, family, points, "teacher") == {} and precision_label(network) == ""
    monkeypatch.setenv("DQTOOL_TEACHER", "bfloat16")
    assert settle(network, family, points, "teacher") == {"teacher_precision": "bfloat16"}
    sampler = Sampler(family, make_sampler({"_class_name": "DDIMScheduler"}), 4)
    narrow = sampler.predict(network, *points[0])
    wide = family.predict(network, *points[0])
    assert narrow.dtype == torch.float32 and precision_label(network) == " in bfloat16"
    assert 0 < (narrow - wide).abs().max() < 0.1 * wide.abs().max()
    assert torch.equal(computed(network, lambda: family.predict(network, *points[0])), narrow)
    monkeypatch.setenv("DQTOOL_TEACHER", "int8")
    with pytest.raises(UsageError, match="int8"):
        settle(network, family, points, "teacher")


def test_an_accelerator_is_measured(network: nn.Module, points: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_precision, "ACCELERATORS", ("cpu",))  # the CPU plays one
    monkeypatch.setattr(teacher_precision, "LEAST", 20.0)
    timed(monkeypatch, {Form("float16"): 0.5})
    found = settle(network, family_of("UNet2DModel", "test"), points, "trajectory")
    assert found["trajectory_precision"] == "float16" and found["trajectory_speedup"] == 2.0
    assert precision_label(network) == " in float16"


def test_artifacts_of_two_precisions_are_two(made: Path, tmp_path: Path, run: Any, monkeypatch: Any) -> None:
    """The chain's calibration is not taken for one in bfloat16, which is recorded as such."""
    from dqtool.artifacts import open_artifact

    monkeypatch.setenv("DQTOOL_TEACHER", "bfloat16")
    arguments = ("calibrate", made / "dilated.safetensors", "--steps", "4", "--samples", "16")
    result = run(*arguments, "-o", tmp_path / "half.safetensors", "--scaling", "keep", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    half = open_artifact(tmp_path / "half.safetensors")
    assert half.manifest.metrics.as_read["trajectory_precision"] == "bfloat16"
    assert half.manifest.parameters.as_read["teacher"] == "bfloat16"
    exact = open_artifact(made / "calibrated.safetensors").tensors()["trajectory.x"]
    found = half.tensors()["trajectory.x"]
    assert found.dtype == torch.float32 and not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=0.1, atol=0.1)
