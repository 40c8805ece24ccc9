from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dqtool.artifacts import (
    DIRECTORY_MANIFEST,
    DeferredTensors,
    Manifest,
    Written,
    check_writable,
    commit,
    commit_directory,
    commit_report,
    fingerprint,
    is_current,
    manifest_path,
    open_artifact,
    read_manifest,
)
from dqtool.artifacts.schema import unchecked
from dqtool.errors import ArtifactError, EnvironmentFault, UsageError

PRINT = fingerprint("dilate", 1, {"scaling": "wd"}, ["0" * 64])
TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.dilation": torch.ones(3)}


def manifest(stage: str = "dilate", **changes: Any) -> Manifest:
    needed: dict[str, Any] = {
        "model": {"class": "UNet2DModel", "config": {}, "family": "unet2d", "source": "model"},
        "pipeline": {"sampling": {"scheduler": {}, "steps": 4, "eta": 0.0}},
        "metrics": {"blocks": [{"name": "a", "reads": []}], "output_reads": ["a"]},
        "parameters": {"format": "dq"},
    }
    made = {"stage": stage, "fingerprint": PRINT, **needed, **changes}
    return unchecked(made, Manifest)


def write_directory(path: Path) -> None:
    (path / "unet").mkdir()
    (path / "unet" / "config.json").write_text("{}")
    (path / "model_index.json").write_text('{"a": 1}')


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    path = tmp_path / "dilated.safetensors"
    commit(path, TENSORS, manifest())
    return path


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "exported"
    commit_directory(path, write_directory, manifest("export"))
    return path


def listing(path: Path) -> list[str]:
    return sorted(entry.relative_to(path).as_posix() for entry in path.rglob("*"))


class TestFingerprint:
    def test_depends_on_all_it_is_made_of_and_on_nothing_else(self):
        base = fingerprint("distill", 1, {"a": 1, "b": 2.5}, ["x", "y"])
        assert base == fingerprint("distill", 1, {"b": 2.5, "a": 1}, ("x", "y"))
        others = [
            fingerprint("export", 1, {"a": 1, "b": 2.5}, ["x", "y"]),
            fingerprint("distill", 2, {"a": 1, "b": 2.5}, ["x", "y"]),
            fingerprint("distill", 1, {"a": 1, "b": 2.0}, ["x", "y"]),
            fingerprint("distill", 1, {"a": 1, "b": 2.5}, ["y", "x"]),
        ]
        assert len({base, *others}) == 5

    def test_nan_is_no_parameter(self):
        with pytest.raises(ValueError, match="JSON"):
            fingerprint("distill", 1, {"a": float("nan")}, [])


