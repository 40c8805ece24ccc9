"""Overridden methods of networks: compiled apart from each other, copied and pickled."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import torch
from torch import nn

from dqtool.nn.call_lock import give, one_call_at_a_time


class Network(nn.Module):
    """A network of a class that PyTorch does not know, as diffusers' are."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer = nn.Linear(channels, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def doubled(network: Any, x: torch.Tensor) -> torch.Tensor:
    return 2 * type(network).forward(network, x)


def test_networks_of_one_process_are_compiled_apart() -> None:
    """Each once, for its own sizes, however many there are."""
    graphs: list[bool] = []

    def backend(graph: Any, inputs: list[Any]) -> Any:
        graphs.append(any(isinstance(each, torch.SymInt) for each in inputs))
        return graph.forward

    count = torch._dynamo.config.recompile_limit + 1
    for number in range(1, count + 1):
        network = one_call_at_a_time(Network(number))
        compiled = torch.compile(network, fullgraph=True, backend=backend)
        for _ in range(2):
            assert compiled(torch.randn(number, number)).shape == (number, 2)
    assert graphs == [False] * count


def test_copies_have_methods_of_their_own() -> None:
    network = one_call_at_a_time(Network(3))
    give(network, "forward", doubled)
    x = torch.randn(1, 3)
    expected = network(x)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert other.forward.network is other
        assert torch.equal(other(x), expected)
        codes = [type(each.forward).__call__.__code__ for each in (network, other)]
        assert codes[0] is not codes[1]
