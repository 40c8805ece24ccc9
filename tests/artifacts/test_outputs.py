"""Outputs that a command accepts: never an input, and over nothing but what dqtool wrote."""

from __future__ import annotations

import json
import os
import re
import socket
import zipfile
from pathlib import Path

import pytest
import torch
import typer
from PIL import Image

from dqtool.artifacts import Manifest, check_outputs, check_writable, commit, commit_directory, commit_report
from dqtool.artifacts.files import target_of
from dqtool.artifacts.outputs import OutputKind, check_results
from dqtool.cli import app
from dqtool.errors import EnvironmentFault, UsageError
from dqtool.metrics.batches import write_npz
from dqtool.metrics.grid import save_grid
from dqtool.page.document import Page
from dqtool.page.html import render_html
from dqtool.page.markdown import render_markdown
from dqtool.stages.registry import STAGES
from dqtool.stages.shared.paths import READ, WRITTEN, read_paths

KINDS: dict[OutputKind, str] = {
    "artifact": "x.safetensors",
    "report": "x.json",
    "picture": "x.png",
    "images": "x.npz",
    "page": "x.html",
}


def note(stage: str = "dilate") -> Manifest:
    return Manifest(stage=stage, fingerprint="0" * 64)


def write(kind: str, path: Path) -> None:
    """Write a file of this kind the way dqtool does."""
    page = Page("Quantization report", "1 result of 1 model; page made by dqtool 0.1.0.", [])
    if kind == "artifact":
        commit(path, {"a": torch.zeros(1)}, note())
    elif kind == "report":
        commit_report(path, note("eval"))
    elif kind == "picture":
        save_grid([("a", torch.zeros(1, 1, 4, 4))], str(path))
    elif kind == "images":
        write_npz(path, None, {}, {})
    else:
        path.write_text(render_html(page) if path.suffix == ".html" else render_markdown(page))


@pytest.mark.parametrize("kind", KINDS)
def test_dqtool_knows_what_it_wrote(kind: OutputKind, tmp_path: Path):
    path = tmp_path / KINDS[kind]
    write(kind, path)
    check_writable(path, kind)
    write(kind, path)


def test_pages_and_reports_of_other_kinds(tmp_path: Path):
    write("page", tmp_path / "p.md")
    check_writable(tmp_path / "p.md", "page")
    commit_report(tmp_path / "bench.json", {"format": "dqtool-bench/1"})
    commit_report(tmp_path / "bench.json", {"command": "dqtool bench exported"})  # before they had a format
    check_writable(tmp_path / "bench.json", "report")


@pytest.mark.parametrize("kind", KINDS)
def test_what_others_wrote_stands(kind: OutputKind, tmp_path: Path):
    path = tmp_path / KINDS[kind]
    path.write_bytes(b"years of work")
    with pytest.raises(EnvironmentFault, match="--overwrite"):
        check_writable(path, kind)
    check_writable(path, kind, overwrite=True)


def test_what_only_looks_like_ours_stands(tmp_path: Path):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("arr_0.npy", b"")
    (tmp_path / "x.json").write_text('{"_class_name": "UNet2DModel"}')
    (tmp_path / "x.html").write_text("<title>dqtool</title>")
    (tmp_path / "x.safetensors").write_bytes(b"weights of a model with its config beside it")
    for kind, name in KINDS.items():
        with pytest.raises(EnvironmentFault):
            check_writable(tmp_path / name, kind)


def test_an_artifact_is_not_replaced_by_a_picture(tmp_path: Path):
    write("artifact", tmp_path / "x.safetensors")
    for kind in ("picture", "images", "page"):
        with pytest.raises(EnvironmentFault, match="no (picture|npz file|page) that dqtool wrote"):
            check_writable(tmp_path / "x.safetensors", kind)  # type: ignore[arg-type]
    for overwrite in (False, True):
        with pytest.raises(EnvironmentFault, match="manifest of an artifact"):
            check_writable(tmp_path / "x.json", "report", overwrite=overwrite)


