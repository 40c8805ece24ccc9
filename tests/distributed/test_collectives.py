"""Exchange between two and three processes, each result against that of one."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from processes import in_processes

from dqtool import distributed
from dqtool.artifacts import Workspace
from dqtool.distributed.failures import FILE, record_failure, recorded
from dqtool.distributed.launching import _cause


def test_nothing_is_exchanged_by_a_process_alone() -> None:
    x = torch.arange(3.0)
    assert (distributed.rank(), distributed.world_size(), distributed.is_worker()) == (0, 1, False)
    assert distributed.by_rows(lambda each: each, x, rows=3) is x
    assert distributed.broadcast(x) is x
    assert distributed.gather(x) == [x]
    assert distributed.add_up([x], 2.5) == 2.5
    assert list(distributed.shared_batches([1, 2])) == [1, 2]


@pytest.mark.parametrize(("processes", "rows"), [(2, 8), (2, 5), (3, 7), (3, 2)])
def test_rows_are_computed_in_parts_and_come_back_whole(processes: int, rows: int) -> None:
    x = torch.arange(rows * 4.0).view(rows, 4)
    kinds = (torch.float32, torch.bfloat16, torch.int64, torch.bool)

    def work():
        seen = []

        def function(part, shared, named):
            seen.append(len(part))
            return {str(kind): part.to(kind) for kind in kinds} | {"sum": part + named["c"] * shared}

        found = distributed.by_rows(function, x, torch.tensor(2.0), {"c": x}, rows=rows)
        return found, seen

    wanted = {str(kind): x.to(kind) for kind in kinds} | {"sum": 3 * x}
    results = in_processes(processes, work)
    for found, _ in results:
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    parts = [seen[0] for _, seen in results]
    assert parts == ([rows] * processes if rows < processes else distributed_counts(rows, processes))


def distributed_counts(rows: int, processes: int) -> list[int]:
    return [len(part) for part in torch.arange(rows).tensor_split(processes)]


def test_values_tensors_and_batches_are_exchanged() -> None:
    def work():
        rank = distributed.rank()
        one, two = torch.full((2, 3), float(rank + 1)), torch.tensor([10.0 * (rank + 1)])
        total = distributed.add_up([one, two], 0.25 * (rank + 1))
        own = torch.full((3,), rank, dtype=torch.int64)
        distributed.copy_main([own])
        with distributed.solo():
            alone = (distributed.world_size(), distributed.gather(rank))
        batches = list(distributed.shared_batches(["a", "b"] if not rank else ()))
        return one, two, total, own, distributed.broadcast(f"of {rank}"), distributed.gather(rank), alone, batches

    for rank, found in enumerate(in_processes(3, work)):
        one, two, total, own, word, ranks, alone, batches = found
        assert torch.equal(one, torch.full((2, 3), 6.0))
        assert torch.equal(two, torch.tensor([60.0]))
        assert total == 1.5
        assert torch.equal(own, torch.zeros(3, dtype=torch.int64))
        assert (word, ranks, alone, batches) == ("of 0", [0, 1, 2], (1, [rank]), ["a", "b"])


def test_a_process_that_is_killed_is_noticed_by_the_others_at_once() -> None:
    def work():
        if distributed.rank():
            os.kill(os.getpid(), signal.SIGKILL)
        begin = time.monotonic()
        with pytest.raises(distributed.LostPeer, match="has ended"):
            distributed.barrier()
        return time.monotonic() - begin

    seconds, code = in_processes(2, work)
    assert code in (-signal.SIGKILL, 1)
    assert seconds < 5


def test_the_main_process_saves_pieces_and_all_load_them(tmp_path: Path) -> None:
    def work():
        workspace = Workspace(tmp_path / "x.safetensors", "key")
        workspace.save("piece", {"value": torch.tensor([float(distributed.rank())])})
        missing = workspace.load("other")
        piece = workspace.load("piece")
        assert piece is not None
        return workspace.keys(), piece["value"].item(), missing

    assert in_processes(2, work) == [(["piece"], 0.0, None)] * 2
    alone = Workspace(tmp_path / "x.safetensors", "key")
    assert alone.keys() == ["piece"]


class Ended:
    """A process as torchrun reports it."""

    def __init__(self, code: int, file: str = "<N/A>") -> None:
        self.exitcode, self.error_file, self.pid = code, file, 7

    def signal_name(self) -> str:
        return signal.Signals(-self.exitcode).name


def test_the_error_of_the_process_that_failed_first_is_the_commands(tmp_path: Path, monkeypatch) -> None:
    files = [str(tmp_path / name) for name in ("first", "second")]
    for file, text, code in zip(files, ("no disk", "no memory"), (4, 5), strict=True):
        monkeypatch.setenv(FILE, file)
        record_failure(text, code)
    found = recorded(files[1])
    assert found is not None
    assert (found.text, found.exit_code) == ("no memory", 5)
    cause = _cause({0: Ended(-15), 1: Ended(5, files[1]), 2: Ended(4, files[0])}, 3)
    assert (str(cause), cause.exit_code) == ("no disk", 4)


def test_a_killed_process_is_named() -> None:
    cause = _cause({0: Ended(143), 1: Ended(-9)}, 2)
    assert "Process 1 of 2 (process id 7) was killed by SIGKILL" in str(cause)
    assert cause.exit_code == 4
    assert "ended with code 3 and no message" in str(_cause({0: Ended(3)}, 2))
