"""Files from strangers and outputs in the wrong place: nothing is written or packed that should not be."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Run
from helpers import refused, weights_of
from safetensors.torch import load_file

from dqtool.artifacts import commit, manifest_path, open_artifact

WEIGHTS = "tiny/unet/diffusion_pytorch_model.safetensors"


def attach(directory: Path, *names: str) -> None:
    """Put files of these names into the distilled artifact, as a stranger would."""
    path = directory / "distilled.safetensors"
    note = open_artifact(path).manifest
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors |= {f"file.{name}": torch.zeros(3, dtype=torch.uint8) for name in names}
    path.unlink()
    manifest_path(path).unlink()
    commit(path, tensors, note)


class TestAttachments:
    @pytest.mark.parametrize(
        "name",
        ["./abs/x", "../../x", "vae/../../../x", "/tmp/dqtool-attacked", "..", "C:\\x", "vae\\..\\x", "x\n", "vae//x"],
    )
    def test_never_leave_the_exported_directory(self, run: Run, chain: Path, name: str):
        attach(chain, name)
        refused(run, chain, 3, "export", "-o", "new")
        assert not Path("/tmp/dqtool-attacked").exists()

    @pytest.mark.parametrize(
        "name", ["unet/config.json", "unet/diffusion_pytorch_model.safetensors", "model_index.json", "dqtool.json"]
    )
    def test_never_replace_what_the_export_writes(self, run: Run, chain: Path, name: str):
        attach(chain, name)
        refused(run, chain, 3, "export", "-o", "new")

    @pytest.mark.parametrize("name", ["../secret", "", ".", "..", "/etc", "a/b", "a\\b"])
    def test_the_network_goes_where_its_component_is(self, run: Run, chain: Path, name: str):
        path = chain / "distilled.safetensors"
        note = open_artifact(path).manifest
        assert note.pipeline is not None
        note.pipeline = replace(note.pipeline, component=name)
        tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
        path.unlink()
        manifest_path(path).unlink()
        commit(path, tensors, note)
        refused(run, chain, 3, "export", "-o", "new")


class TestPrivateFiles:
    @pytest.mark.parametrize("name", ["../secret", "", ".", "..", "ABSOLUTE", "unet/../../secret", "se\ncret"])
    def test_are_not_packed_as_a_component(self, run: Run, chain: Path, name: str):
        (chain / "secret").mkdir()
        (chain / "secret" / "id_rsa").write_text("private")
        index = json.loads((chain / "tiny" / "model_index.json").read_text())
        index[str(chain / "secret") if name == "ABSOLUTE" else name] = ["diffusers", "AutoencoderKL"]
        (chain / "tiny" / "model_index.json").write_text(json.dumps(index))
        assert "plain word" in refused(run, chain, 3, "dilate", "tiny", "-o", "new.safetensors")

    @pytest.mark.parametrize("place", ["vae/id_rsa", "vae", "unet/config.json", "scheduler/scheduler_config.json"])
    def test_are_not_packed_through_a_link(self, run: Run, chain: Path, place: str):
        (chain / "secret").mkdir()
        for name in ("id_rsa", "config.json", "scheduler_config.json"):
            (chain / "secret" / name).write_text('{"_class_name": "UNet2DModel"}')
        index = json.loads((chain / "tiny" / "model_index.json").read_text())
        (chain / "tiny" / "model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", "AutoencoderKL"]}))
        link = chain / "tiny" / place
        link.parent.mkdir(exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(chain / "secret" / link.name if "/" in place else chain / "secret")
        text = refused(run, chain, 3, "dilate", "tiny", "-o", "new.safetensors")
        assert "leads out of" in text
        assert "copy of the file" in text


EVAL = ("eval", "exported", "--samples", "4", "--metrics", "cost", "-o", "new.json")
SAMPLE = ("sample", "exported", "-n", "1", "--steps", "4")


class TestOutputsInInputs:
    @pytest.mark.parametrize(
        "arguments",
        [
            (*EVAL, "--grid", "exported/x.png"),
            (*EVAL, "--grid", "exported/unet/config.json"),
            (*EVAL, "--grid", "exported/unet/diffusion_pytorch_model.safetensors"),
            (*EVAL, "--grid", WEIGHTS),
            (*EVAL, "--grid", "tiny/x.png"),
            (*EVAL, "--save-samples", "exported/x.npz"),
            (*EVAL, "--save-samples", WEIGHTS),
            (*EVAL, "--grid", "new.json"),
            (*EVAL, "--grid", "same.png", "--save-samples", "same.png"),
            ("eval", "exported", "--samples", "4", "-o", "exported/new.json"),
            ("eval", "exported", "--samples", "4", "-o", "exported/dqtool.json"),
            ("eval", "exported", "--samples", "4", "-o", "tiny/new.json"),
            (*SAMPLE, "-o", "exported/x.png"),
            (*SAMPLE, "-o", "exported/unet/diffusion_pytorch_model.safetensors"),
            (*SAMPLE, "-o", "linked/x.png"),
            ("calibrate", "dilated.safetensors", "--steps", "5", "--samples", "16", "-o", "dilated.safetensors"),
            ("dilate", "tiny", "-o", "tiny/new.safetensors"),
            ("dilate", "tiny/unet", "-o", "tiny/unet/new.safetensors"),
            ("dilate", WEIGHTS, "-o", WEIGHTS),
            ("dilate", WEIGHTS, "-o", "hard.safetensors"),
            ("dilate", "tiny", "-o", "hard.safetensors"),
            ("export", "inside/distilled.safetensors", "-o", "inside"),
            ("bench", "exported", "-o", "exported/bench.json"),
            ("bench", "exported", "--reference", "tiny", "-o", "tiny/bench.json"),
            ("run", "recipe.yaml", "-o", "tiny/results"),
            ("run", "recipe.yaml", "--set", "dilate.output=tiny/d.safetensors"),
        ],
        ids=" ".join,
    )
    @pytest.mark.parametrize("overwrite", [(), ("--overwrite",)], ids=["", "overwrite"])
    def test_are_refused(self, run: Run, chain: Path, arguments: tuple[str, ...], overwrite: tuple[str, ...]):
        (chain / "linked").symlink_to("exported")
        (chain / "inside").mkdir()
        for name in ("distilled.safetensors", "distilled.json"):
            shutil.copy(chain / name, chain / "inside")
        os.link(weights_of(chain / "tiny"), chain / "hard.safetensors")
        (chain / "recipe.yaml").write_text("model: tiny\nstages:\n  dilate: {}\n")
        refused(run, chain, 2, *arguments, *overwrite)

    def test_prompts_and_statistics_are_inputs(self, run: Run, chain: Path, inception_weights: Path):
        shutil.copy(inception_weights, chain / "inception.pth")
        (chain / "prompts.json").write_text('["a prompt"]')
        refused(run, chain, 2, *EVAL[:-1], "prompts.json", "--prompts", "prompts.json", "--overwrite")
        (chain / "images").mkdir()
        from PIL import Image

        Image.new("RGB", (8, 8)).save(chain / "images" / "a.png")
        stats = ("stats", "images", "--inception-weights", "inception.pth", "--overwrite")
        refused(run, chain, 2, *stats, "-o", "images/stats.npz")
        refused(run, chain, 2, *stats, "-o", "images/a.png")
        refused(run, chain, 2, *stats, "-o", "inception.pth")

    def test_a_page_may_lie_among_its_results_and_replaces_none_of_them(self, run: Run, chain: Path):
        assert run("report", ".", "-o", "page.html", cwd=chain).returncode == 0
        assert run("report", ".", "-o", "page.html", cwd=chain).returncode == 0
        refused(run, chain, 2, "report", ".", "-o", "exported/page.html")

    def test_the_packaged_models_are_inputs(
        self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Path
    ):
        from dqtool.models.sources import resolve

        shutil.copytree(made / "tiny", tmp_path / "zoo" / "tiny")
        monkeypatch.setattr(resolve, "ZOO", tmp_path / "zoo")
        refused(run, tmp_path, 2, "zoo", "get", "tiny", "-o", "zoo/tiny/copy")
        refused(run, tmp_path, 2, "dilate", "zoo:tiny", "-o", "zoo/tiny/x.safetensors")


class TestFilesOfOthers:
    @pytest.mark.parametrize(
        ("name", "arguments"),
        [
            ("x.png", (*SAMPLE, "-o", "x.png")),
            ("x.png", (*EVAL, "--grid", "x.png")),
            ("x.npz", (*EVAL, "--save-samples", "x.npz")),
            ("x.json", (*EVAL[:-1], "x.json")),
            ("x.safetensors", ("dilate", "tiny", "-o", "x.safetensors")),
            ("x.html", ("report", "eval.json", "-o", "x.html")),
            ("x.md", ("report", "eval.json", "-o", "x.md")),
        ],
        ids=lambda value: value if isinstance(value, str) else " ".join(value),
    )
    def test_are_replaced_only_with_overwrite(self, run: Run, chain: Path, name: str, arguments: tuple[str, ...]):
        (chain / name).write_text("years of work")
        assert "--overwrite" in refused(run, chain, 4, *arguments)
        assert "--overwrite" in refused(run, chain, 4, *arguments, "--force")
        result = run(*arguments, "--overwrite", cwd=chain)
        assert result.returncode == 0, result.stderr
        assert (chain / name).read_bytes() != b"years of work"
        result = run(*arguments, "--force", cwd=chain)  # now it is ours
        assert result.returncode == 0, result.stderr

    def test_a_model_of_the_same_names_is_not_replaced_by_force(
        self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Path
    ):
        from dqtool.models.sources import resolve

        shutil.copytree(made / "tiny", tmp_path / "zoo" / "tiny")
        monkeypatch.setattr(resolve, "ZOO", tmp_path / "zoo")
        assert run("zoo", "get", "tiny", "-o", "mine", cwd=tmp_path).returncode == 0
        (tmp_path / "mine" / "unet" / "config.json").write_text("{}")
        refused(run, tmp_path, 4, "zoo", "get", "tiny", "-o", "mine", "--force")
        assert run("zoo", "get", "tiny", "-o", "mine", "--overwrite", cwd=tmp_path).returncode == 0


class TestLinksAndDevices:
    @pytest.mark.parametrize("target", ["years", "gone", "/dev/stdout", "/dev/null"])
    @pytest.mark.parametrize(
        ("name", "arguments"),
        [
            ("x.png", (*SAMPLE, "-o", "x.png")),
            ("x.png", (*EVAL, "--grid", "x.png")),
            ("x.npz", (*EVAL, "--save-samples", "x.npz")),
            ("x.json", (*EVAL[:-1], "x.json")),
            ("x.safetensors", ("dilate", "tiny", "-o", "x.safetensors")),
            ("x", ("export", "-o", "x")),
            ("x.html", ("report", "eval.json", "-o", "x.html")),
            ("x.json", ("bench", "exported", "-o", "x.json")),
            ("x", ("zoo", "get", "digits-ddpm", "-o", "x")),
        ],
        ids=lambda value: value if isinstance(value, str) else " ".join(value),
    )
    def test_a_link_is_never_replaced(self, run: Run, chain: Path, target: str, name: str, arguments: tuple[str, ...]):
        (chain / "years").write_text("of work")
        (chain / name).symlink_to(target)
        assert "symbolic link" in refused(run, chain, 4, *arguments, "--overwrite", "--force")
        assert os.readlink(chain / name) == target

    @pytest.mark.parametrize("place", ["/dev/stdout", "/dev/null", "pipe.png"])
    def test_devices_and_pipes(self, run: Run, chain: Path, place: str):
        os.mkfifo(chain / "pipe.png")
        before = listing_names(chain)
        for arguments in ((*SAMPLE, "-o", place), (*EVAL, "--grid", place), (*EVAL, "--save-samples", place)):
            result = run(*arguments, "--overwrite", cwd=chain)
            assert (result.returncode, result.stdout) == (4, ""), result.stderr
        assert listing_names(chain) == before
        assert os.path.lexists(place if place.startswith("/") else chain / place)


def listing_names(path: Path) -> set[str]:
    """Like `listing`, without opening anything: a pipe would never answer."""
    return {entry.relative_to(path).as_posix() for entry in path.rglob("*")}