class TestOpen:
    def test_gives_back_what_was_committed(self, artifact: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.chdir(artifact.parent)
        found = open_artifact("./dilated.safetensors", {"dilate"})
        assert found.given == "./dilated.safetensors" and found.stage == "dilate"
        assert found.tensor_names() == ["a.dilation", "a.weight"]
        assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in found.tensors().items())
        assert found.manifest.file is not None
        assert found.manifest.file.bytes == artifact.stat().st_size and found.sha256 == found.manifest.file.sha256

    def test_a_renamed_pair_is_the_same_artifact(self, artifact: Path):
        artifact.rename(artifact.with_name("b.safetensors"))
        manifest_path(artifact).rename(artifact.with_name("b.json"))
        assert open_artifact(artifact.with_name("b.safetensors")).stage == "dilate"

    def test_missing_path_is_the_environment(self, tmp_path: Path):
        with pytest.raises(EnvironmentFault, match=r"no such file.*gone\.safetensors") as caught:
            open_artifact(tmp_path / "gone.safetensors")
        assert caught.value.exit_code == 4

    def test_file_or_directory_without_manifest(self, artifact: Path, tmp_path: Path):
        manifest_path(artifact).unlink()
        for path in (artifact, tmp_path):
            with pytest.raises(ArtifactError, match=r"no dqtool artifact.*no manifest") as caught:
                open_artifact(path)
            assert caught.value.exit_code == 3

    def test_truncated_longer_or_changed_data(self, artifact: Path):
        whole = artifact.read_bytes()
        for content, message in (
            (whole[:-1], "truncated"),
            (whole + b"\0", "changed"),
            (whole[:-1] + b"\x01", "sha256"),
        ):
            artifact.write_bytes(content)
            with pytest.raises(ArtifactError, match=message):
                open_artifact(artifact)
            assert not is_current(artifact, PRINT)

    @pytest.mark.parametrize("key", ["parameters", "metrics", "model", "environment"])
    def test_edited_manifest(self, artifact: Path, key: str):
        note = manifest_path(artifact)
        note.write_text(json.dumps(json.loads(note.read_text()) | {key: {"edited": 1}}))
        with pytest.raises(ArtifactError, match=r"changed after dqtool wrote it.*dilated\.json"):
            open_artifact(artifact)
        assert not is_current(artifact, PRINT)

    def test_manifest_of_another_file(self, artifact: Path, tmp_path: Path):
        other = tmp_path / "other.safetensors"
        commit(other, {"a.weight": torch.zeros(2, 3), "a.dilation": torch.ones(3)}, manifest())
        shutil.copy(manifest_path(other), manifest_path(artifact))
        with pytest.raises(ArtifactError, match="sha256"):
            open_artifact(artifact)

    def test_newer_format(self, artifact: Path):
        note = manifest_path(artifact)
        note.write_text(note.read_text().replace("dqtool/1", "dqtool/2"))
        with pytest.raises(ArtifactError, match="Upgrade dqtool"):
            open_artifact(artifact)

    def test_wrong_stage_says_what_it_is_what_is_needed_and_how_to_make_it(self, artifact: Path):
        with pytest.raises(ArtifactError) as caught:
            open_artifact(artifact, {"calibrate", "distill"})
        assert "output of `dilate`" in str(caught.value)
        assert "output of `calibrate` or `distill` is needed" in str(caught.value)
        assert "`dqtool calibrate DILATED`" in str(caught.value) and str(artifact) in str(caught.value)

    def test_the_manifest_itself_is_no_artifact(self, artifact: Path, directory: Path):
        with pytest.raises(ArtifactError, match=r"This is a manifest.*Give .*dilated\.safetensors"):
            open_artifact(manifest_path(artifact))
        with pytest.raises(ArtifactError, match=r"This is a manifest.*Give the directory"):
            open_artifact(directory / DIRECTORY_MANIFEST)

    def test_directory_is_verified_file_by_file(self, directory: Path):
        found = open_artifact(directory, {"export"})
        assert sorted(found.manifest.files or {}) == ["model_index.json", "unet/config.json"]
        assert len(found.sha256) == 64
        with pytest.raises(ArtifactError, match="lists no file"):
            found.tensors(file="vae/x.safetensors")
        (directory / "unet" / "config.json").write_text("[]")
        with pytest.raises(ArtifactError, match=r"sha256.*unet/config\.json"):
            open_artifact(directory)
        (directory / "unet" / "config.json").unlink()
        with pytest.raises(ArtifactError, match=r"missing.*unet/config\.json"):
            open_artifact(directory)

    def test_tensors_of_a_directory(self, tmp_path: Path):
        from dqtool.artifacts.tensorfile import save_tensors

        path = tmp_path / "exported"
        commit_directory(path, lambda new: save_tensors(new / "model.safetensors", TENSORS), manifest("export"))
        found = open_artifact(path)
        assert found.tensor_names("model.safetensors") == sorted(TENSORS)
        assert torch.equal(found.tensors(file="model.safetensors")["a.weight"], TENSORS["a.weight"])

    def test_a_report_is_its_own_manifest(self, tmp_path: Path):
        path = tmp_path / "report.json"
        commit_report(path, manifest("eval", metrics={"fd.digits": 3.5}))
        assert open_artifact(path, {"eval"}).manifest.metrics.as_read == {"fd.digits": 3.5}
        assert is_current(path, PRINT)
        with pytest.raises(ArtifactError, match="holds no tensors"):
            open_artifact(path).tensors()
        path.write_text(path.read_text().replace("3.5", "1.5"))
        assert not is_current(path, PRINT)


