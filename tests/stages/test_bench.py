"""`dqtool bench` on the tiny model: who is measured, what the report holds, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_pipeline

from dqtool.artifacts.bench_report import BenchReport
from dqtool.artifacts.schema import unchecked
from dqtool.bench import openvino_contenders, probe
from dqtool.bench.contenders import CONTENDERS, contender_names
from dqtool.errors import ArtifactError, EnvironmentFault, NumericError, UsageError
from dqtool.runtimes import RUNTIMES
from dqtool.stages.bench import _runtimes, bench, render
from dqtool.stages.options.bench import BenchOptions
from dqtool.stages.options.declared import build_options
from dqtool.stages.shared.settings import RunSettings

HAS_NNCF = all(importlib.util.find_spec(name) for name in ("openvino", "nncf"))


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh processes take seconds to import torch; tests/bench/test_probe.py has them."""
    monkeypatch.setattr(probe, "_child", lambda request: (probe.answer(request, lambda: None), 1 << 40))


def measure(made: Path, **options: Any) -> dict[str, Any]:
    given = {"runtime": ("simulate",), "against": (), "batch": (1,), "seconds": 0.0, "memory": False, **options}
    found = bench(BenchOptions(str(made / "exported"), **given), RunSettings())
    assert isinstance(found, BenchReport)
    return found.to_json()


def test_every_contender_is_timed_at_every_batch(made: Path, tmp_path: Path):
    output = tmp_path / "bench.json"
    result = measure(made, against=("fp32", "bf16"), batch=(1, 3), output=str(output))
    assert set(result["speed"]) == {"1", "3"}
    for rows in result["speed"].values():
        by_name = {row["contender"]: row for row in rows}
        assert set(by_name) == {"simulate", "fp32", "fp32-channels-last", "bf16", "bf16-channels-last"}
        medians = [row["median"] for row in rows]
        assert medians == sorted(medians)
        baseline = next(row for row in rows if row["baseline"])
        assert baseline["median"] == min(by_name["fp32"]["median"], by_name["fp32-channels-last"]["median"])
        for row in rows:
            assert row["ratio"] == pytest.approx(baseline["median"] / row["median"])
            assert row["p10"] <= row["median"] <= row["p90"]
            assert row["calls"] >= 5
    assert result["model"]["bits"] == "4/4"
    assert result["model"]["file_bytes"] > 0
    assert result["machine"]["threads"] >= 1
    assert json.loads(output.read_text()) == json.loads(json.dumps(result))
    text = "\n".join(render(unchecked(result, BenchReport)))
    assert "ratios to fp32" in text
    assert "batch 3" in text
    assert result["machine"]["expect"] in text


def test_load_and_memory_of_each_contender_but_not_of_layouts(made: Path):
    result = measure(made, against=("fp32",), memory=True)
    assert [row["contender"] for row in result["load"]] == ["simulate", "fp32"]
    assert all(0 < row["load"] < row["ready"] for row in result["load"])
    text = "\n".join(render(unchecked(result, BenchReport)))
    _, header, _, *table = text.split("after imports\n")[1].splitlines()
    assert header.startswith("contender")
    assert [line.split()[0] for line in table[:2]] == ["simulate", "fp32"]
    assert "simulate: in memory a weight takes packed bits" in text


def test_unsteady_figures_are_called_so(made: Path):
    result = measure(made)
    result["speed"]["1"][0] |= {"p10": 0.1, "p90": 0.2}
    assert "unsteady, something else is running on this machine: simulate" in "\n".join(
        render(unchecked(result, BenchReport))
    )
    result["speed"]["1"][0] |= {"p10": 0.1, "p90": 0.12}
    assert "unsteady" not in "\n".join(render(unchecked(result, BenchReport)))


def test_without_float32_there_are_no_ratios(made: Path):
    result = measure(made)
    assert [row["ratio"] for row in result["speed"]["1"]] == [None]
    assert "no ratios" in "\n".join(render(unchecked(result, BenchReport)))


def test_auto_says_what_it_took(made: Path):
    rows = measure(made, runtime=())["speed"]["1"]
    assert [row["contender"] for row in rows] == ["auto"]
    assert rows[0]["note"].startswith("took ")


