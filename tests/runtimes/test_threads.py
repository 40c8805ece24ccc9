"""Threads of a step: the same numbers from OpenMP's threads and from the pool, in forked processes and in several threads, too."""

from __future__ import annotations

import copy
import os
import signal
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

from dqtool.nn.call_lock import one_call_at_a_time
from dqtool.runtimes.cpu import convert, library, threads
from dqtool.runtimes.cpu.float_layer import FloatLayer
from dqtool.runtimes.cpu.threads import LOSSES, OF_THREAD, SECONDS, Machine, float_threads, step_threads

NETWORK = nn.Identity()
"""Stands for the network of a step where only its threads matter."""


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


def tasks() -> int:
    """Return the number of threads of this process."""
    return len(os.listdir("/proc/self/task"))


def test_pool_computes_the_same_bits(engine: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_machine", always(False))
    expected = run(engine)
    monkeypatch.setattr(threads, "_machine", always(True))
    for _ in range(10):
        assert torch.equal(run(engine), expected)
    assert torch.get_num_threads() == 4
    assert tasks() >= 1 + 3 + 3  # OpenMP's threads, and the pool's


@pytest.mark.usefixtures("crowded")
def test_layers_in_float_compute_the_same(engine: nn.Module, tmp_path: Path) -> None:
    path: Path = component_directory("unet2d_condition", tmp_path / "model")
    packed = synthetic_network(str(path), "4/16")
    network = convert(copy.deepcopy(packed))
    assert any(isinstance(module, FloatLayer) for module in network.modules())
    with torch.no_grad():
        assert torch.allclose(run(network), run(packed), atol=1e-5)


@pytest.mark.usefixtures("crowded")
def test_compiled_parts_keep_their_number_of_threads(engine: nn.Module) -> None:
    seen: list[int] = []

    def watch(_module: nn.Module, _arguments: Any) -> None:
        seen.append(torch.get_num_threads())

    handle = engine.conv_out.register_forward_pre_hook(watch)
    run(engine)
    engine.conv_in._compiled_call_impl = engine.conv_in._call_impl
    run(engine)
    engine.conv_in._compiled_call_impl = None
    handle.remove()
    assert seen == [1, 4]


def test_networks_of_older_versions_and_changes_of_form_within_a_call() -> None:
    network = one_call_at_a_time(nn.Linear(2, 2), step_threads)
    lock = network.__dict__["_dqtool_lock"]
    assert one_call_at_a_time(network).__dict__["_dqtool_lock"] is lock
    del network.__dict__["_dqtool_around"]
    assert network(torch.zeros(1, 2)).shape == (1, 2)


@pytest.mark.usefixtures("crowded")
def test_loops_of_several_threads_at_once(engine: nn.Module) -> None:
    expected, kernels = run(engine), library.get()
    assert kernels is not None
    x = torch.randn(64, 64 * 64)

    def rotate(_: int) -> bool:
        torch.set_num_threads(4)
        out = torch.empty_like(x)
        for _ in range(50):
            with step_threads(NETWORK):
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
        with step_threads(NETWORK):
            kernels.dq_rotate(x.data_ptr(), out.data_ptr(), x.numel() // 64, 64, 0.125)
        return out

    expected = rotated().numpy().tobytes()
    child = os.fork()
    if not child:  # without PyTorch's own loops: OpenMP's threads do not survive a fork
        code = 1
        try:
            signal.alarm(60)
            code = 0 if rotated().numpy().tobytes() == expected and tasks() == 1 + 3 else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.usefixtures("crowded")
def test_pytorch_has_one_thread_within_a_crowded_step_alone() -> None:
    with step_threads(NETWORK):
        assert torch.get_num_threads() == 1
        with step_threads(NETWORK), float_threads(10):
            assert torch.get_num_threads() == 1
        with float_threads(10**12):
            assert torch.get_num_threads() == 4
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 4
    with pytest.raises(KeyError), step_threads(NETWORK):
        raise KeyError
    assert torch.get_num_threads() == 4
    with float_threads(10**12):  # outside of a step nothing changes
        assert torch.get_num_threads() == 4
    assert torch.get_num_threads() == 4


@pytest.mark.usefixtures("crowded")
def test_one_crowded_step_at_a_time() -> None:
    with step_threads(NETWORK), ThreadPoolExecutor(1) as other:

        def threads_of_another_step() -> int:
            torch.set_num_threads(4)
            with step_threads(NETWORK):
                return torch.get_num_threads()

        assert other.submit(threads_of_another_step).result() == 4
        assert torch.get_num_threads() == 1
    with step_threads(NETWORK):
        torch.set_num_threads(3)
    assert torch.get_num_threads() == 3  # the program's own choice stays


def test_machine_is_judged_by_lost_processors() -> None:
    machine = Machine()
    machine.add(SECONDS / 4, 1000, 2)
    assert not machine.crowded  # too short to tell
    machine.add(SECONDS, 0, 2)
    assert machine.crowded
    for lost, crowded in ((LOSSES + 2 * OF_THREAD, False), (LOSSES + 2 * OF_THREAD + 1, True)):
        machine.add(1.0, lost, 2)
        assert machine.crowded is crowded
    machine.add(1.0, LOSSES + 2 * OF_THREAD + 1, 16)
    assert not machine.crowded