class TestIsCurrent:
    def test_only_with_the_same_fingerprint_and_sound_data(self, artifact: Path, directory: Path):
        assert is_current(artifact, PRINT) and is_current(directory, PRINT)
        assert not is_current(artifact, PRINT[::-1])
        assert not is_current(artifact.with_name("gone.safetensors"), PRINT)
        (directory / "model_index.json").write_text("")
        assert not is_current(directory, PRINT)
        manifest_path(artifact).write_text("{")
        assert not is_current(artifact, PRINT)

    def test_needs_no_torch(self, artifact: Path):
        code = (
            "import sys; from dqtool.artifacts import is_current, open_artifact\n"
            f"assert is_current({str(artifact)!r}, {PRINT!r}); open_artifact({str(artifact)!r}).tensor_names()\n"
            "assert not {'torch', 'numpy', 'rich', 'safetensors.torch'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


class TestCommit:
    def test_equal_tensors_give_identical_files_readable_as_any_other(self, artifact: Path, tmp_path: Path):
        again = tmp_path / "again.safetensors"
        commit(again, open_artifact(artifact).tensors(), manifest())
        assert again.read_bytes() == artifact.read_bytes()
        plain = tmp_path / "plain"
        plain.touch()
        assert again.stat().st_mode == plain.stat().st_mode == manifest_path(again).stat().st_mode

    def test_leaves_nothing_beside_the_two_files_and_may_overwrite_what_is_still_mapped(self, artifact: Path):
        mapped = open_artifact(artifact).tensors()
        commit(artifact, {"a.weight": torch.zeros(1)}, manifest())
        assert torch.equal(mapped["a.weight"], TENSORS["a.weight"])
        assert open_artifact(artifact).tensor_names() == ["a.weight"]
        assert listing(artifact.parent) == ["dilated.json", "dilated.safetensors"]

    @pytest.mark.parametrize("function", ["fsync", "replace", "rename"])
    @pytest.mark.parametrize("when", ["before", "after"])
    @pytest.mark.parametrize("kind", ["file", "directory", "report"])
    @pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
    def test_a_fault_anywhere_leaves_the_old_or_the_new_artifact_whole(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        function: str,
        when: str,
        kind: str,
        error: type[BaseException] | OSError,
    ):
        path = tmp_path / {"file": "x.safetensors", "directory": "x", "report": "x.json"}[kind]

        def write(version: int) -> None:
            note = manifest("eval" if kind == "report" else "export", metrics={"version": version})
            if kind == "file":
                commit(path, {"version": torch.tensor(version)}, note)
            elif kind == "directory":
                commit_directory(path, lambda new: (new / "version").write_text(str(version)), note)
            else:
                commit_report(path, note)

        real = getattr(os, function)
        interrupted = 0
        for exists in (False, True):
            for fault_at in range(20):
                if path.is_dir():
                    shutil.rmtree(path)
                path.unlink(missing_ok=True)
                manifest_path(path).unlink(missing_ok=True)
                if exists:
                    write(1)
                calls = 0

                def faulty(*arguments: Any, fault_at: int = fault_at) -> Any:
                    nonlocal calls
                    calls += 1
                    if calls == fault_at + 1 and when == "before":
                        raise error
                    result = real(*arguments)
                    if calls == fault_at + 1:
                        raise error
                    return result

                monkeypatch.setattr(os, function, faulty)
                try:
                    write(2)
                    broke = False
                except (KeyboardInterrupt, EnvironmentFault) as caught:
                    broke = True
                    assert not isinstance(caught, EnvironmentFault) or "disk is full" in str(caught)
                monkeypatch.setattr(os, function, real)
                assert not [name for name in listing(tmp_path) if name.startswith(".")]
                if not broke:
                    break
                interrupted += 1
                if path.exists():
                    version = open_artifact(path).manifest.metrics.as_read["version"]
                    # A fault after the last move finds a finished commit.
                    assert version == 2 or (exists and version == 1)
                    assert version == 1 or when == "after" or function == "fsync"
                else:
                    assert not exists and not manifest_path(path).exists()
        assert interrupted or function == "rename"

    def test_a_proof_sees_the_file_and_adds_its_metrics(self, artifact: Path):
        def proof(written: Written) -> dict[str, Any]:
            return {"sum": float(written()["a"].sum())}

        note = commit(artifact, {"a": torch.ones(3)}, manifest(metrics={"other": 1}), proof).manifest
        assert note.metrics.as_read == read_manifest(artifact).metrics.as_read == {"other": 1, "sum": 3.0}

    def test_a_proof_that_fails_leaves_what_stood_there(self, artifact: Path):
        def proof(written: Written) -> dict[str, Any]:
            written()
            raise ValueError("not equal")

        with pytest.raises(ValueError, match="not equal"):
            commit(artifact, {"a": torch.ones(3)}, manifest(), proof)
        assert open_artifact(artifact).tensor_names() == sorted(TENSORS)
        assert listing(artifact.parent) == ["dilated.json", "dilated.safetensors"]

    def test_a_proof_does_not_wait_for_a_file_that_never_comes(self, artifact: Path):
        tensors = DeferredTensors({})
        tensors.defer("a", torch.ones(3), lambda: torch.ones(4))
        with pytest.raises(ValueError, match="announced"):
            commit(artifact, tensors, manifest(), lambda written: {"n": len(written())})
        assert open_artifact(artifact).tensor_names() == sorted(TENSORS)

    def test_a_write_cut_short_by_the_system(self, artifact: Path):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            with pytest.raises(EnvironmentFault, match="what stood there before is untouched"):
                commit(artifact, {"a": torch.zeros(100_000)}, manifest())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert open_artifact(artifact).tensor_names() == sorted(TENSORS)
        assert listing(artifact.parent) == ["dilated.json", "dilated.safetensors"]

    def test_missing_parent(self, tmp_path: Path):
        with pytest.raises(EnvironmentFault, match=r"does not exist.*no/such.*mkdir -p"):
            commit(tmp_path / "no" / "such" / "x.safetensors", TENSORS, manifest())


class TestCommitDirectory:
    def test_replaces_the_whole_of_an_earlier_one(self, directory: Path):
        commit_directory(directory, lambda new: (new / "only").write_text("1"), manifest("export"))
        assert listing(directory) == [DIRECTORY_MANIFEST, "only"]
        assert listing(directory.parent)[0] == "exported"

    def test_foreign_directory_is_refused_untouched_before_anything_is_built(self, tmp_path: Path):
        home = tmp_path / "home"
        home.mkdir()
        (home / "thesis.tex").write_text("precious")
        with pytest.raises(EnvironmentFault, match="dqtool did not make it") as caught:
            commit_directory(home, lambda new: pytest.fail("built"), manifest("export"))
        assert caught.value.exit_code == 4
        assert listing(tmp_path) == ["home", "home/thesis.tex"]

    def test_a_file_of_the_user_in_our_directory_is_not_lost(self, directory: Path):
        (directory / "unet" / "notes.txt").write_text("precious")
        with pytest.raises(EnvironmentFault, match=r"did not write \(unet/notes\.txt\)"):
            commit_directory(directory, write_directory, manifest("export"))

    def test_empty_directory_is_taken_and_a_damaged_one_of_ours_replaced(self, tmp_path: Path, directory: Path):
        (tmp_path / "empty").mkdir()
        commit_directory(tmp_path / "empty", write_directory, manifest("export"))
        (directory / DIRECTORY_MANIFEST).write_text("{")
        commit_directory(directory, write_directory, manifest("export"))
        assert open_artifact(tmp_path / "empty").sha256 == open_artifact(directory).sha256

    def test_a_failing_build_leaves_the_old_directory(self, directory: Path):
        def build(new: Path) -> None:
            (new / "half").write_text("")
            raise RuntimeError("no such runtime")

        with pytest.raises(RuntimeError, match="no such runtime"):
            commit_directory(directory, build, manifest("export"))
        assert listing(directory.parent)[0] == "exported" and open_artifact(directory)


class TestCheckWritable:
    def test_a_good_place_is_left_as_it_is(self, tmp_path: Path, artifact: Path, directory: Path):
        check_writable(tmp_path / "new.safetensors", inputs=[artifact])
        check_writable(artifact)
        check_writable(directory, "directory", inputs=[artifact])
        check_writable(tmp_path / "report.json", "report")
        assert [name for name in listing(tmp_path) if "/" not in name] == [
            *("dilated.json", "dilated.safetensors", "exported"),
        ]

    def test_file_where_a_directory_belongs_and_the_reverse(self, tmp_path: Path, artifact: Path):
        with pytest.raises(EnvironmentFault, match="not a directory"):
            check_writable(artifact, "directory")
        with pytest.raises(EnvironmentFault, match="is a directory"):
            check_writable(tmp_path)
        with pytest.raises(EnvironmentFault, match="file is where a directory"):
            check_writable(artifact / "x.safetensors")
        for path in (".", "..", "/"):
            with pytest.raises(EnvironmentFault, match="can not be replaced"):
                check_writable(path, "directory")

    def test_unwritable_parent(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        # Root may write anywhere, so the answer of the system is changed, not the directory.
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        with pytest.raises(EnvironmentFault, match="not writable"):
            check_writable(tmp_path / "x.safetensors")

    def test_output_that_is_an_input(self, artifact: Path):
        with pytest.raises(UsageError, match="its own input"):
            check_writable(artifact, inputs=[artifact.parent / "." / artifact.name])

    def test_names_of_the_other_kind(self, tmp_path: Path):
        with pytest.raises(UsageError, match=r"ends in \.safetensors"):
            check_writable(tmp_path / "x.json")
        with pytest.raises(UsageError, match=r"ends in \.json"):
            check_writable(tmp_path / "x.safetensors", "report")

    def test_neither_a_config_nor_a_manifest_nor_a_report_is_overwritten(self, tmp_path: Path, artifact: Path):
        (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
        with pytest.raises(EnvironmentFault, match=r"something else.*config\.json"):
            check_writable(tmp_path / "config.safetensors")
        with pytest.raises(EnvironmentFault, match="manifest of an artifact"):
            commit_report(manifest_path(artifact), {"a": 1})
        commit_report(tmp_path / "report.json", manifest("eval"))
        with pytest.raises(EnvironmentFault, match=r"something else.*report\.json"):
            check_writable(tmp_path / "report.safetensors")
        assert open_artifact(artifact) and read_manifest(tmp_path / "report.json").stage == "eval"


def test_manifest_paths(tmp_path: Path):
    assert manifest_path("a/x.safetensors") == Path("a/x.json")
    assert manifest_path("x.v2") == Path("x.v2.json")
    assert manifest_path("report.json") == Path("report.json")
    assert manifest_path(tmp_path) == tmp_path / "dqtool.json"