class TestInputs:
    @pytest.mark.parametrize("kind", [*KINDS, "directory"])
    @pytest.mark.parametrize("overwrite", [False, True])
    def test_nothing_is_written_into_an_input(self, kind: OutputKind, overwrite: bool, tmp_path: Path):
        name = KINDS.get(kind, "x")
        (tmp_path / "model" / "unet").mkdir(parents=True)
        (tmp_path / "link").symlink_to(tmp_path / "model")
        for place in ("model", "model/unet", "link", "link/unet", "model/../model/unet"):
            for source in ("model", "link"):
                with pytest.raises(UsageError, match="a directory that this command reads"):
                    check_writable(tmp_path / place / name, kind, inputs=[tmp_path / source], overwrite=overwrite)

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_no_input_is_replaced_under_any_name(self, overwrite: bool, tmp_path: Path):
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "w.safetensors").write_bytes(b"weights")
        os.link(tmp_path / "model" / "w.safetensors", tmp_path / "hard.safetensors")
        (tmp_path / "here").symlink_to(tmp_path)
        for path, source in (
            ("model/w.safetensors", "model/w.safetensors"),
            ("here/model/w.safetensors", "model/w.safetensors"),
            ("hard.safetensors", "model/w.safetensors"),
            ("hard.safetensors", "model"),
        ):
            with pytest.raises(UsageError):
                check_writable(tmp_path / path, inputs=[tmp_path / source], overwrite=overwrite)

    def test_the_manifest_of_an_input_is_an_input(self, tmp_path: Path):
        write("artifact", tmp_path / "x.safetensors")
        with pytest.raises(UsageError):
            check_writable(tmp_path / "x.json", "report", inputs=[tmp_path / "x.safetensors"], overwrite=True)

    def test_the_manifest_of_an_output_is_an_output(self, tmp_path: Path):
        (tmp_path / "x.json").write_text('["a prompt"]')
        with pytest.raises(UsageError):
            check_writable(tmp_path / "x.safetensors", inputs=[tmp_path / "x.json"], overwrite=True)

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_no_directory_that_holds_an_input_is_replaced(self, overwrite: bool, tmp_path: Path):
        commit_directory(tmp_path / "x", lambda new: (new / "a.safetensors").write_bytes(b""), note("export"))
        with pytest.raises(UsageError, match="holds an input"):
            check_writable(tmp_path / "x", "directory", inputs=[tmp_path / "x" / "a.safetensors"], overwrite=overwrite)

    def test_names_that_are_no_paths_are_passed_over(self, tmp_path: Path):
        check_writable(tmp_path / "x.safetensors", inputs=["zoo:digits-ddpm", "org/name", tmp_path / "gone"])

    def test_two_outputs_are_two_files(self, tmp_path: Path):
        (tmp_path / "here").symlink_to(tmp_path)
        with pytest.raises(UsageError, match="Two outputs"):
            check_outputs([(str(tmp_path / "x.png"), "picture"), (str(tmp_path / "here" / "x.png"), "images")])
        check_outputs([(str(tmp_path / "x.png"), "picture"), (str(tmp_path / "y.npz"), "images")])


class TestDirectories:
    def test_overwrite_loses_files_in_a_directory_of_ours_only(self, tmp_path: Path):
        commit_directory(tmp_path / "x", lambda new: (new / "a").write_text(""), note("export"))
        (tmp_path / "x" / "notes.txt").write_text("mine")
        with pytest.raises(EnvironmentFault, match=r"notes\.txt"):
            check_writable(tmp_path / "x", "directory")
        check_writable(tmp_path / "x", "directory", overwrite=True)
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "thesis.tex").write_text("years of work")
        with pytest.raises(EnvironmentFault, match="did not make it"):
            check_writable(tmp_path / "home", "directory", overwrite=True)

    def test_a_link_in_it_is_a_file_of_the_user(self, tmp_path: Path):
        commit_directory(tmp_path / "x", lambda new: (new / "a").write_text(""), note("export"))
        (tmp_path / "x" / "data").symlink_to(tmp_path)
        with pytest.raises(EnvironmentFault, match="data"):
            check_writable(tmp_path / "x", "directory")


