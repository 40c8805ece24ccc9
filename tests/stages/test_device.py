"""Stages compute where `--device` says, and everything that meets a network follows it there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import dit_pipeline

from dqtool.artifacts import open_artifact
from dqtool.core.device import device_of, place, resolve_device, to_cpu, to_device, to_device_of
from dqtool.errors import EnvironmentFault

CHAIN = Path(__file__).with_name("device_chain.py")


def chain(model: Path, directory: Path, where: str) -> dict[str, Any]:
    """The artifacts of the stages, run in a process of its own: all five, or on the CPU those that are compared."""
    directory.mkdir()
    command = [sys.executable, str(CHAIN), str(model), str(directory), where]
    result = subprocess.run(command, capture_output=True, text=True, cwd=directory)
    assert result.returncode == 0, result.stderr[-3000:]
    names = ("calibrated.safetensors", "distilled.safetensors", "exported", "eval.json")
    return {name: open_artifact(directory / name) for name in names if (directory / name).exists()}


@pytest.mark.parametrize("where", ["fenced", "cuda"])
def test_a_whole_chain_runs_on_another_device(tmp_path: Path, where: str) -> None:
    """On one that refuses to mix its tensors with the CPU's: guidance, attention, training, the autoencoder, eval."""
    if where == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")
    model = dit_pipeline(tmp_path / "model")
    there, here = (chain(model, tmp_path / place, place) for place in (where, "cpu"))
    for name in ("calibrated.safetensors", "distilled.safetensors"):
        assert there[name].manifest.environment.device == f"{where}:0"
        assert here[name].manifest.environment.device == "cpu"
    assert there["eval.json"].manifest.environment.device == f"{where}:0"
    assert (tmp_path / where / "samples.png").stat().st_size > 100
    if where == "cuda":
        assert there["distilled.safetensors"].manifest.metrics.as_read["peak_device_bytes"] > 0
    x, same = (run["calibrated.safetensors"].tensors()["trajectory.x"] for run in (there, here))
    torch.testing.assert_close(x, same, rtol=1e-4, atol=1e-5)
    trained, expected = (run["distilled.safetensors"].tensors() for run in (there, here))
    assert trained.keys() == expected.keys()
    for name, tensor in trained.items():
        if name.endswith("_scale"):  # rounding may differ; a training that did not happen would differ more
            torch.testing.assert_close(tensor, expected[name], rtol=0.02, atol=1e-6, msg=name)
    assert there["eval.json"].manifest.metrics.as_read["psnr"]["mean"] > 20


def test_a_device_that_is_not_there_is_refused() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    assert resolve_device("auto") == torch.device("cpu")
    for text in ("cuda", "cuda:3"):
        with pytest.raises(EnvironmentFault, match="no device cuda"):
            resolve_device(text)


def test_values_follow_a_network() -> None:
    network = torch.nn.Linear(2, 2, device="meta")
    moved = to_device_of(network, {"x": torch.zeros(2), "more": [torch.ones(1), "text", 3]})
    assert moved["x"].device == moved["more"][0].device == device_of(network) == torch.device("meta")
    assert moved["more"][1:] == ["text", 3]
    assert to_cpu((torch.zeros(1), None))[0].device.type == "cpu"
    assert device_of(torch.nn.SiLU()).type == "cpu"
    layer = torch.nn.Linear(2, 2)
    assert place(layer) is layer


def test_expanded_tensors_are_written_out_before_they_are_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Tensor] = []
    tensors = torch.tensor(3.0).expand(4), torch.ones(2, 4, 8, 8).to(memory_format=torch.channels_last)

    def pin(x: torch.Tensor) -> torch.Tensor:
        pinned.append(x)
        return torch.zeros(0).set_(torch.zeros(x.numel()).untyped_storage(), 0, x.shape, x.stride()).copy_(x)

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda x, _device, **_: to(x, "cpu"))
    for given in tensors:
        assert torch.equal(to_device(given, torch.device("cuda")), given)
    assert pinned[0].is_contiguous()
    assert pinned[1].is_contiguous(memory_format=torch.channels_last)
