"""`dqtool bench --device cuda`, on the CPU in Triton's interpreter: everything but CUDA events, graphs and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the kernels of the cuda runtime are written in Triton")

from dqtool.artifacts import open_artifact
from dqtool.artifacts.bench_report import BenchReport
from dqtool.artifacts.schema import unchecked
from dqtool.bench import gpu_contenders
from dqtool.bench.gpu_bench import device_contenders
from dqtool.bench.gpu_names import GPU_CONTENDERS
from dqtool.errors import EnvironmentFault, UsageError
from dqtool.runtimes import cuda
from dqtool.runtimes.cuda import launch
from dqtool.runtimes.cuda.ops import image_codes
from dqtool.stages.bench import BenchPlan, bench, on_one_device, render
from dqtool.stages.options.bench import BenchOptions
from dqtool.stages.shared.settings import RunSettings

CPU = torch.device("cpu")


def no_codes(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    return image_codes(x, list(rest[3])).zero_()


def test_the_report_of_a_device(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cuda.ON_CPU, "1")
    monkeypatch.setattr(
        launch, "multiply_codes", lambda *args, **_: args[9].zero_()
    )  # the interpreter takes seconds a step
    monkeypatch.setattr(launch, "quantize_image", no_codes)
    monkeypatch.setattr(gpu_contenders, "WARM_UP", 0)
    monkeypatch.setattr(gpu_contenders, "LEAST_STEPS", 2)
    options = BenchOptions(str(made / "exported"), seconds=0.0)
    names = ["ours", "fp32", "fp16", "fp16-graph"]
    result = on_one_device(open_artifact(str(made / "exported"), ["export"]), options, CPU, names, [1])
    by_name = {row.contender: row for row in result.speed["1"]}
    assert set(by_name) == {"ours", "fp32", "fp16"} and by_name["fp32"].ratio == 1.0 and by_name["fp32"].calls == 2
    assert by_name["ours"].ratio == pytest.approx(by_name["fp32"].median / by_name["ours"].median)
    assert list(result.left_out) == ["fp16-graph"]  # no CUDA: the others go on
    weights = {row.contender: row.weight_bytes or 0 for row in result.load}
    assert weights["fp16"] == weights["fp32"] // 2 and weights["ours"] > 0
    assert sum(row.count for row in result.kernels) > 10 and all(0 < row.reached <= 1 for row in result.kernels)
    text = "\n".join(render(unchecked(result.to_json(), BenchReport)))
    assert "of the limit" in text and "weights MiB" in text and "left out: fp16-graph" in text


def test_contenders_of_a_device() -> None:
    found = device_contenders((), CPU)
    assert "ours" in found and "fp16" in found and not any(name.endswith("-graph") for name in found)
    assert device_contenders(("fp32",), torch.device("cuda")) == [
        name for name in GPU_CONTENDERS if name.startswith("ours") or name == "fp32"
    ]
    with pytest.raises(UsageError, match="nncf-int8"):
        device_contenders(("nncf-int8",), CPU)
    with pytest.raises(EnvironmentFault, match="fp16-graph"):
        device_contenders(("fp16-graph",), CPU)


def test_the_plan_needs_no_gpu() -> None:
    plan = bench(BenchOptions(arch="sd14", against=("fp16-compile",)), RunSettings(device="cuda", dry_run=True))
    assert isinstance(plan, BenchPlan) and "fp16-compile" in plan.contenders and plan.batches == [2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(EnvironmentFault, match="no device cuda"):
        bench(BenchOptions(arch="sd14"), RunSettings(device="cuda"))
