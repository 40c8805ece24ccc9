"""Help and version of the command line, the options that commands offer, and the time that help takes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer
from check_prose import OPENINGS
from conftest import Run

from dqtool import __version__
from dqtool.cli import COMPLETION, GENERAL_OPTIONS, app
from dqtool.cli.help import with_names
from dqtool.cli.workers import SHARED_COMMANDS, ProcessOptions
from dqtool.stages.options.bench import BenchOptions
from dqtool.stages.options.declared import declared_options
from dqtool.stages.options.inspect import InspectOptions
from dqtool.stages.options.report import ReportOptions
from dqtool.stages.options.run import RunOptions
from dqtool.stages.options.zoo import ZooGetOptions, ZooListOptions
from dqtool.stages.registry import STAGES, option_types, options_class
from dqtool.training.methods import METHODS

COMMANDS = [*STAGES, "run", "inspect", "bench", "report", "zoo list", "zoo get"]


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


OPTIONS: dict[str, type] = {name: options_class(name) for name in STAGES} | {
    "run": RunOptions,
    "inspect": InspectOptions,
    "bench": BenchOptions,
    "report": ReportOptions,
    "zoo list": ZooListOptions,
    "zoo get": ZooGetOptions,
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_offers_exactly_the_options_that_its_class_declares(name: str):
    command: Any = typer.main.get_command(app)
    for part in name.split():
        command = command.commands[part]
    offered = {p.name: p for p in command.params if p.name not in {*GENERAL_OPTIONS, "help"}}
    declared = {each.name: each for each in declared_options(OPTIONS[name])}
    if name in SHARED_COMMANDS:
        declared |= {each.name: each for each in declared_options(ProcessOptions)}
    assert set(offered) == set(declared)
    for key, parameter in offered.items():
        assert parameter.help
        each = declared[key]
        if each.option.positional:
            assert parameter.param_type_name == "argument"
            continue
        assert each.long in parameter.opts
        default = ",".join(each.default) if each.option.separated and each.default else each.default
        assert (parameter.default or None) == (default or None), key


@pytest.mark.parametrize("stage", STAGES)
def test_recipes_know_every_option_of_a_stage(stage: str):
    declared = [each for each in declared_options(options_class(stage)) if not each.option.positional]
    assert {option.replace("-", "_") for option in option_types(stage)} == {each.name for each in declared}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_general_options_are_everywhere(run: Run, tmp_path: Path, command: str):
    text = run(*command.split(), "--help", cwd=tmp_path).stdout
    assert all(f"--{name.replace('_', '-')}" in text for name in GENERAL_OPTIONS)


def parameters(command: Any) -> list[Any]:
    """Return the parameters of a command and of the commands in its group."""
    return [
        *command.params,
        *(each for inner in getattr(command, "commands", {}).values() for each in parameters(inner)),
    ]


@pytest.mark.parametrize("parameter", parameters(typer.main.get_command(app)), ids=lambda each: str(each.opts[0]))
def test_each_help_text_is_a_sentence_that_opens_with_a_verb_or_a_noun(parameter: Any):
    assert parameter.help, parameter.opts
    word = parameter.help.split()[0]
    assert word[0].isupper() or word in METHODS, parameter.help
    assert word.lower() not in {*OPENINGS, "a", "an", "the", "its", "left", "any"}, parameter.help
    assert parameter.help.endswith("."), parameter.help


def registered(module: str, name: str) -> Iterable[str]:
    return getattr(import_module(module), name)


@pytest.mark.parametrize(
    ("command", "option", "module", "name"),
    [
        ("calibrate", "scaling", "dqtool.scaling.methods", "METHODS"),
        ("calibrate", "sampler", "dqtool.models.sampling.schedulers", "SAMPLERS"),
        ("calibrate", "spacing", "dqtool.models.sampling.schedulers", "SPACINGS"),
        ("calibrate", "variance", "dqtool.models.sampling.schedulers", "VARIANCES"),
        ("calibrate", "draw", "dqtool.core.draws", "DRAWS"),
        ("distill", "method", "dqtool.training.methods", "METHODS"),
        ("distill", "preset", "dqtool.core.quantization", "PRESETS"),
        ("export", "format", "dqtool.formats", "FORMATS"),
        ("eval", "sampler", "dqtool.models.sampling.schedulers", "SAMPLERS"),
        ("eval", "metrics", "dqtool.metrics", "METRICS"),
        ("eval", "metrics", "dqtool.stages.options.eval", "NETWORK_METRICS"),
        ("eval", "runtime", "dqtool.runtimes", "RUNTIMES"),
        ("sample", "runtime", "dqtool.runtimes", "RUNTIMES"),
        ("bench", "runtime", "dqtool.runtimes", "RUNTIMES"),
        ("bench", "against", "dqtool.bench.contenders", "CONTENDERS"),
        ("bench", "arch", "dqtool.models.architectures", "ARCHITECTURES"),
    ],
)
def test_help_names_every_choice(command: str, option: str, module: str, name: str):
    offered = typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
    text = with_names(next(each.help for each in offered if each.name == option))
    words = set(re.findall(r"[\w-]+", text))
    left_out = {"wd"} if option == "scaling" else set()  # dilate's own method, which looks at no activations
    assert set(registered(module, name)) - left_out <= words
    assert not re.search(r"[{}]", text)


def test_a_new_choice_is_named_without_touching_the_command(monkeypatch: pytest.MonkeyPatch):
    from dqtool.formats import FORMATS

    monkeypatch.setitem(FORMATS, "toy", "toy")
    assert "dq, dense, openvino, onnx, onnx-qdq, compressed-tensors, toy" in with_names("{dqtool.formats:FORMATS}")


@pytest.mark.parametrize("command", ["quantize", "calibrate", "distill", "eval", "sample"])
def test_help_has_panels_for_input_quality_and_resources(run: Run, tmp_path: Path, command: str):
    lines = run(command, "--help", cwd=tmp_path).stdout.splitlines()
    panels = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert panels == ["Arguments:", "Input and output:", "Quality:", "Resources:", "General:"]


def printed(*arguments: str, **variables: str) -> str:
    command = [sys.executable, "-m", "dqtool", *arguments]
    return subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [("dqtool di", ["dilate", "distill"]), ("dqtool export --fo", ["--format", "--force"])],
)
def test_the_shell_completes_commands_and_options(words: str, expected: list[str]):
    last = str(len(words.split()) - 1)
    assert printed(COMP_WORDS=words, COMP_CWORD=last, _DQTOOL_COMPLETE="complete_bash").split() == expected


def test_the_completion_script_asks_in_the_variable_that_is_answered():
    shown = printed("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert f"{COMPLETION}=complete_bash" in shown


def test_help_answers_at_once_and_imports_nothing_heavy():
    assert fastest([sys.executable, "-m", "dqtool", "--help"]) < 0.3
    code = "import sys; from dqtool.__main__ import main; main(); print(*sys.modules, file=sys.stderr)"
    modules = subprocess.run(
        [sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True
    ).stderr.split()
    assert not {"torch", "diffusers", "numpy", "rich.console", "yaml", "safetensors", "dqtool.artifacts"} & set(modules)


def test_the_package_imports_at_once_and_without_torch():
    code = (
        "import sys, time; start = time.process_time(); import dqtool; seconds = time.process_time() - start;"
        "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules; print(seconds)"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(5)]
    assert min(float(each.stdout) for each in runs) < 0.1


def fastest(command: list[str]) -> float:
    """Return the least processor seconds of several runs. Wall-clock time would grow on a busy machine."""
    times = []
    for _ in range(7):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        times.append(usage.ru_utime + usage.ru_stime)
    return min(times)
