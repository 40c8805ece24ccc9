"""Every training method is chosen by name, lowers its loss, exports what it trained and resumes after an interruption."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from helpers import refused
from safetensors.torch import load_file, save_file

from dqtool.artifacts import open_artifact
from dqtool.errors import UsageError
from dqtool.models.networks.packed import packed_network
from dqtool.nn.assignment import LayerPlan
from dqtool.nn.surgery import packed_state, quant_layers
from dqtool.stages.distill import DistillOptions, distill, fingerprint_parameters
from dqtool.stages.shared.running import RunSettings
from dqtool.training.data import DistillationTask
from dqtool.training.methods import METHODS, method_options

FEW = {
    "bkd": {"iters": 4, "refine_iters": 2, "refine_images": 2, "batch_size": 8},
    "bkd-blockwise": {"iters": 3, "refine_iters": 3, "refine_images": 2, "batch_size": 8},
    "on-policy": {"iters": 12, "batch_size": 4, "images": 2, "refresh": 4},
    "adaround": {"iters": 6, "batch_size": 8},
    "per-step": {"iters": 8, "batch_size": 4},
    "lsq": {"iters": 12, "batch_size": 8},
    "lora-qat": {"iters": 12, "batch_size": 8},
    "qat-partial": {"iters": 8, "temporal_iters": 4, "batch_size": 8},
}
"""Options for a run of a few seconds."""
TRAINED = sorted(FEW)
MIB = 2**20


def options(name: str, **more: Any) -> Any:
    return replace(METHODS[name].options(), **FEW[name], **more)


def train(name: str, task: DistillationTask, bars: Any, **more: Any) -> dict[str, Any]:
    return METHODS[name].train(task, options(name, **more), bars)


def test_every_method_is_known_and_has_numbers_of_its_own() -> None:
    assert set(METHODS) == {"ptq", *FEW}
    assert next(iter(METHODS)) == "bkd"
    for method in METHODS.values():
        assert method.work(method.options(), 7)


def test_names_are_known_without_torch() -> None:
    code = "import sys, dqtool.training.methods as m; assert 'lsq' in m.METHODS; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_options_are_resolved_into_the_parameters() -> None:
    given = fingerprint_parameters(DistillOptions(method="lsq", iters=7, batch_size=4))
    assert given["recipe"]["iters"] == 7
    assert given["recipe"]["batch_size"] == 4
    assert given["recipe"]["rates"]["weight"] > 0
    assert method_options(METHODS["bkd"], {"iters": 0}).refine_iters == 0
    assert method_options(METHODS["ptq"], {"iters": None}).iters == 0


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"method": "magic"}, "unknown method"),
        ({"preset": "odd"}, "unknown preset"),
        ({"method": "lsq", "refine_iters": 3}, "no use"),
        ({"method": "lsq", "blocks": "mid.*"}, "as a whole"),
        ({"method": "ptq", "iters": 3}, "trains nothing"),
    ],
)
def test_what_does_not_exist_or_fit_is_refused(given: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        DistillOptions(**given)


@pytest.mark.parametrize("arguments", [("--method", "magic"), ("--preset", "odd"), ("--train-samples", "3")])
def test_the_command_line_says_so(made: Path, run: Run, arguments: tuple[str, str]) -> None:
    assert arguments[0] in refused(run, made, 2, "distill", *arguments, "-o", "x.safetensors")


def plans_of(task: DistillationTask) -> list[LayerPlan]:
    plans = []
    for info in task.trace.layers:
        module = task.student.get_submodule(info.name)
        if info.kind == "attention":
            plans.append(LayerPlan(info, module.processor.bits))
        else:
            plans.append(LayerPlan(info, module.bits, module.dilation is not None))
    return plans


@pytest.mark.parametrize("name", TRAINED)
def test_losses_are_recorded_and_what_ships_is_what_was_trained(
    task: DistillationTask, silent: Any, tmp_path: Path, name: str
) -> None:
    metrics = train(name, task, silent.bars)
    assert 2 <= len(metrics["loss_curve"]) <= 200
    assert all(0 < loss < 100 for loss in metrics["loss_curve"])
    assert not any(parameter.requires_grad for parameter in task.student.parameters())
    path = tmp_path / "state.safetensors"
    save_file({k: v.clone() for k, v in packed_state(task.student).items()}, path)
    shipped = packed_network("UNet2DModel", task.teacher.config, plans_of(task), load_file(path))
    for name_of_layer, layer in quant_layers(task.student).items():
        other = shipped.get_submodule(name_of_layer)
        assert torch.equal(layer.quantized_weight(), other.quantized_weight()), name_of_layer
    with torch.no_grad():
        assert torch.equal(task.predict(task.student, slice(None)), task.predict(shipped, slice(None)))


def first_blocks(task: DistillationTask) -> list[str]:
    """Return the first blocks, among them one with a projection of the time embedding and one with attention."""
    names = [info.name for info in task.trace.blocks]
    return names[: next(i for i, name in enumerate(names) if "attentions" in name) + 1]


def _interrupted(name: str, task: DistillationTask, silent_class: Any, after: int) -> DistillationTask:
    half = copy.deepcopy(task)
    half.checkpoint_seconds = 0
    with pytest.raises(KeyboardInterrupt):
        train(name, half, silent_class(after).bars)
    assert half.store.kept  # type: ignore[attr-defined]
    return half


@pytest.mark.parametrize("name", TRAINED)
def test_an_interrupted_run_ends_with_the_same_bits(task: DistillationTask, silent: Any, name: str) -> None:
    task.only = first_blocks(task)
    whole, resumed = copy.deepcopy(task), copy.deepcopy(task)
    expected_metrics = train(name, whole, silent.bars)
    resumed.store = _interrupted(name, task, type(silent), 10).store
    metrics = train(name, resumed, silent.bars)
    expected, got = packed_state(whole.student), packed_state(resumed.student)
    assert expected.keys() == got.keys()
    for key in expected:
        assert torch.equal(expected[key], got[key]), key
    assert metrics["loss_curve"] == expected_metrics["loss_curve"]


@pytest.mark.parametrize("name", ["per-step"])
def test_the_stage_trains_packs_and_says_what_it_cost(chain: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method = METHODS[name]
    held = 96 * MIB

    def train_and_hold(*arguments: Any) -> dict[str, Any]:
        # The tiny model fits into memory that the process already holds, so only a large new tensor raises the peak.
        hold = torch.ones(held, dtype=torch.uint8)
        metrics = method.train(*arguments)
        del hold
        return metrics

    monkeypatch.setitem(METHODS, name, replace(method, train=train_and_hold))
    given = DistillOptions(
        str(chain / "calibrated.safetensors"), str(chain / "m.safetensors"), method=name, iters=4, train_samples=8
    )
    gc.collect()  # garbage of other tests, freed after the level is read, would hide the new tensor
    artifact = open_artifact(distill(given, RunSettings(quiet=True)))
    metrics = artifact.manifest.metrics.as_read
    assert artifact.manifest.parameters.as_read["train_samples"] == 8
    assert metrics["training_seconds"] > 0
    assert metrics["training_cpu_seconds"] > 0
    if sys.platform == "linux":
        assert 0.8 * held < metrics["peak_anonymous_bytes"] < 4 * held
        assert 0.8 * held < metrics["peak_memory_bytes"] < 4 * held


def test_a_nonstandard_preset_keeps_what_rivals_keep(chain: Path) -> None:
    given = DistillOptions(
        str(chain / "calibrated.safetensors"), str(chain / "m.safetensors"), method="ptq", preset="nonstandard"
    )
    layers = {
        layer.name: list(layer.bits or ())
        for layer in open_artifact(distill(given, RunSettings(quiet=True))).manifest.layers
    }
    floats = {name for name, bits in layers.items() if bits == [16, 16]}
    assert "up_blocks.0.upsamplers.0.conv" in floats
    assert "down_blocks.1.resnets.0.conv_shortcut" in floats
    assert "mid_block.attentions.0" in floats
    assert layers["conv_in"] == layers["conv_out"] == [8, 8]
    assert layers["mid_block.resnets.0.conv1"] == [4, 4]


def test_training_points_are_drawn_evenly_over_the_steps(task: DistillationTask) -> None:
    part = task.trajectory.subset(6, 0)
    assert len(part) == 6
    assert sorted(torch.bincount(part.rows, minlength=4).tolist()) == [1, 1, 2, 2]
    assert torch.equal(part.x, task.trajectory.subset(6, 0).x)
    assert torch.equal(task.trajectory.subset(16, 0).x, task.trajectory.x)


@pytest.mark.parametrize("name", TRAINED)
def test_no_iterations_is_ptq(task: DistillationTask, silent: Any, name: str) -> None:
    task.only = first_blocks(task)
    before = packed_state(copy.deepcopy(task.student))
    METHODS[name].train(task, method_options(METHODS[name], {"iters": 0}), silent.bars)
    after = packed_state(task.student)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]), key
