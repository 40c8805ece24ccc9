"""Stages that two processes share, against one process: the same samples, statistics, steps of training and files."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distillation_tasks import Silent
from processes import in_processes

from dqtool import distributed
from dqtool.artifacts import Workspace, open_artifact
from dqtool.models.networks.loading import network_of
from dqtool.models.networks.packed import layer_infos
from dqtool.nn.statistics import collect
from dqtool.precision.kept_errors import kept_errors
from dqtool.stages.evaluation.images import maker_of_artifact
from dqtool.stages.shared.artifact_models import split_dilated, teacher_of
from dqtool.training.bkd import distill_blocks
from dqtool.training.data import DistillationTask, Trajectory
from dqtool.training.on_policy import refine
from dqtool.training.options import BkdOptions
from dqtool.training.prediction import correct_predictions
from dqtool.training.sharing import Share


def parameters_of(task: DistillationTask) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in task.student.named_parameters()}


def largest_difference(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    """Largest difference relative to the largest value of each tensor."""
    assert one.keys() == two.keys()
    return max(
        float((a - two[name]).abs().max()) / max(1e-6, float(a.abs().max())) for name, a in one.items() if a.numel()
    )


def test_images_belong_to_seeds(made: Path) -> None:
    artifact = open_artifact(made / "calibrated.safetensors")

    def draw(count: int, batch: int) -> torch.Tensor:
        network = teacher_of(artifact.manifest, artifact.tensors())
        return maker_of_artifact(artifact, count, seed=3).draw(network, count, 3, batch, "test")

    one = draw(8, 4)
    whole, nothing = in_processes(2, lambda: draw(8, 4))
    assert torch.equal(whole, one)  # each process samples the batches that one process would
    assert not len(nothing)
    uneven = in_processes(3, lambda: draw(7, 5))[0]
    torch.testing.assert_close(uneven, draw(8, 3)[:7], atol=1e-4, rtol=1e-4)


def test_a_cache_of_one_machine_alone_decides_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def errors() -> tuple[dict[tuple[str, str], dict[int, float]], int]:
        monkeypatch.setenv("DQTOOL_CACHE", str(tmp_path / str(distributed.rank())))
        made = []

        def make() -> dict[tuple[str, str], dict[int, float]]:
            distributed.barrier()
            made.append(1)
            return {("layer", "input"): {4: 1.0 + distributed.rank()}}

        return kept_errors({"artifact": "x"}, make), len(made)

    assert in_processes(2, errors) == [({("layer", "input"): {4: 1.0}}, 1)] * 2
    shutil.rmtree(tmp_path / "1")
    assert in_processes(2, errors) == [({("layer", "input"): {4: 1.0}}, 0)] * 2


def test_statistics_of_every_step_are_the_same_bits(made: Path) -> None:
    artifact = open_artifact(made / "calibrated.safetensors")
    manifest, tensors = artifact.manifest, artifact.tensors()
    family, _ = network_of(manifest.network)
    points = Trajectory.from_tensors(tensors)

    def work() -> dict[str, torch.Tensor]:
        network = teacher_of(manifest, tensors)
        runs: list[Callable[[], Any]] = [
            lambda step=step: family.predict(network, *points.arguments((points.rows == step).nonzero()[:, 0]))
            for step in range(len(points.timesteps))
        ]
        return collect(network, layer_infos(manifest.layers), split_dilated(tensors)[1], runs)

    one = work()
    for found in in_processes(3, work):  # four steps: the last turn has one
        assert found.keys() == one.keys()
        assert all(torch.equal(found[name], one[name]) for name in one)


def test_two_processes_train_blocks_as_one_does(task: DistillationTask) -> None:
    options = BkdOptions(iters=3, batch_size=8)

    def work() -> tuple[dict[str, torch.Tensor], Any]:
        mine = copy.deepcopy(task)
        metrics = distill_blocks(replace(mine, only=["conv_in", "down_blocks.0.resnets.0"]), options, Silent())
        return parameters_of(mine), metrics["block_loss"]

    one, losses = work()
    for found, seen in in_processes(2, work):
        for name, pair in losses.items():
            assert torch.allclose(torch.tensor(seen[name]), torch.tensor(pair), rtol=1e-4)
        assert largest_difference(one, found) < 1e-2  # Adam divides gradients of the size of rounding by themselves
    assert largest_difference(*(found for found, _ in in_processes(2, work))) == 0


def test_two_processes_train_and_correct_the_whole_network_as_one_does(task: DistillationTask, made: Path) -> None:
    options = BkdOptions(refine_iters=2, refine_images=4).second_pass()
    config = open_artifact(made / "calibrated.safetensors").manifest.network.config

    def work() -> tuple[list[float], dict[str, Any]]:
        mine = copy.deepcopy(task)
        losses = refine(mine, options, Silent()).losses
        return losses, correct_predictions(mine, config, 6, Silent())

    losses, slope = work()
    for seen, found in in_processes(2, work):
        # Smaller batches round differently, and Adam's first step has full size however small a gradient is: after it, codes
        # at a rounding boundary differ, more on some processors than on others.
        assert seen[0] == pytest.approx(losses[0], rel=1e-4)
        assert seen[1:] == pytest.approx(losses[1:], rel=0.03)
        assert abs(found["prediction_slope"] - slope["prediction_slope"]) < 0.05


def test_training_goes_on_with_another_number_of_processes(task: DistillationTask, tmp_path: Path) -> None:
    options = BkdOptions(iters=2, batch_size=8)
    whole = copy.deepcopy(task)
    distill_blocks(replace(whole, only=["conv_in", "conv_out"]), options, Silent())

    def work() -> dict[str, torch.Tensor]:
        store = Workspace(tmp_path / "out.safetensors", "key")
        mine = replace(copy.deepcopy(task), store=store, only=["conv_in", "conv_out"])
        distill_blocks(mine, options, Silent())
        return parameters_of(mine)

    interrupted = replace(copy.deepcopy(task), store=Workspace(tmp_path / "out.safetensors", "key"), only=["conv_in"])
    distill_blocks(interrupted, options, Silent())
    before = parameters_of(interrupted)
    for found in in_processes(2, work):
        assert torch.equal(found["conv_in.weight"], before["conv_in.weight"])
        assert largest_difference(parameters_of(whole), found) < 1e-2
    assert Workspace(tmp_path / "out.safetensors", "key").keys() == ["conv_in", "conv_out"]


def test_a_share_has_samples_of_every_step() -> None:
    def work() -> tuple[int, Any, Any]:
        share = Share(7)
        mine, rows = share.among(torch.tensor([6, 1, 1, 4, 3]))
        return len(share), torch.arange(7)[share.indices(slice(1, len(share)))].tolist(), (mine.tolist(), rows.tolist())

    assert in_processes(2, work) == [
        (4, [2, 4, 6], ([6, 4], [3, 2])),
        (3, [3, 5], ([1, 1, 3], [0, 0, 1])),
    ]


def test_a_command_writes_one_artifact(chain: Path, run: Any) -> None:
    def command(*arguments: str) -> Callable[[], tuple[int, str]]:
        def work() -> tuple[int, str]:
            from dqtool.stages.calibrate import CalibrateOptions, calibrate
            from dqtool.stages.eval import EvalOptions, evaluate
            from dqtool.stages.shared.settings import RunSettings

            settings = RunSettings(quiet=True)
            given = {"output": arguments[0]}
            if arguments[0].endswith("safetensors"):
                path = calibrate(
                    CalibrateOptions(str(chain / "dilated.safetensors"), samples=16, steps=4, **given), settings
                )
            else:
                exported, tiny = str(chain / "exported"), str(chain / "tiny")
                path = evaluate(EvalOptions(exported, reference=tiny, samples=6, batch_size=2, **given), settings)
            assert settings.log[-1].cached == (len(arguments) > 1)
            return distributed.rank(), path

        return work

    made = str(chain / "two.safetensors")
    assert in_processes(2, command(made)) == [(0, made), (1, made)]
    assert in_processes(2, command(made, "cached")) == [(0, made), (1, made)]
    assert json.loads((chain / "two.json").read_text())["environment"]["processes"] == 2
    one, two = (open_artifact(chain / name).tensors() for name in ("calibrated.safetensors", "two.safetensors"))
    torch.testing.assert_close(two["trajectory.x"], one["trajectory.x"], atol=1e-4, rtol=1e-4)
    report = str(chain / "two-eval.json")
    in_processes(2, command(report))
    options = ("--reference", "tiny", "--samples", "6", "--batch-size", "2", "-o", "one-eval.json")
    assert run("eval", "exported", *options, cwd=chain).returncode == 0
    pair = [json.loads((chain / name).read_text())["metrics"] for name in ("one-eval.json", "two-eval.json")]
    assert abs(pair[0]["psnr"]["mean"] - pair[1]["psnr"]["mean"]) < 0.05
    assert pair[0]["cost"] == pair[1]["cost"]
