"""Packed tensors that no quantizer has are refused when they are loaded and exported."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from helpers import resigned
from safetensors.torch import load_file, save_file

import dqtool
from dqtool.errors import ArtifactError, DqtoolError, NumericError

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
LAYER = "down_blocks.0.resnets.0.conv1"


def rewritten(directory: Path, file: str, changes: dict[str, torch.Tensor | None]) -> None:
    """Replace tensors (None: leave out) and bring the manifest in line, as whoever makes one up would."""
    path = directory / file
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()} | changes
    os.unlink(path)
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, {"format": "pt"})
    note = directory / "dqtool.json"
    content = json.loads(note.read_text())
    content["files"][file] = {
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    resigned(note, content)


@pytest.mark.parametrize(
    ("leaf", "change", "kind"),
    [
        ("weight_scale", lambda t: t * float("nan"), NumericError),
        ("weight_scale", lambda t: t * float("inf"), NumericError),
        ("weight_scale", lambda t: -t, ArtifactError),
        ("input_scale", torch.zeros_like, ArtifactError),
        ("input_zero_point", lambda t: torch.full_like(t, 200), ArtifactError),
        ("weight_zero_point", lambda t: torch.full_like(t, 16), ArtifactError),
        ("weight_zero_point", lambda t: t.float(), ArtifactError),
        ("weight_packed", lambda t: t.to(torch.int64), ArtifactError),
        ("weight_packed", lambda t: t[:, :1].contiguous(), ArtifactError),
        ("weight_shape", lambda t: t * 2, ArtifactError),
        ("weight_scale", lambda _: None, ArtifactError),
        ("nothing", lambda _: torch.ones(1), ArtifactError),
        ("timesteps", lambda t: t * float("nan"), NumericError),
        ("timesteps", torch.zeros_like, ArtifactError),
        ("timesteps", lambda t: t.to(torch.int64), ArtifactError),
        ("timesteps", lambda t: t[None], ArtifactError),
        ("timesteps", lambda _: None, ArtifactError),
    ],
)
@pytest.mark.parametrize("runtime", ["simulate", "cpu", "openvino"])
def test_an_export_with_wrong_numbers(chain: Path, leaf: str, change, kind: type[DqtoolError], runtime: str):
    directory = chain / "exported"
    name = leaf if leaf == "timesteps" else f"{LAYER}.{leaf}"
    rewritten(directory, WEIGHTS, {name: change(load_file(directory / WEIGHTS).get(name))})
    with pytest.raises(kind) as caught:
        dqtool.load(str(directory), runtime=runtime)
    assert type(caught.value) is kind
    assert len(str(caught.value)) <= 500


def test_a_manifest_that_lists_other_layers(chain: Path):
    note = chain / "exported" / "dqtool.json"
    original = json.loads(note.read_text())
    for key, value in (("name", "nothing"), ("shape", [3, 3]), ("kind", "attention")):
        content = json.loads(json.dumps(original))
        content["layers"][0][key] = value
        content["layers"][0]["heads"] = 1
        resigned(note, content)
        with pytest.raises(ArtifactError):
            dqtool.load(str(chain / "exported"), runtime="simulate")


@pytest.mark.parametrize(
    ("name", "change", "kind"),
    [
        (f"{LAYER}.weight_scale", lambda t: t * float("nan"), NumericError),
        (f"{LAYER}.input_scale", lambda t: t * 0, ArtifactError),
        (f"{LAYER}.input_zero_point", lambda t: t + 200, ArtifactError),
        (f"{LAYER}.input_scale", lambda t: t[:1], ArtifactError),
        ("timesteps", lambda t: t * 0, ArtifactError),
        ("timesteps", lambda t: t * float("inf"), NumericError),
    ],
)
@pytest.mark.parametrize("runtime", ["simulate", "auto"])
def test_diffusers_loads_no_such_tensor_either(
    chain: Path, name: str, change, kind: type[DqtoolError], runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import DiffusionPipeline

    monkeypatch.setenv("DQTOOL_RUNTIME", runtime)
    tensor = load_file(chain / "exported" / WEIGHTS)[name].clone()
    rewritten(chain / "exported", WEIGHTS, {name: change(tensor)})
    with pytest.raises(kind):
        DiffusionPipeline.from_pretrained(chain / "exported")


@pytest.mark.parametrize(
    "change", [{"shape": [1, 2, 3, 3]}, {"bits": [4]}, {"bits": None}, {"name": "nowhere"}, {"kind": 1}]
)
def test_diffusers_loads_no_layer_of_another_kind(chain: Path, change: dict[str, object]) -> None:
    from diffusers import DiffusionPipeline

    path = chain / "exported" / "unet" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["layers"][0] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(ArtifactError):
        DiffusionPipeline.from_pretrained(chain / "exported")
