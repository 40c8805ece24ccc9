"""Block-by-block execution gives the same inputs and outputs as a run of the whole network."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pytest
import torch
from diffusers import UNet2DModel
from helpers import NETWORK
from torch import nn

from dqtool.errors import EnvironmentFault, UsageError
from dqtool.graph.trace import BlockInfo, Trace
from dqtool.models.families import FAMILIES
from dqtool.training.replay import Replay

N = 10


@pytest.fixture(params=[6 << 30, 0], ids=["memory", "spilled"])
def replay(request) -> Replay:
    torch.manual_seed(0)
    family = FAMILIES["UNet2DModel"]
    model = UNet2DModel(**NETWORK).eval()
    traced = family.graph(model, model.config).trace
    x = torch.randn(N, *family.sample_shape(model.config))
    timestep = torch.randint(0, 1000, (N,))
    result = Replay(
        model, traced, N, lambda m, rows: m(x[rows], timestep[rows]), batch_size=4, budget_bytes=request.param
    )
    result.points = x, timestep  # type: ignore[attr-defined]
    return result


def test_replayed_blocks_equal_the_whole_network(replay: Replay) -> None:
    model = replay.model
    direct: dict[str, torch.Tensor] = {}
    handles = [
        model.get_submodule(b.name).register_forward_hook(lambda _m, _a, y, n=b.name: direct.__setitem__(n, y))
        for b in replay.trace.blocks
    ]
    with torch.no_grad():
        model(*replay.points)  # type: ignore[attr-defined]
    for handle in handles:
        handle.remove()
    for index, block in enumerate(replay.trace.blocks):
        given = replay.inputs(index)
        outputs = replay.outputs(index, given)
        torch.testing.assert_close(outputs, direct[block.name], rtol=1e-4, atol=1e-5)
        replay.advance(index, outputs, given)
    assert "forward" not in model.conv_in.__dict__  # the network is restored


def test_no_block_runs_twice_to_feed_another(replay: Replay) -> None:
    calls: dict[str, int] = {}
    for name, module in replay.model.named_modules():
        if isinstance(module, nn.Conv2d):

            def count(
                x: torch.Tensor, *rest: object, name: str = name, run: Callable = module._conv_forward
            ) -> torch.Tensor:
                calls[name] = calls.get(name, 0) + len(x)
                return run(x, *rest)

            module._conv_forward = count  # type: ignore[method-assign]
    for index in range(len(replay.trace.blocks)):
        given = replay.inputs(index)
        replay.advance(index, replay.outputs(index, given), given)
    assert calls
    assert set(calls.values()) == {N}


def test_what_nobody_reads_is_dropped(replay: Replay) -> None:
    for index in range(len(replay.trace.blocks)):
        given = replay.inputs(index)
        replay.advance(index, replay.outputs(index, given), given)
    held = {name for name, tensor in replay._cache.items() if tensor is not None}
    assert held == replay.trace.output_reads


def test_a_full_disk_is_said_before_anything_is_written(replay: Replay, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_file: int, _start: int, _size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    replay._store.budget = 0
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(EnvironmentFault, match=r"No space left.*TMPDIR"):
        replay.inputs(0)


@pytest.mark.parametrize("other", [1.0, 2.0])
def test_a_block_that_runs_again_on_other_inputs_is_refused(other: float) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x) + self.a(other * x))

    x, blocks = torch.randn(N, 3), [BlockInfo("a", set()), BlockInfo("b", {"a"})]
    replay = Replay(Twice(), Trace([], blocks, {"b"}), N, lambda model, rows: model(x[rows]), batch_size=4)
    inputs = replay.inputs(0)
    replay.advance(0, replay.outputs(0, inputs), inputs)
    if other == 1.0:  # a shared embedder runs on the same input every time
        assert torch.equal(replay.inputs(1).leaves[0], 2 * replay.model.a(x).detach())
        return
    with pytest.raises(UsageError, match="Block a can't be trained separately: it runs several times"):
        replay.inputs(1)
