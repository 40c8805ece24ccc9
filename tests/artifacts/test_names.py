"""Names that come from files: every hostile one against every reader that makes a path of it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import listing, tiny_pipeline, weights_of
from safetensors.torch import save_file

from dqtool.artifacts import Manifest, commit, fingerprint, open_artifact
from dqtool.artifacts.names import check_component, check_name, check_shards, path_within
from dqtool.artifacts.records import FileRecord, PipelineRecord
from dqtool.artifacts.schema import unchecked
from dqtool.errors import ArtifactError, DqtoolError
from dqtool.models.components.companion_files import companion_files
from dqtool.models.components.companions import companions_of_artifact, companions_of_source
from dqtool.models.components.export_layout import component_prefix
from dqtool.models.sources.resolve import resolve_model
from dqtool.stages.export import write_directory

HOSTILE = (
    "",
    ".",
    "..",
    "../x",
    "../../x",
    "/abs/x",
    "//x",
    "./abs/x",
    "vae/../../../x",
    "vae/./x",
    "vae//x",
    "vae/",
    "vae/..",
    "C:x",
    "C:\\x",
    "vae/C:/x",
    "..\\x",
    "vae\\..\\..\\x",
    "vae/x\0y",
    "vae/x\ny",
    "vae/x\x1b[2J",
    "vae/x\u202ey",
    "vae/x\ud800",
    "vae/" + "x" * 300,
    "/".join(["vae"] * 400),
)
"""Names that must never become a path."""
REFUSED = "as a path|plain word|leaves the directory|surrogates not allowed|must be a text"
HOSTILE_COMPONENTS = (*HOSTILE, "a/b", "a b", "a.b", "a-b", "0a", "~", "$HOME", "a" * 65, "ünet")


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: ascii(name)[:30])
class TestNames:
    def test_one_function_refuses_them(self, tmp_path: Path, name: str):
        with pytest.raises(ArtifactError) as caught:
            path_within(tmp_path, name, "x.json")
        assert caught.value.exit_code == 3
        text = str(caught.value)
        assert text.isprintable()
        assert len(text) < 400

    def test_no_reader_makes_a_path_of_them(self, tmp_path: Path, name: str, model: Path):
        root = tmp_path / "work"
        root.mkdir()
        before = listing(tmp_path)
        for reader in READERS:
            with pytest.raises((ArtifactError, UnicodeEncodeError), match=REFUSED):
                reader(model, root, name)
            for entry in root.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            assert listing(tmp_path) == before, reader.__name__


@pytest.mark.parametrize("name", [*HOSTILE_COMPONENTS, 3, ["a"]], ids=lambda name: ascii(name)[:30])
def test_a_component_is_one_plain_word(name: Any, tmp_path: Path):
    with pytest.raises(ArtifactError):
        check_component(name, "model_index.json")
    with pytest.raises(ArtifactError):
        component_prefix(PipelineRecord(name))
    with pytest.raises(ArtifactError):
        write_directory(tmp_path, PipelineRecord(name), {}, lambda _: None)
    assert not list(tmp_path.iterdir())
    if isinstance(name, str):
        with pytest.raises(ArtifactError):
            companion_files(tmp_path, {name: ["diffusers", "AutoencoderKL"]}, "unet")


@pytest.mark.parametrize("name", ["x", "vae/config.json", "a-b/c d.txt", "vae/.x", "ü/x", "x..y/..z", "a.b.c"])
def test_ordinary_names_are_taken(tmp_path: Path, name: str):
    assert path_within(tmp_path, name, "x") == tmp_path / name
    assert check_name(name, "x") == name.split("/")


@pytest.mark.parametrize("index", [None, [], {}, {"weight_map": 3}, {"weight_map": {}}, {"weight_map": {"a": 3}}])
def test_an_index_without_names(index: Any):
    with pytest.raises(ArtifactError):
        check_shards(index, "x.index.json")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("model") / "tiny")


def pipeline(model: Path, root: Path) -> Path:
    shutil.copytree(model, root / "m")
    return root / "m"


def add_component(path: Path, name: str) -> None:
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps(index | {name: ["diffusers", "AutoencoderKL"]}))


def attached(root: Path, name: str, component: str = "unet", index: dict[str, Any] | None = None) -> Path:
    """A safetensors artifact with a file of this name attached."""
    path = root / "a.safetensors"
    tensors = {"w": torch.zeros(1), f"file.{name}": torch.zeros(3, dtype=torch.uint8)}
    known = {"model_index": index or {"vae": ["diffusers", "AutoencoderKL"]}, "component": component, "scheduler": {}}
    commit(
        path,
        tensors,
        Manifest(
            stage="distill", fingerprint=fingerprint("distill", 1, {}, []), pipeline=unchecked(known, PipelineRecord)
        ),
    )
    return path


def an_attachment(_model: Path, root: Path, name: str) -> None:
    open_artifact(attached(root, name)).attachments()


def an_attachment_unpacked(_model: Path, root: Path, name: str) -> None:
    companions = companions_of_artifact(open_artifact(attached(root, name)))
    assert companions is not None
    with companions.directory(name.split("/")[0]):
        pass


def the_component_of_a_manifest(_model: Path, root: Path, name: str) -> None:
    companions_of_artifact(open_artifact(attached(root, "vae/x", component=name)))


def a_component_of_a_manifest(_model: Path, root: Path, name: str) -> None:
    companions_of_artifact(open_artifact(attached(root, "vae/x", index={name: ["diffusers", "AutoencoderKL"]})))


def a_component_of_a_model(model: Path, root: Path, name: str) -> None:
    path = pipeline(model, root)
    add_component(path, name)
    resolve_model(str(path))


def a_shard(model: Path, root: Path, name: str) -> None:
    path = pipeline(model, root)
    weights_of(path).unlink()
    listing = path / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    listing.write_text(json.dumps({"weight_map": {"a": name}}))
    resolve_model(str(path))


def a_shard_of_a_companion(model: Path, root: Path, name: str) -> None:
    path = pipeline(model, root)
    add_component(path, "text_encoder")
    (path / "text_encoder").mkdir()
    (path / "text_encoder" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    companions = companions_of_source(resolve_model(str(path)))
    assert companions is not None
    with companions.directory("text_encoder"):
        pass


def a_file_of_an_exported_directory(_model: Path, root: Path, name: str) -> None:
    entry = FileRecord(0, "0" * 64)
    note = Manifest(stage="export", fingerprint=fingerprint("export", 1, {}, []), files={name: entry})
    (root / "dqtool.json").write_text(note.to_json())
    open_artifact(root)


def a_shard_of_clip(_model: Path, root: Path, name: str) -> None:
    from dqtool.metrics.clip import ClipEncoder

    (root / "config.json").write_text(json.dumps({"model_type": "clip"}))
    (root / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    ClipEncoder(root)


READERS: tuple[Callable[[Path, Path, str], None], ...] = (
    an_attachment,
    an_attachment_unpacked,
    the_component_of_a_manifest,
    a_component_of_a_manifest,
    a_component_of_a_model,
    a_shard,
    a_shard_of_a_companion,
    a_file_of_an_exported_directory,
    a_shard_of_clip,
)


class TestLinks:
    @pytest.fixture
    def secret(self, tmp_path: Path) -> Path:
        path = tmp_path / "secret.json"
        path.write_text('{"_class_name": "UNet2DModel", "password": 1}')
        return path

    @pytest.fixture
    def with_vae(self, model: Path, tmp_path: Path) -> Path:
        path = pipeline(model, tmp_path)
        add_component(path, "vae")
        (path / "vae").mkdir()
        (path / "vae" / "config.json").write_text("{}")
        return path

    @pytest.mark.parametrize("place", ["vae/key.pem", "vae/config.json", "unet/config.json", "sampling.json"])
    @pytest.mark.parametrize("absolute", [True, False])
    def test_out_of_the_model(self, with_vae: Path, secret: Path, place: str, absolute: bool):
        link = with_vae / place
        link.unlink(missing_ok=True)
        link.symlink_to(secret if absolute else os.path.relpath(secret, link.parent))
        with pytest.raises(ArtifactError, match=r"leads out of .* copy of the file"):
            companions_of_source(resolve_model(str(with_vae)))

    @pytest.mark.parametrize("name", ["vae", "unet", "scheduler", "model_index.json"])
    def test_a_component_that_is_a_link(self, with_vae: Path, tmp_path: Path, name: str):
        shutil.move(with_vae / name, tmp_path / "elsewhere")
        (with_vae / name).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(ArtifactError, match="leads out of"):
            assert resolve_model(str(with_vae)).scheduler

    def test_a_chain_of_links(self, with_vae: Path, secret: Path):
        (with_vae / "vae" / "a").symlink_to("b")
        (with_vae / "vae" / "b").symlink_to(secret)
        with pytest.raises(ArtifactError, match="leads out of"):
            companions_of_source(resolve_model(str(with_vae)))

    def test_inside_the_model(self, with_vae: Path):
        shutil.move(with_vae / "vae" / "config.json", with_vae / "shared.json")
        (with_vae / "vae" / "config.json").symlink_to("../shared.json")
        companions = companions_of_source(resolve_model(str(with_vae)))
        assert companions is not None
        assert companions.names == ["vae/config.json"]

    def cache(self, with_vae: Path, tmp_path: Path) -> Path:
        """The same model as the Hub cache lays it out: all files are links to blobs."""
        home = tmp_path / "models--org--name"
        (home / "blobs").mkdir(parents=True)
        for number, file in enumerate(sorted(path for path in with_vae.rglob("*") if path.is_file())):
            place = home / "snapshots" / "0123" / file.relative_to(with_vae)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(file, home / "blobs" / f"{number:040x}")
            place.symlink_to(os.path.relpath(home / "blobs" / f"{number:040x}", place.parent))
        return home / "snapshots" / "0123"

    def test_the_hub_cache(self, with_vae: Path, tmp_path: Path):
        snapshot = self.cache(with_vae, tmp_path)
        for given in (snapshot, snapshot / "unet", weights_of(snapshot)):
            source = resolve_model(str(given))
            assert source.sha256()
        companions = companions_of_source(resolve_model(str(snapshot)))
        assert companions is not None
        assert companions.names == ["vae/config.json"]

    def test_out_of_the_hub_cache(self, with_vae: Path, tmp_path: Path, secret: Path):
        snapshot = self.cache(with_vae, tmp_path)
        blobs = snapshot.parent.parent / "blobs"
        for target in (secret, blobs / "name.json", blobs / ("f" * 40), blobs / ("e" * 40) / ("f" * 40)):
            target.parent.mkdir(exist_ok=True)
            if target.name == "f" * 40 and target.parent == blobs:
                target.symlink_to(secret)
            elif target != secret:
                target.write_text("{}")
            link = snapshot / "vae" / "more.json"
            link.symlink_to(target)
            with pytest.raises(ArtifactError, match="leads out of"):
                companions_of_source(resolve_model(str(snapshot)))
            link.unlink()

    def test_hidden_files_stay_where_they_are(self, with_vae: Path):
        for name in (".env", ".git/config", "sub/.ssh/key"):
            (with_vae / "vae" / name).parent.mkdir(parents=True, exist_ok=True)
            (with_vae / "vae" / name).write_text("private")
        companions = companions_of_source(resolve_model(str(with_vae)))
        assert companions is not None
        assert companions.names == ["vae/config.json"]

    def test_a_link_in_the_way_of_a_file_that_is_written(self, tmp_path: Path):
        (tmp_path / "root").mkdir()
        (tmp_path / "root" / "vae").symlink_to(tmp_path)
        with pytest.raises(ArtifactError, match="leads out of"):
            path_within(tmp_path / "root", "vae/x", "x")

    def test_a_picture_that_is_a_link_is_not_put_on_a_page(self, made: Path, tmp_path: Path, secret: Path):
        from dqtool.page.results import find_results

        shutil.copy(made / "eval.json", tmp_path / "r.json")
        (tmp_path / "sub").mkdir()
        shutil.move(tmp_path / "r.json", tmp_path / "sub" / "r.json")
        (tmp_path / "sub" / "r.png").symlink_to(secret)
        [result], _ = find_results([str(tmp_path / "sub")])
        assert result.picture is None


def test_attachments_that_lie_in_each_other(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    tensors = {"file.vae/a": torch.zeros(1, dtype=torch.uint8), "file.vae/a/b": torch.zeros(1, dtype=torch.uint8)}
    commit(path, tensors, Manifest(stage="distill", fingerprint=fingerprint("distill", 1, {}, [])))
    with pytest.raises(ArtifactError, match="lies in another file"):
        open_artifact(path).attachments()


def test_a_package_that_a_file_names_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "stranger.py").write_text("open('imported', 'w')")
    monkeypatch.chdir(tmp_path)
    index = {"text_encoder": ["stranger", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    companions = companions_of_artifact(open_artifact(attached(tmp_path, "text_encoder/x", index=index)))
    assert companions is not None
    with pytest.raises(DqtoolError, match="imports no package"), companions.text_pipeline():
        pass
    assert not (tmp_path / "imported").exists()


def test_a_header_may_not_lie_about_attachments(tmp_path: Path):
    """A file that a stranger wrote without dqtool: the header is all that it takes."""
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.zeros(1), "file.../../x": torch.zeros(3, dtype=torch.uint8)}, path)
    from dqtool.artifacts.store import Artifact

    note = Manifest(stage="distill", fingerprint="0" * 64, file=FileRecord(1, "0" * 64, "a"))
    with pytest.raises(ArtifactError):
        Artifact(path, str(path), note).attachment_names()
