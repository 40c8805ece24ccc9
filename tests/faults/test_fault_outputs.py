"""Outputs that can't or must not be written: an error before any work, and existing files stay."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CHAIN, Run
from helpers import listing, refused


@pytest.mark.parametrize("arguments", CHAIN, ids=lambda arguments: arguments[0])
class TestEveryStage:
    def test_into_a_directory_that_is_not_there(self, run: Run, made: Path, arguments: tuple[str, ...]):
        name = f"gone/{suffixed(arguments[0])}"
        assert "gone" in refused(run, made, 4, *arguments, "-o", name)

    def test_below_a_file(self, run: Run, made: Path, arguments: tuple[str, ...]):
        refused(run, made, 4, *arguments, "-o", f"dilated.safetensors/{suffixed(arguments[0])}")

    def test_over_something_of_another_kind(self, run: Run, chain: Path, arguments: tuple[str, ...]):
        name = suffixed(arguments[0])
        if arguments[0] == "export":
            (chain / name).write_text("a file")
        else:
            (chain / name).mkdir()
        refused(run, chain, 4, *arguments, "-o", name)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_without_permission(self, run: Run, chain: Path, arguments: tuple[str, ...]):
        (chain / "locked").mkdir(mode=0o500)
        refused(run, chain, 4, *arguments, "-o", f"locked/{suffixed(arguments[0])}")


def test_a_file_system_that_takes_no_files(run: Run, made: Path):
    if not os.path.isdir("/proc/self"):
        pytest.skip("needs /proc")
    refused(run, made, 4, "dilate", "tiny", "-o", "/proc/self/dilated.safetensors")


def test_a_directory_with_files_of_others_is_not_replaced(run: Run, chain: Path):
    (chain / "thesis").mkdir()
    (chain / "thesis" / "main.tex").write_text("years of work")
    refused(run, chain, 4, "export", "-o", "thesis")
    (chain / "exported" / "notes.txt").write_text("mine")
    assert "notes.txt" in refused(run, chain, 4, "export", "--force")


def test_the_output_is_not_the_input(run: Run, chain: Path):
    refused(run, chain, 2, "calibrate", "dilated.safetensors", "-o", "./dilated.safetensors")
    refused(run, chain, 2, "distill", "-o", "calibrated.safetensors")
    weights = "tiny/unet/diffusion_pytorch_model.safetensors"
    refused(run, chain, 2, "dilate", weights, "-o", weights)
    refused(run, chain, 2, "dilate", "tiny", "-o", weights)


def test_the_manifest_does_not_overwrite_a_foreign_json(run: Run, chain: Path):
    (chain / "other").mkdir()
    shutil.copy(chain / "tiny" / "unet" / "config.json", chain / "other")
    assert "config.json" in refused(run, chain, 4, "dilate", "tiny", "-o", "other/config.safetensors")


def test_suffixes_that_mislead(run: Run, chain: Path):
    refused(run, chain, 2, "dilate", "tiny", "-o", "dilated.json")
    refused(run, chain, 2, "eval", "--samples", "4", "-o", "report.safetensors")


def test_pictures(run: Run, chain: Path):
    refused(run, chain, 4, "sample", "exported", "-n", "1", "-o", "gone/x.png")
    refused(run, chain, 4, "eval", "--samples", "4", "--grid", "gone/x.png", "-o", "new.json")


def test_a_disk_that_fills_up_leaves_what_was_there(run: Run, chain: Path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = listing(chain)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        result = run("dilate", "tiny", "--force", cwd=chain)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (result.returncode, result.stdout) == (4, "")
    assert listing(chain) == before


def test_standard_output_that_can_not_be_written(chain: Path):
    command = [sys.executable, "-m", "dqtool", "inspect", "eval.json"]
    limit = (100, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    with open(chain / "out", "w") as out:
        result = subprocess.run(
            command,
            cwd=chain,
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
        )
    assert result.returncode == 4
    assert result.stderr.startswith("dqtool inspect: The file is larger than this system allows")
    assert result.stderr.count("\n") == 1


def suffixed(stage: str) -> str:
    return {"export": "x", "eval": "x.json"}.get(stage, "x.safetensors")
