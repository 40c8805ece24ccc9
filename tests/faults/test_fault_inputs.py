"""Inputs that are missing, damaged, foreign or of another stage: exit code, one paragraph, nothing written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Run
from helpers import listing, refused, rewrite_weights, tiny_pipeline, weights_of

from dqtool.artifacts import lock

FIRST = "down_blocks.0.resnets.0.conv1.weight"


class TestMissing:
    @pytest.mark.parametrize(
        "arguments",
        [
            ("dilate", "gone"),
            ("dilate", "gone.safetensors"),
            ("dilate", "zoo:gone"),
            ("calibrate", "gone.safetensors"),
            ("distill", "gone.safetensors"),
            ("export", "gone.safetensors"),
            ("eval", "gone"),
            ("eval", "exported", "--reference", "gone", "-o", "new.json"),
            ("sample", "gone"),
            ("inspect", "gone"),
            ("run", "gone.yaml"),
        ],
        ids=" ".join,
    )
    def test_path(self, run: Run, made: Path, arguments: tuple[str, ...]):
        assert "gone" in refused(run, made, 4, *arguments)


class TestModel:
    @pytest.mark.parametrize(
        ("content", "word"),
        [(slice(0, -100), "truncated"), (slice(0, 20), "truncated"), (slice(0, 0), "no valid safetensors")],
    )
    def test_truncated_weights(self, run: Run, chain: Path, content: slice, word: str):
        path = weights_of(chain / "tiny")
        path.write_bytes(path.read_bytes()[content])
        assert word in refused(run, chain, 3, "dilate", "tiny")

    @pytest.mark.parametrize(
        "content", [b"\x89PNG\r\n\x1a\n" + bytes(100), b"version https://git-lfs.github.com/spec/v1\n"]
    )
    def test_foreign_weights(self, run: Run, chain: Path, content: bytes):
        weights_of(chain / "tiny").write_bytes(content)
        assert "no valid safetensors" in refused(run, chain, 3, "dilate", "tiny")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_numbers_that_are_none(self, run: Run, chain: Path, value: float):
        bad = torch.zeros(8, 8, 3, 3)
        bad[0, 0, 0, 0] = value
        rewrite_weights(chain / "tiny", {FIRST: bad})
        text = refused(run, chain, 5, "dilate", "tiny")
        assert FIRST in text
        assert "1 of 576" in text

    def test_weights_of_another_config(self, run: Run, chain: Path):
        rewrite_weights(chain / "tiny", {FIRST: torch.zeros(8, 9, 3, 3)})
        assert FIRST in refused(run, chain, 3, "dilate", "tiny")

    @pytest.mark.parametrize(
        ("change", "word"),
        [
            (lambda config: config.pop("_class_name"), "_class_name"),
            (lambda config: config.update(_class_name="VideoNet3000"), "VideoNet3000"),
            (lambda config: config.update(quantization_config={}), "quantized already"),
        ],
    )
    def test_config_that_is_none_of_ours(self, run: Run, chain: Path, change, word: str):
        path = chain / "tiny" / "unet" / "config.json"
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config))
        assert word in refused(run, chain, 3, "dilate", "tiny")

    def test_config_that_is_no_json_or_not_there(self, run: Run, chain: Path):
        path = chain / "tiny" / "unet" / "config.json"
        path.write_text("{")
        assert "config.json" in refused(run, chain, 3, "dilate", "tiny")
        path.unlink()
        assert "--config" in refused(run, chain, 3, "dilate", str(weights_of(chain / "tiny")))

    def test_a_directory_of_something_else(self, run: Run, chain: Path):
        (chain / "photos").mkdir()
        (chain / "photos" / "a.jpg").write_bytes(b"")
        refused(run, chain, 3, "dilate", "photos")


class TestArtifact:
    @pytest.mark.parametrize(
        ("command", "given"),
        [
            ("calibrate", "calibrated.safetensors"),
            ("calibrate", "exported"),
            ("distill", "dilated.safetensors"),
            ("distill", "distilled.safetensors"),
            ("export", "calibrated.safetensors"),
            ("eval", "eval.json"),
            ("sample", "distilled.safetensors"),
        ],
    )
    def test_of_the_wrong_stage(self, run: Run, made: Path, command: str, given: str):
        text = refused(
            run,
            made,
            3,
            command,
            given,
            "-o",
            "new.png" if command == "sample" else "new.json" if command == "eval" else "new.safetensors",
        )
        assert given in text
        assert "Make it with `dqtool" in text

    def test_that_is_a_model(self, run: Run, made: Path):
        assert "dqtool dilate MODEL" in refused(run, made, 3, "calibrate", "tiny", "-o", "new.safetensors")

    @pytest.mark.parametrize("command", ["calibrate", "distill", "export"])
    @pytest.mark.parametrize("damage", ["truncated", "changed", "foreign"])
    def test_with_damaged_data(self, run: Run, chain: Path, command: str, damage: str):
        path = chain / {"calibrate": "dilated", "distill": "calibrated", "export": "distilled"}[command]
        path = path.with_suffix(".safetensors")
        data = bytearray(path.read_bytes())
        if damage == "changed":
            data[-1] ^= 1
        path.write_bytes(data[:-7] if damage == "truncated" else b"hello" if damage == "foreign" else data)
        assert path.name in refused(run, chain, 3, command)

    def test_exported_directory_with_damaged_data(self, run: Run, chain: Path):
        weights = chain / "exported" / "unet" / "diffusion_pytorch_model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        for command in ("eval", "sample"):
            assert "diffusion_pytorch_model" in refused(run, chain, 3, command, "exported")

    @pytest.mark.parametrize("edit", ["value", "cut", "no json", "gone", "newer"])
    def test_with_a_manifest_that_was_edited(self, run: Run, chain: Path, edit: str):
        note = chain / "calibrated.json"
        text = note.read_text()
        content = json.loads(text)
        if edit == "value":
            content["parameters"]["steps"] = 5
            note.write_text(json.dumps(content))
        elif edit == "cut":
            del content["layers"]
            note.write_text(json.dumps(content))
        elif edit == "no json":
            note.write_text(text[:-10])
        elif edit == "newer":
            note.write_text(json.dumps(content | {"format": "dqtool/2"}))
        else:
            note.unlink()
        assert "calibrated" in refused(run, chain, 3, "distill")

    def test_exported_manifest_that_was_edited(self, run: Run, chain: Path):
        note = chain / "exported" / "dqtool.json"
        note.write_text(note.read_text().replace('"seconds": ', '"seconds": 1'))
        assert "dqtool.json" in refused(run, chain, 3, "eval", "exported", "-o", "new.json")

    @pytest.mark.parametrize(
        "arguments", [("distill",), ("eval", "exported"), ("eval", "distilled.safetensors"), ("sample", "exported")]
    )
    def test_calibrated_for_other_steps(self, run: Run, made: Path, arguments: tuple[str, ...]):
        text = refused(run, made, 3, *arguments, "--steps", "5")
        assert "calibrated for 4 steps, not 5" in text

    def test_a_reference_that_is_another_model(self, run: Run, chain: Path):
        tiny_pipeline(chain / "other", seed=1)
        assert "other" in refused(run, chain, 3, "eval", "--reference", "other", "-o", "new.json")


class TestSurroundings:
    def test_another_process_writes_the_same_output(self, run: Run, chain: Path):
        with lock(chain / "dilated.safetensors"):
            assert "Another dqtool" in refused(run, chain, 4, "dilate", "tiny", "--force")

    def test_too_little_memory(self, run: Run, chain: Path, monkeypatch: pytest.MonkeyPatch):
        for error in (
            MemoryError(),
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        ):
            monkeypatch.setattr("dqtool.stages.calibrate.produce", raising(error))
            assert "memory" in refused(run, chain, 4, "calibrate", "--force")

    def test_a_full_disk_in_the_middle_of_a_stage(self, run: Run, chain: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(
            "dqtool.stages.calibrate.produce", raising(OSError(28, "No space left on device", "/tmp/x"))
        )
        assert "The disk is full" in refused(run, chain, 4, "calibrate", "--force")

    def test_a_bug_is_one_line_that_names_debug(self, run: Run, chain: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("dqtool.stages.calibrate.produce", raising(KeyError("conv\nin")))
        text = refused(run, chain, 1, "calibrate", "--force")
        assert "KeyError" in text
        assert "--debug" in text
        result = run("calibrate", "--force", "--debug", cwd=chain)
        assert (result.returncode, result.stdout) == (1, "")
        assert "Traceback" in result.stderr

    def test_debug_shows_where_a_fault_came_from(self, run: Run, made: Path):
        assert "Traceback" in run("dilate", "gone", "--debug", cwd=made).stderr


class TestOnceTracebacks:
    """Command lines that ended in a traceback."""

    @pytest.mark.parametrize("switch", ["--clip", "--no-clip"])
    def test_clip_is_a_switch_in_calibrate_and_a_directory_in_eval(self, run: Run, chain: Path, switch: str):
        result = run(
            "calibrate", "dilated.safetensors", "--steps", "4", "--samples", "8", switch, "--dry-run", cwd=chain
        )
        assert result.returncode == 0, result.stderr
        assert "clip" in refused(run, chain, 2, "eval", "exported", "--clip", "gone", "--force")

    @pytest.mark.parametrize("place", ["/dev/zero", "/dev/null", "pipe"])
    @pytest.mark.parametrize("command", [("report",), ("inspect",), ("stats",), ("run",), ("dilate",), ("calibrate",)])
    def test_devices_and_pipes_are_no_results(self, run: Run, made: Path, tmp_path: Path, place: str, command):
        if place == "pipe":
            os.mkfifo(tmp_path / "pipe")
        result = run(
            *command, place, "--dry-run" if command[0] not in ("report", "inspect", "stats") else "--json", cwd=tmp_path
        )
        assert result.returncode in (2, 3, 4), result.stderr
        assert "Traceback" not in result.stderr
        assert len(result.stderr.splitlines()[-1]) < 700

    @pytest.mark.parametrize(
        "arguments",
        [
            ("zoo", "get", "x" * 5_000, "-o", "new"),
            ("dilate", "zoo:" + "x" * 5_000),
            ("dilate", "x" * 5_000),
            ("dilate", "a/" * 3_000 + "a"),
            ("eval", "exported", "--reference", "zoo:" + "x" * 5_000, "--force"),
            ("inspect", "x" * 5_000),
            ("run", "x" * 5_000 + ".yaml"),
            ("report", "x" * 5_000),
        ],
        ids=lambda value: f"{value[0]} {len(value[-1])}",
    )
    def test_very_long_words(self, run: Run, made: Path, arguments: tuple[str, ...]):
        refused(run, made, 4, *arguments)


def raising(error: Exception):
    def function(*_: object, **__: object) -> None:
        raise error

    return function


def test_nothing_is_written_for_a_rejected_input_in_a_fresh_directory(run: Run, made: Path, tmp_path: Path):
    shutil.copytree(made / "tiny", tmp_path / "tiny")
    rewrite_weights(tmp_path / "tiny", {FIRST: torch.full((8, 8, 3, 3), float("nan"))})
    before = listing(tmp_path)
    refused(run, tmp_path, 5, "dilate", "tiny")
    assert listing(tmp_path) == before
