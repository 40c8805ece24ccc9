"""Tensors of dilated, calibrated and distilled artifacts that no stage of dqtool writes are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Run
from helpers import refused
from safetensors.torch import load_file
from torch import Tensor

from dqtool.artifacts import commit, manifest_path, open_artifact

LAYER = "down_blocks.0.resnets.0.conv1"
HEADS = "down_blocks.1.attentions.0"
NEXT = {"dilated": "calibrate", "calibrated": "distill", "distilled": "export"}


def changed(path: Path, name: str, change: Callable[[Tensor], Tensor | None]) -> None:
    """Change a tensor (None: leave it out) and sign the artifact again, as a stranger would."""
    note = open_artifact(path).manifest
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    made = change(tensors.get(name, torch.ones(3)))
    tensors = {key: tensor for key, tensor in tensors.items() if key != name}
    tensors |= {} if made is None else {name: made}
    path.unlink()
    manifest_path(path).unlink()
    commit(path, tensors, note)


def at(value: float, place: int = 0) -> Callable[[Tensor], Tensor]:
    """Return a change that sets one number."""

    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[place] = value
        return tensor

    return change


NAN, INFINITY = float("nan"), float("inf")
CASES: list[tuple[str, str, Callable[[Tensor], Tensor | None], int]] = [
    ("dilated", f"{LAYER}.dilation", at(NAN), 5),
    ("dilated", f"{LAYER}.dilation", at(INFINITY), 5),
    ("dilated", f"{LAYER}.dilation", at(0.0), 3),
    ("dilated", f"{LAYER}.dilation", at(-1.0), 3),
    ("dilated", f"{LAYER}.dilation", lambda t: t[:-1], 3),
    ("dilated", f"{LAYER}.dilation", lambda t: t.to(torch.int64), 3),
    ("dilated", f"{LAYER}.dilation", lambda t: t[None], 3),
    ("dilated", "nowhere.dilation", lambda t: t, 3),
    ("dilated", f"{LAYER}.weight", lambda t: t[:, :-1], 3),
    ("dilated", f"{LAYER}.weight", lambda _: None, 3),
    ("dilated", f"{LAYER}.weight", at(NAN), 5),
    ("calibrated", f"{LAYER}.dilation", at(-1.0), 3),
    ("calibrated", "timesteps", at(NAN), 5),
    ("calibrated", "timesteps", torch.zeros_like, 3),
    ("calibrated", "timesteps", lambda t: t[:-1], 3),
    ("calibrated", "timesteps", lambda _: None, 3),
    ("calibrated", f"{LAYER}.histogram", lambda _: None, 3),
    ("calibrated", f"{LAYER}.histogram", at(-5), 3),
    ("calibrated", f"{LAYER}.histogram", lambda t: t[:, :-1], 3),
    ("calibrated", f"{LAYER}.histogram", lambda t: t[:0], 3),
    ("calibrated", f"{LAYER}.histogram", lambda t: t.float(), 3),
    ("calibrated", f"{LAYER}.range", at(NAN), 5),
    ("calibrated", f"{LAYER}.range", at(1e9), 3),
    ("calibrated", f"{LAYER}.range", lambda t: t[:-1], 3),
    ("calibrated", f"{LAYER}.channel_range", lambda t: t[:, :-1], 3),
    ("calibrated", f"{HEADS}.q.histogram", lambda t: torch.cat([t, t], 1), 3),
    ("calibrated", f"{HEADS}.probs.range", at(1e9), 3),
    ("calibrated", "trajectory.x", at(INFINITY), 5),
    ("calibrated", "trajectory.x", lambda t: t[:, :, :-1], 3),
    ("calibrated", "trajectory.x", lambda t: t[:0], 3),
    ("calibrated", "trajectory.x", lambda _: None, 3),
    ("calibrated", "trajectory.rows", at(10_000), 3),
    ("calibrated", "trajectory.rows", at(-1), 3),
    ("calibrated", "trajectory.rows", lambda t: t[:-1], 3),
    ("calibrated", "condition.nothing", lambda t: t, 3),
    ("distilled", f"{LAYER}.weight_scale", at(NAN), 5),
    ("distilled", f"{LAYER}.input_scale", at(0.0), 3),
    ("distilled", f"{LAYER}.input_scale", lambda t: t[:-1], 3),
    ("distilled", f"{LAYER}.weight_packed", lambda t: t[:, :-1], 3),
    ("distilled", f"{LAYER}.weight_packed", lambda _: None, 3),
    ("distilled", "nowhere.weight", lambda t: t, 3),
]


@pytest.mark.parametrize(
    ("file", "name", "change", "code"), CASES, ids=[f"{n}: {file} {t}" for n, (file, t, *_) in enumerate(CASES)]
)
def test_the_stage_that_reads_it_names_the_tensor(
    run: Run, chain: Path, file: str, name: str, change: Callable[[Tensor], Tensor | None], code: int
) -> None:
    changed(chain / f"{file}.safetensors", name, change)
    assert name in refused(run, chain, code, NEXT[file], f"{file}.safetensors", "--force")


@pytest.mark.parametrize("file", ["dilated", "calibrated", "distilled"])
@pytest.mark.parametrize(
    ("key", "value"), [("name", "nowhere"), ("groups", 2), ("bias", False), ("heads", 7), ("blocks", "nowhere")]
)
def test_a_manifest_whose_layers_or_blocks_the_network_lacks(
    run: Run, chain: Path, file: str, key: str, value: object
) -> None:
    path = chain / f"{file}.safetensors"
    note = open_artifact(path).manifest
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    number = next(i for i, layer in enumerate(note.layers) if (layer.kind == "attention") == (key == "heads"))
    if key == "blocks":
        if file == "distilled":
            pytest.skip("no stage reads the blocks of a distilled artifact")
        blocks = [replace(note.metrics.blocks[0], name=value), *note.metrics.blocks[1:]]
        note.metrics = replace(note.metrics, blocks=blocks)
    else:
        note.layers[number] = replace(note.layers[number], **{key: value})
    path.unlink()
    manifest_path(path).unlink()
    commit(path, tensors, note)
    refused(run, chain, 3, NEXT[file], path.name, "--force")


@pytest.mark.parametrize("format_name", ["dense", "onnx", "openvino", "compressed-tensors"])
def test_every_format_checks_the_distilled_tensors(run: Run, chain: Path, format_name: str) -> None:
    changed(chain / "distilled.safetensors", f"{LAYER}.input_scale", at(-1.0))
    assert LAYER in refused(run, chain, 3, "export", "--format", format_name, "-o", "new")
