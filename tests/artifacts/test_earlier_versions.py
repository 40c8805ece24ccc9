"""Artifacts of earlier versions: every later version reads them, or refuses them with the reason.

`tests/data/artifacts-0.1.0.tar.xz` holds the chain of a tiny model as dqtool 0.1.0 wrote it (`dilate model`, `calibrate --steps 2
--samples 4`, `distill --iters 1 --refine-iters 1`, `export`, `eval`; `wd.safetensors` is `dilate model --scaling wd`), and what its
exported network answered at every step in the simulation.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import torch
from conftest import Run
from safetensors.torch import load_file

import dqtool

DATA = Path(__file__).parents[1] / "data"
NEXT = {
    "wd.safetensors": ("calibrate", "--steps", "2", "--samples", "4"),
    "calibrated.safetensors": ("distill", "--iters", "0"),
    "distilled.safetensors": ("export",),
    "exported": ("eval", "--samples", "2", "--metrics", "cost"),
}


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("old")
    with tarfile.open(DATA / "artifacts-0.1.0.tar.xz") as archive:
        archive.extractall(directory)  # an archive of ours; Python before 3.11.4 knows no filter
    return directory


@pytest.mark.parametrize("name", [*NEXT, "dilated.safetensors", "eval.json"])
def test_it_is_inspected(run: Run, old: Path, name: str) -> None:
    result = run("inspect", name, "--json", cwd=old)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["version"] == "0.1.0"


@pytest.mark.parametrize("name", NEXT)
def test_the_next_stage_reads_it(run: Run, old: Path, name: str, tmp_path: Path) -> None:
    command, *options = NEXT[name]
    suffix = {"calibrate": ".safetensors", "distill": ".safetensors", "export": "", "eval": ".json"}[command]
    result = run(command, name, *options, "-o", str(tmp_path / f"out{suffix}"), cwd=old)
    assert result.returncode == 0, result.stderr


def test_a_file_whose_scaling_was_left_open_is_read_or_refused_with_what_to_do(
    run: Run, old: Path, tmp_path: Path
) -> None:
    out = str(tmp_path / "out.safetensors")
    result = run("calibrate", "dilated.safetensors", "--steps", "2", "--samples", "4", "-o", out, cwd=old)
    if result.returncode != 0:
        assert result.returncode == 3
        assert "dqtool dilate" in result.stderr


@pytest.mark.parametrize("runtime", ["simulate", "auto"])
def test_its_network_answers_as_it_did(old: Path, runtime: str) -> None:
    network = dqtool.load(str(old / "exported"), runtime=runtime)
    expected = load_file(old / "expected.safetensors")
    with torch.no_grad():
        for index, timestep in enumerate(expected["timesteps"].tolist()):
            answer = network(expected["x"], torch.tensor(timestep)).sample
            error = (answer - expected[f"y{index}"]).abs().max() / expected[f"y{index}"].abs().max()
            assert error < (1e-5 if runtime == "simulate" else 0.05)
