"""Fixtures for several test packages: a tiny real model and the artifacts of its chain, made once."""

from __future__ import annotations

import os

# Before torch is imported: tiny models gain nothing from threads and lose much to them on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before Triton is imported, which PyTorch's compiler does: kernels for GPUs run in its interpreter.
os.environ.setdefault("TRITON_INTERPRET", "1")

import shutil
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from distillation_tasks import base_task, make_task, silent, task  # noqa: F401  (fixtures)
from helpers import tiny_pipeline
from pytest_console_scripts import RunResult, ScriptRunner

from dqtool import report

Run = Callable[..., RunResult]

CHAIN = (
    ("dilate", "tiny"),
    ("calibrate", "--steps", "4", "--samples", "16"),
    ("distill", "--iters", "2", "--refine-iters", "2"),
    ("export",),
    ("eval", "--samples", "4"),
)
"""The five stages on the tiny model, with their default file names."""


SLOW = Path(__file__).with_name("slow.txt")
"""Names of the tests that run with `--slow` alone, or where files are named."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help=f"run the tests of {SLOW.name} too")


def pytest_configure(config: pytest.Config) -> None:
    """Tell the workers, which inherit the environment, to run every test of the files that the command line names."""
    named = config.args_source is pytest.Config.ArgsSource.ARGS and not hasattr(config, "workerinput")
    if named or config.getoption("--slow"):
        os.environ["RUN_SLOW_TESTS"] = "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the slow tests out."""
    if os.environ.get("RUN_SLOW_TESTS"):
        return
    slow = {line for line in SLOW.read_text().splitlines() if line and not line.startswith("#")}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in slow])
    items[:] = [item for item in items if item.nodeid not in slow]


@pytest.fixture(scope="session", autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    cache = tmp_path_factory.mktemp("cache")
    os.environ["DQTOOL_CACHE"] = str(cache)
    if "PYTEST_XDIST_WORKER" in os.environ:  # kernels take seconds to compile and are the same for all workers
        kernels = tmp_path_factory.getbasetemp().parent / "kernels"
        kernels.mkdir(exist_ok=True)
        (cache / "kernels").symlink_to(kernels)


@pytest.fixture(autouse=True)
def _no_measured_times() -> None:
    """Forget the times that an earlier test's `dqtool bench` kept: `auto` would follow them."""
    shutil.rmtree(Path(os.environ["DQTOOL_CACHE"]) / "auto", ignore_errors=True)


@pytest.fixture(autouse=True)
def _messages_are_shown() -> None:
    """Show messages again that an earlier test's `--quiet` switched off."""
    report.set_quiet(False)


@pytest.fixture(scope="session")
def run() -> Run:
    """Return `run("dilate", "tiny", cwd=...)`, which calls the console script in this process with empty standard
    input."""
    assert entry_points(group="console_scripts", name="dqtool"), "dqtool is not installed here: run `make setup`"
    runner = ScriptRunner("inprocess", ".")

    def call(*arguments: str, cwd: Path) -> RunResult:
        return runner.run(["dqtool", *map(str, arguments)], cwd=cwd, print_result=False)

    return call


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, run: Run) -> Path:
    """Return a directory with `tiny` (the model) and the chain's artifacts under their default names, for reading only."""
    directory = tmp_path_factory.mktemp("chain")
    tiny_pipeline(directory / "tiny")
    for arguments in CHAIN:
        result = run(*arguments, cwd=directory)
        assert result.returncode == 0, result.stderr
    return directory


@pytest.fixture
def chain(made: Path, tmp_path: Path) -> Path:
    """Return a writable copy of `made`."""
    directory = tmp_path / "work"
    shutil.copytree(made, directory)
    return directory


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write FID's Inception network with random weights that keep signals alive through its 94 convolutions; return the
    path."""
    import torch

    from dqtool.metrics.inception import InceptionV3

    torch.manual_seed(0)
    model = InceptionV3()
    for name, parameter in model.named_parameters():
        if name.endswith("conv.weight"):
            torch.nn.init.kaiming_normal_(parameter)
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory, run: Run) -> Path:
    """Return a directory with `tiny-sd`, a StableDiffusionPipeline, and `exported`, its 8/8 export without training."""
    from tiny_text import tiny_stable_diffusion

    directory = tmp_path_factory.mktemp("stable-diffusion")
    tiny_stable_diffusion(directory / "tiny-sd")
    for arguments in (
        ("dilate", "tiny-sd", "--scaling", "none"),
        ("calibrate", "--steps", "4", "--samples", "16", "--scaling", "keep"),
        ("distill", "--bits", "8/8", "--iters", "0"),
        ("export",),
    ):
        result = run(*arguments, cwd=directory)
        assert result.returncode == 0, result.stderr
    return directory


@pytest.fixture(scope="session")
def tiny(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the path of a table of two rows, for the model of `made`."""
    from table_text import TINY_TABLE

    path = tmp_path_factory.mktemp("tables") / "tiny.yaml"
    path.write_text(TINY_TABLE.format(model=made / "tiny"))
    return path
