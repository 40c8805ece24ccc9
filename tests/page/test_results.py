from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import Run

from dqtool.errors import ArtifactError, EnvironmentFault
from dqtool.page.results import chain_key, find_results


def test_a_result_finds_its_chain_by_content_wherever_it_lies(made: Path, tmp_path: Path):
    for name in ("calibrated", "distilled"):  # names and directory differ from those in the manifests
        for suffix in (".safetensors", ".json"):
            (tmp_path / "deep" / "er").mkdir(parents=True, exist_ok=True)
            shutil.copy(made / f"{name}{suffix}", tmp_path / "deep" / "er" / f"{name}{suffix}")
    shutil.copytree(made / "exported", tmp_path / "deep" / "w4")
    shutil.copy(made / "eval.json", tmp_path / "eval.json")
    (result,), benches = find_results([str(tmp_path)])
    assert (result.name, benches) == (tmp_path.name, [])
    assert result.chain["export"] == tmp_path / "deep" / "w4"
    assert sorted(result.chain) == ["calibrate", "distill", "export"]
    assert result.open("distill").sha256 == result.manifests["export"].inputs[0].sha256
    with pytest.raises(ArtifactError, match="dilated artifact"):
        result.open("dilate")


def test_another_artifact_of_the_same_name_is_not_the_one_measured(chain: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(chain)
    note = json.loads((chain / "distilled.json").read_text())
    (chain / "distilled.json").unlink()
    (result,), _ = find_results(["eval.json"])
    assert note["stage"] == "distill"
    assert sorted(result.chain) == ["export"]


def test_names_are_as_long_as_they_must_be(chain: Path):
    for name in ("a/run/eval.json", "b/run/eval.json", "c/other.json"):
        (chain / name).parent.mkdir(parents=True)
        shutil.copy(chain / "eval.json", chain / name)
    results, _ = find_results([str(chain / name) for name in ("a", "b", "c", "a/run/eval.json")])
    assert [result.name for result in results] == ["a/run", "b/run", "other"]


def test_results_of_different_numbers_of_images_are_not_compared(run: Run, chain: Path):
    assert run("eval", "--samples", "6", "-o", "six.json", cwd=chain).returncode == 0
    assert run("eval", "--samples", "4", "--seed", "1", "-o", "seed.json", cwd=chain).returncode == 0
    results, _ = find_results([str(chain / name) for name in ("eval.json", "six.json", "seed.json")])
    keys = [chain_key(result) for result in results]
    assert keys[0] == keys[2] != keys[1]
    assert run("report", ".", cwd=chain).returncode == 0
    page = (chain / "report.html").read_text()
    assert ">tiny, 4 images<" in page
    assert ">tiny, 6 images<" in page
    assert "3 results of 1 model;" in page


def test_faults(chain: Path):
    with pytest.raises(EnvironmentFault, match="no such file"):
        find_results([str(chain / "gone")])
    for stranger in ("distilled.json", "distilled.safetensors", "tiny/unet/config.json"):
        with pytest.raises(ArtifactError, match="not an eval result"):
            find_results([str(chain / stranger)])
    with pytest.raises(ArtifactError, match="no eval result here"):
        find_results([str(chain / "tiny")])
    text = (chain / "eval.json").read_text()
    (chain / "eval.json").write_text(text[: len(text) // 2])
    with pytest.raises(ArtifactError, match="not valid JSON"):
        find_results([str(chain)])
    (chain / "eval.json").write_text(text.replace('"samples": 4', '"samples": 5000'))
    with pytest.raises(ArtifactError, match="changed after"):
        find_results([str(chain)])


def test_faults_of_neighbours_do_not_matter_to_a_named_file(chain: Path):
    (chain / "broken.json").write_text("{")
    (result,), _ = find_results([str(chain / "eval.json")])
    assert sorted(result.chain) == ["calibrate", "dilate", "distill", "export"]
