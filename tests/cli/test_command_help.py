"""The shape of the command line: help, versions, which options there are, and how fast it answers."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from conftest import Run

from dqtool import __version__
from dqtool.cli import COMMON, app
from dqtool.stages.registry import STAGES, make_options, option_types

COMMANDS = [*STAGES, "run", "inspect", "report", "zoo list", "zoo get"]
POSITIONAL = {"model", "artifact", "directory"}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_an_example(run: Run, tmp_path: Path, command: str):
    result = run(*command.split(), "--help", cwd=tmp_path)
    assert result.returncode == 0
    assert result.stderr == ""
    assert "Example" in result.stdout
    assert result.stdout.rstrip().splitlines()[-1].strip().startswith(f"dqtool {command}")


def test_the_group_has_help_too(run: Run, tmp_path: Path):
    result = run("--help", cwd=tmp_path)
    assert all(command.split()[0] in result.stdout for command in COMMANDS)
    assert run("zoo", "--help", cwd=tmp_path).returncode == 0


def test_no_command_is_a_usage_error_that_shows_the_help(run: Run, tmp_path: Path):
    result = run(cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert "Commands:" in result.stderr


def test_version(run: Run, tmp_path: Path):
    assert run("--version", cwd=tmp_path).stdout == f"dqtool {__version__}\n"


@pytest.mark.parametrize("stage", STAGES)
def test_the_command_offers_exactly_the_options_of_the_stage_with_their_defaults(stage: str):
    command = typer.main.get_command(app).commands[stage]  # type: ignore[attr-defined]
    offered = {p.name: p for p in command.params if p.name not in COMMON and p.name not in {*POSITIONAL, "help"}}
    required = {key: "x" for key in ("model", "directory") if any(p.name == key for p in command.params)}
    options = make_options(stage, required)
    assert set(offered) == {field.name for field in dataclasses.fields(options)} - POSITIONAL
    assert {option.replace("-", "_") for option in option_types(stage)} == set(offered)
    for name, parameter in offered.items():
        assert parameter.help
        assert f"--{name.replace('_', '-')}" in parameter.opts
        default = getattr(options, name)
        assert (parameter.default or None) == (default or None), name


@pytest.mark.parametrize("command", COMMANDS)
def test_the_common_options_are_everywhere(run: Run, tmp_path: Path, command: str):
    text = run(*command.split(), "--help", cwd=tmp_path).stdout
    assert all(f"--{name.replace('_', '-')}" in text for name in COMMON)


def test_help_answers_at_once_and_imports_nothing_heavy():
    assert fastest([sys.executable, "-m", "dqtool", "--help"]) < 0.3
    code = "import sys; from dqtool.__main__ import main; main(); print(*sys.modules, file=sys.stderr)"
    modules = subprocess.run(
        [sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True
    ).stderr.split()
    assert not {"torch", "diffusers", "numpy", "rich.console", "yaml", "safetensors"} & set(modules)


def test_the_package_imports_at_once_and_without_torch():
    code = (
        "import sys, time; start = time.process_time(); import dqtool; seconds = time.process_time() - start;"
        "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules; print(seconds)"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(5)]
    assert min(float(each.stdout) for each in runs) < 0.1


def fastest(command: list[str]) -> float:
    """Least processor seconds of several runs: the machine may be busy with something else, and stretch the clock's."""
    times = []
    for _ in range(7):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        times.append(usage.ru_utime + usage.ru_stime)
    return min(times)
