"""An artifact from a stranger chooses no path that is read: only places that the user named, or beside it, count."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import Run
from helpers import refused, resigned

from dqtool.artifacts.named import may_read, remember_named

EVAL = ("eval", "exported", "--samples", "4", "--metrics", "similarity", "--force")


@pytest.fixture
def stranger(chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the directory of artifacts that come from elsewhere: nothing was named on this machine."""
    monkeypatch.setenv("DQTOOL_CACHE", str(tmp_path / "cache"))
    return chain


def recorded(directory: Path, **entries: object) -> None:
    note = directory / "exported" / "dqtool.json"
    content = json.loads(note.read_text())
    content["model"] |= entries
    resigned(note, content)


def test_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DQTOOL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a").mkdir()
    for name in ("a/artifact", "a/model", "secret", "named"):
        (tmp_path / name).write_text("")
    (tmp_path / "a" / "link").symlink_to(tmp_path / "secret")
    artifact = tmp_path / "a" / "artifact"
    assert may_read(tmp_path / "a" / "model", [artifact])
    assert not may_read(tmp_path / "a" / ".." / "secret", [artifact])
    assert not may_read(tmp_path / "a" / "link", [artifact])
    assert not may_read(tmp_path / "a" / "gone", [artifact])
    assert not may_read(tmp_path / "named", [artifact])
    assert not may_read("org/model", [artifact])
    remember_named([tmp_path / "named", "org/model"])
    assert may_read(tmp_path / "named", [artifact])
    assert may_read("org/model", [artifact])
    assert may_read("zoo:digits-ddpm", [])
    assert not may_read("a\0b", [artifact])
    monkeypatch.setenv("DQTOOL_CACHE", "/dev/null/nowhere")
    remember_named(["x"])
    assert not may_read("x", [])


def test_a_model_beside_the_artifact_is_its_reference(run: Run, stranger: Path) -> None:
    result = run(*EVAL, cwd=stranger)
    assert result.returncode == 0, result.stderr
    assert "similarity" in (stranger / "eval.json").read_text()
    assert "not named" not in result.stderr


def test_a_model_elsewhere_is_asked_for_until_it_was_named(run: Run, stranger: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.move(stranger / "tiny", elsewhere)
    recorded(stranger, source=str(elsewhere))
    result = run(*EVAL, cwd=stranger)
    assert result.returncode == 0, result.stderr
    assert "--reference" in result.stderr
    assert not json.loads((stranger / "eval.json").read_text())["metrics"].get("psnr")
    result = run(*EVAL, "--reference", str(elsewhere), cwd=stranger)
    assert result.returncode == 0, result.stderr
    assert "--reference" not in result.stderr
    result = run(*EVAL, cwd=stranger)  # now it was named
    assert "--reference" not in result.stderr


@pytest.mark.parametrize(
    "entries",
    [
        {"source_config": "/etc/hostname"},
        {"source_loras": ["/etc/hostname:0.5"]},
        {"source_told": {"pipeline": "/etc"}},
        {"source_told": {"scheduler": "/etc/hostname"}},
        {"source_told": {"tokenizer": "/etc"}},
    ],
)
def test_parts_of_a_reference_are_no_other_files_either(run: Run, stranger: Path, entries: dict[str, object]) -> None:
    recorded(stranger, **entries)
    result = run(*EVAL, cwd=stranger)
    assert result.returncode == 0, result.stderr
    assert "was not named" in result.stderr
    assert "was not named" in refused(run, stranger, 3, *EVAL, "--reference", "tiny")


def test_a_hub_model_is_not_downloaded_for_a_stranger(run: Run, stranger: Path) -> None:
    recorded(stranger, source="some/model")
    result = run(*EVAL, cwd=stranger)
    assert result.returncode == 0, result.stderr
    assert "was not named" in result.stderr


@pytest.mark.parametrize(
    "conditions",
    [
        {"from": "file", "path": "/etc/hostname", "sha256": "0" * 64},
        {"from": "pipeline", "path": "/etc", "sha256": "0" * 64},
        {"from": "file"},
    ],
)
def test_conditions_are_no_other_files(run: Run, stranger: Path, conditions: dict[str, object]) -> None:
    note = stranger / "exported" / "dqtool.json"
    content = json.loads(note.read_text())
    content["pipeline"]["sampling"]["conditions"] = conditions
    resigned(note, content)
    assert "Name them with" in refused(run, stranger, 4, *EVAL)
    assert "Name them with" in refused(run, stranger, 4, "sample", "exported", "-n", "1", "--steps", "4")


@pytest.mark.parametrize("conditions", [{"from": "file", "path": 3}, {"path": "x"}, {"from": "web", "path": "x"}, []])
def test_conditions_of_a_wrong_form_are_refused(run: Run, stranger: Path, conditions: object) -> None:
    note = stranger / "exported" / "dqtool.json"
    content = json.loads(note.read_text())
    content["pipeline"]["sampling"]["conditions"] = conditions
    resigned(note, content)
    assert "conditions" in refused(run, stranger, 3, *EVAL)


def test_a_page_reads_no_artifact_elsewhere(run: Run, stranger: Path, tmp_path: Path) -> None:
    from dqtool.page.results import find_results

    away = tmp_path / "away"
    away.mkdir()
    for name in ("exported", "distilled.safetensors", "distilled.json"):
        shutil.move(stranger / name, away / name)
    report = stranger / "eval.json"
    content = json.loads(report.read_text())
    content["inputs"][0]["name"] = str(away / "exported")
    resigned(report, content)
    assert "export" not in find_results([str(report)])[0][0].chain
    remember_named([away / "exported"])
    assert "export" in find_results([str(report)])[0][0].chain
