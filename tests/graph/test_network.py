"""A network runs once, on shapes, and its layers, blocks and roles are read off that one recording."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from families import NETWORKS, build
from torch import Tensor, nn

from dqtool.graph.network import NetworkGraph
from dqtool.graph.origins import follow_origins
from dqtool.graph.recording import record
from dqtool.models.families import family_of

Glue = Callable[["Chain", Tensor], Tensor]


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x


class Chain(nn.Module):
    """Two layers and a block, joined by `glue`."""

    def __init__(self, glue: Glue) -> None:
        super().__init__()
        self.first, self.second, self.pair, self.glue = nn.Linear(4, 4), nn.Linear(4, 4), Pair(), glue
        self.runs = 0

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor]:
        self.runs += 1
        return (self.glue(self, sample),)


def graph_of(glue: Glue, blocks: tuple[str, ...] = ()) -> NetworkGraph:
    return NetworkGraph(
        Chain(glue), {"sample": torch.randn(1, 4), "timestep": torch.ones(1)}, "sample", "timestep", blocks
    )


def add_in_place(chain: Chain, x: Tensor) -> Tensor:
    y = chain.first(x)
    y += chain.second(x)
    return chain.pair(y)


def write_through_a_view(chain: Chain, x: Tensor) -> Tensor:
    y = chain.first(x)
    y[:, :2].add_(chain.second(x)[:, :2])
    return chain.pair(y)


def use_shapes_alone(chain: Chain, x: Tensor) -> Tensor:
    return chain.pair(chain.first(torch.zeros_like(x)) + chain.second(x.new_ones(1, 4)))


def test_the_network_runs_once_for_all_that_is_read_off() -> None:
    graph = graph_of(add_in_place)
    assert graph.trace is graph.trace
    assert graph.roles is graph.roles
    assert graph.recording.network.runs == 1
    assert graph.network.runs == 0


@pytest.mark.parametrize("glue", [add_in_place, write_through_a_view])
def test_a_tensor_that_is_changed_in_place_comes_from_all_that_was_written_into_it(glue: Glue) -> None:
    trace = graph_of(glue, ("Pair",)).trace
    assert [block.name for block in trace.blocks] == ["first", "second", "pair"]
    assert trace.blocks[2].reads == {"first", "second"}
    assert trace.output_reads == {"pair"}


def test_a_tensor_of_the_same_shape_does_not_come_from_the_sample() -> None:
    roles = {info.name: info.role for info in graph_of(use_shapes_alone).trace.layers}
    assert roles == {"first": "output", "second": "output", "pair.inner": "output"}


def test_origins_are_the_nearest_or_all_on_the_way() -> None:
    recording = graph_of(lambda chain, x: chain.second(chain.first(x))).recording
    (call,) = recording.calls["second"]
    starts = {"/sample": recording.inputs["sample"]}
    assert follow_origins(recording, starts, lambda op: op.layer, nearest=True)[call] == {"first"}
    assert follow_origins(recording, starts, lambda op: op.layer, nearest=False)[call] == {"/sample", "first"}


def test_multiply_accumulates_of_repeated_calls_add_up() -> None:
    once = graph_of(lambda chain, x: chain.first(x)).trace.layers
    twice = graph_of(lambda chain, x: chain.first(chain.first(x))).trace.layers
    assert [info.name for info in twice] == ["first"]
    assert twice[0].macs == 2 * once[0].macs


@pytest.mark.parametrize("name", NETWORKS)
def test_recording_needs_no_weights(name: str) -> None:
    real = build(name)
    family = family_of(type(real).__name__, name)
    with torch.device("meta"):
        ghost = family.build(real.config)
    graphs = [family.graph(network, real.config) for network in (real, ghost)]
    assert graphs[0].trace == graphs[1].trace
    assert graphs[0].roles == graphs[1].roles
    assert [op.name for op in record(real, graphs[0].inputs).ops if op.module is None] == [
        op.name for op in graphs[1].recording.ops if op.module is None
    ]