def test_all_is_every_runtime_that_can_run_here_and_auto(made: Path):
    names = {row["contender"] for row in measure(made, runtime=("all",))["speed"]["1"]}
    able = {name for name, runtime in RUNTIMES.items() if runtime.engine().available() is None}
    assert names == (able - {"simulate", "cuda"}) | {"auto"}
    assert "cpu" in names
    with pytest.raises(UsageError, match="--device cuda"):
        _runtimes(("cuda",))


@pytest.mark.parametrize(("kind", "names"), [("dense", {"simulate"}), ("openvino", {"openvino", "openvino-bf16"})])
def test_all_is_what_can_run_the_format(kind: str, names: set[str]):
    able = {name for name in names if RUNTIMES[name].engine().available() is None}
    assert set(_runtimes(("all",), kind)) == able | {"auto"}


@pytest.mark.skipif(not HAS_NNCF, reason="needs the extra nncf")
def test_openvinos_own_quantization(made: Path):
    names = {row["contender"] for row in measure(made, against=("nncf-int8",))["speed"]["1"]}
    assert names == {"simulate", "nncf-int8"}


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(EnvironmentFault, match=r"pip install \"dqtool\[nncf\]\""):
        openvino_contenders.require("nncf", "nncf")


def test_a_reference_of_another_class_is_refused(made: Path, tmp_path: Path):
    from dqtool.bench.reference import float_network
    from dqtool.bench.subject import Subject

    subject = Subject("d", "DiTTransformer2DModel", {}, [0.0], str(tmp_path), 1, str(made / "tiny"))
    with pytest.raises(ArtifactError, match="UNet2DModel"):
        float_network(subject)


@pytest.mark.parametrize("change", [{"out_channels": 2}, {"layers_per_block": 2}], ids=str)
def test_a_reference_of_another_size_is_refused(made: Path, tmp_path: Path, change: dict[str, Any]):
    other = tiny_pipeline(tmp_path / "other", **{"in_channels": 1} | change)
    with pytest.raises(ArtifactError, match="another network"):
        measure(made, against=("fp32",), reference=str(other))


def test_numbers_that_are_not_finite_are_no_benchmark(made: Path, monkeypatch: pytest.MonkeyPatch):
    from dqtool import runtimes

    def broken(directory: str, runtime: str = "auto") -> Any:
        network = original(directory, runtime)
        network.conv_out.bias.fill_(float("nan"))
        return network

    original = runtimes.load
    monkeypatch.setattr(runtimes, "load", broken)
    with pytest.raises(NumericError, match="simulate"):
        measure(made)


@pytest.mark.parametrize(
    "options",
    [
        {"artifact": "x", "arch": "sd14"},
        {"against": ("fp31",)},
        {"batch": (0,)},
        {"threads": 0},
        {"seconds": -1.0},
        {"seconds": float("nan")},
        {"bits": "1/1"},
        {"arch": "sd14", "reference": "x"},
    ],
)
def test_what_can_not_be_measured(options: dict[str, Any]):
    with pytest.raises(UsageError):
        build_options(BenchOptions, options)


def test_lists_are_given_as_one_text():
    made = build_options(BenchOptions, {"batch": "1, 4", "against": "fp32,nncf-int8"})
    assert (made.batch, made.against) == ((1, 4), ("fp32", "nncf-int8"))
    assert not contender_names(build_options(BenchOptions, {"against": "none"}).against)
    with pytest.raises(UsageError, match="not a list of whole numbers"):
        build_options(BenchOptions, {"batch": "1,x"})


def test_unknown_names(made: Path):
    with pytest.raises(UsageError, match="--runtime"):
        measure(made, runtime=("fast",))
    with pytest.raises(UsageError, match="ddpm-cifar10"):
        bench(BenchOptions(arch="nothing"), RunSettings())


def test_float_names_stand_for_both_memory_formats():
    assert contender_names(["fp32", "nncf-int8", "fp32"]) == ["fp32", "fp32-channels-last", "nncf-int8"]
    assert set(CONTENDERS) >= {"fp32", "bf16", "fp32-compile", "nncf-int8"}
