"""Threads of a step: the same numbers from OpenMP's threads and from the pool, in forked processes and in several threads, too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from families import component_directory
from synthetic import synthetic_network
from test_calls import example
from torch import Tensor, nn

from dqtool.runtimes.cpu import convert, library, threads
from dqtool.runtimes.cpu.threads import LOSSES, SECONDS, Machine, float_threads, step_threads


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    """Give PyTorch four threads, more than many machines have processors."""
    if library.get() is None:
        pytest.skip("no kernels")
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def crowded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judge the machine to be crowded, whatever else it does."""
    monkeypatch.setattr(threads, "_machine", always(True))


def always(crowded: bool) -> Machine:
    """Return a judgement that steps don't change."""
    machine = Machine(crowded)
    machine.add = lambda *_: None  # type: ignore[method-assign]
    return machine


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """A small network with attention on the integer engine."""
    path: Path = component_directory("unet2d_condition", tmp_path_factory.mktemp("threads") / "model")
    return convert(synthetic_network(str(path), "4/4"))


def run(engine: Any, batch: int = 16) -> Tensor:
    output: Tensor = engine(**example(engine, batch))[0]
    return output


def test_pool_computes_the_same_bits(engine: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_machine", always(False))
    expected = run(engine)
    monkeypatch.setattr(threads, "_machine", always(True))
    for _ in range(10):
        assert torch.equal(run(engine), expected)
    assert torch.get_num_threads() == 4


@pytest.mark.usefixtures("crowded")
def test_loops_of_several_threads_at_once(engine: nn.Module) -> None:
    expected, kernels = run(engine), library.get()
    assert kernels is not None
    x = torch.randn(64, 64 * 64)

    def rotate(_: int) -> bool:
        torch.set_num_threads(4)
        out = torch.empty_like(x)
        for _ in range(50):
            with step_threads():
                kernels.dq_rotate(x.data_ptr(), out.data_ptr(), x.numel() // 64, 64, 0.125)
        back = torch.empty_like(x)
        kernels.dq_rotate(out.data_ptr(), back.data_ptr(), x.numel() // 64, 64, 0.125)
        return torch.allclose(back, x, atol=1e-5)

    with ThreadPoolExecutor(3) as others:
        found = others.map(rotate, range(3))
        for _ in range(5):
            assert torch.equal(run(engine), expected)
        assert all(found)


@pytest.mark.usefixtures("crowded")
def test_forked_process_gets_threads_of_its_own() -> None:
    kernels = library.get()
    assert kernels is not None
    x = torch.ones(64, 64 * 64)

    def rotated() -> Tensor:
        out = torch.empty_like(x)
        with step_threads():
            kernels.dq_rotate(x.data_ptr(), out.data_ptr(), x.numel() // 64, 64, 0.125)
        return out

    expected = rotated().numpy().tobytes()
    child = os.fork()
    if not child:  # without PyTorch's own loops: OpenMP's threads do not survive a fork
        os._exit(0 if rotated().numpy().tobytes() == expected else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.usefixtures("crowded")
def test_pytorch_has_one_thread_within_a_crowded_step_alone() -> None:
    with step_threads():
        assert torch.get_num_threads() == 1
        with step_threads(), float_threads(10):
            assert torch.get_num_threads() == 1
        with float_threads(10**12):
            assert torch.get_num_threads() == 4
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 4
    with pytest.raises(KeyError), step_threads():
        raise KeyError
    assert torch.get_num_threads() == 4
    with float_threads(10**12):  # outside of a step nothing changes
        assert torch.get_num_threads() == 4
    assert torch.get_num_threads() == 4


def test_machine_is_judged_by_lost_processors() -> None:
    machine = Machine()
    machine.add(SECONDS / 4, 1000, 2)
    assert not machine.crowded  # too short to tell
    machine.add(SECONDS, 0, 2)
    assert machine.crowded
    machine.add(1.0, LOSSES // 2, 2)
    assert not machine.crowded
    machine.add(1.0, LOSSES * 3, 4)
    assert not machine.crowded
    machine.add(1.0, LOSSES * 5, 4)
    assert machine.crowded