class TestLinksAndDevices:
    @pytest.mark.parametrize("kind", [*KINDS, "directory"])
    @pytest.mark.parametrize("target", ["file", "gone", "directory", "/dev/null", "/dev/stdout"])
    def test_a_link_is_refused_and_stands(self, kind: OutputKind, target: str, tmp_path: Path):
        (tmp_path / "file").write_text("")
        (tmp_path / "directory").mkdir()
        link = tmp_path / KINDS.get(kind, "x")
        link.symlink_to(target)
        for overwrite in (False, True):
            with pytest.raises(EnvironmentFault, match="symbolic link") as caught:
                check_writable(link, kind, overwrite=overwrite)
            assert caught.value.exit_code == 4
        assert os.readlink(link) == target

    def test_devices_pipes_and_sockets(self, tmp_path: Path):
        os.mkfifo(tmp_path / "pipe.png")
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(str(tmp_path / "s.png"))
            for path in (tmp_path / "pipe.png", tmp_path / "s.png", Path("/dev/null"), Path("/dev/stdout")):
                with pytest.raises(EnvironmentFault) as caught:
                    check_writable(path, "picture", overwrite=True)
                assert caught.value.exit_code == 4

    def test_no_writer_can_get_around_it(self, tmp_path: Path):
        (tmp_path / "x.safetensors").symlink_to(tmp_path / "y")
        (tmp_path / "x.png").symlink_to(tmp_path / "y")
        (tmp_path / "x.npz").symlink_to(tmp_path / "y")
        with pytest.raises(EnvironmentFault):
            write("artifact", tmp_path / "x.safetensors")
        for kind in ("picture", "images"):
            with pytest.raises(EnvironmentFault):
                write(kind, tmp_path / KINDS[kind])  # type: ignore[index]
        assert sorted(os.listdir(tmp_path)) == ["x.npz", "x.png", "x.safetensors"]

    def test_a_null_character(self):
        with pytest.raises(EnvironmentFault, match="NUL"):
            target_of("a\0b")


def test_every_option_that_names_a_file_is_known():
    """A new option whose help shows a FILE, DIR or MODEL is read or written; this test asks for the decision."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    unknown = []
    for name in (*STAGES, "bench", "report"):
        for option in commands[name].params:
            shown = f"{option.metavar or ''} {getattr(option, 'help', '') or ''}"
            if re.search(r"\b(FILE|DIR|MODEL|RECIPE)\b", shown) and option.name not in READ | WRITTEN:
                unknown.append(f"{name} {option.name}")
    assert not unknown, "add them to dqtool/stages/shared/paths.py"


def test_a_lora_is_read_without_its_weight(tmp_path: Path):
    from dqtool.stages.dilate import DilateOptions

    (tmp_path / "a:b").write_text("")
    options = DilateOptions("m", lora=(f"{tmp_path}/x.safetensors:0.8", f"{tmp_path}/a:b"), config="c.json")
    assert read_paths(options)[:2] == ["m", "m"]
    assert {f"{tmp_path}/x.safetensors", f"{tmp_path}/a:b", "c.json"} <= set(read_paths(options))


def test_the_format_of_reports_is_told(tmp_path: Path):
    write("report", tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text())["format"].startswith("dqtool/")


class TestResults:
    """A JSON report with texts and figures beside it, as `python -m dqtool.tables` and the scripts of recipes write."""

    def test_its_own_are_replaced(self, tmp_path: Path) -> None:
        report, text = tmp_path / "a.json", tmp_path / "a.md"
        check_results(report, [text])
        report.write_text('{"format": "dqtool-table/1"}')
        text.write_text("a table")
        check_results(report, [text, tmp_path / "a.svg"])

    @pytest.mark.parametrize("content", ['{"years": "of work"}', "years of work", '{"format": "dqtool/1", "file": {}}'])
    def test_other_files_are_not(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(EnvironmentFault):
            check_results(tmp_path / "a.json", [])

    def test_a_text_without_its_report_is_not(self, tmp_path: Path) -> None:
        (tmp_path / "a.md").write_text("years of work")
        with pytest.raises(EnvironmentFault, match="not beside it"):
            check_results(tmp_path / "a.json", [tmp_path / "a.md"])
        assert (tmp_path / "a.md").read_text() == "years of work"

    def test_a_link_or_a_device_is_not(self, tmp_path: Path) -> None:
        (tmp_path / "a.json").write_text('{"format": "dqtool-table/1"}')
        (tmp_path / "a.md").symlink_to(tmp_path / "years")
        with pytest.raises(EnvironmentFault, match="link"):
            check_results(tmp_path / "a.json", [tmp_path / "a.md"])


UNCHECKED = {
    "index_results": "rewrites the index and the tables of the repository's own README",
    "terrain_figures": "is called by terrain, which checks",
}


def test_scripts_that_write_results_check_them_first() -> None:
    import ast

    recipes = Path(__file__).parents[2] / "recipes"
    for path in sorted(recipes.glob("*.py")):
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        named = {call.id if isinstance(call, ast.Name) else getattr(call, "attr", "") for call in calls}
        if "write_text" in named and path.stem not in UNCHECKED:
            assert named & {"check_results", "check_writable"}, path.name
