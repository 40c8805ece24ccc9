"""The step lookup: the right row, what counts as calibrated, and one warning a run."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn

from dqtool.errors import DqtoolWarning, NumericError
from dqtool.nn import steps
from dqtool.nn.steps import StepIndex, calibrated_points, look_up, nearest_rows, step_run
from dqtool.nn.surgery import _attach_steps

TABLE = torch.tensor([900.0, 500.0, 100.0])
EVERY = torch.arange(999.0, -1.0, -1.0)


def asked(index: StepIndex, *timesteps: Tensor | float) -> list[str]:
    """The warnings of a run that asks for these timesteps."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with step_run():
            for timestep in timesteps:
                index.set(timestep)
    return [str(each.message) for each in caught if issubclass(each.category, DqtoolWarning)]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.float64])
def test_a_timestep_beside_the_table_is_missing_in_every_exact_type(dtype: torch.dtype) -> None:
    rows, missed = look_up(torch.tensor([901, 500, 96]).to(dtype), TABLE)
    assert rows.tolist() == [0, 1, 2]
    assert missed.tolist() == [True, False, True]


@pytest.mark.parametrize("number", [499, 499.5, 500.01])
def test_numbers_of_python_too(number: float) -> None:
    index = StepIndex(TABLE)
    with pytest.warns(DqtoolWarning, match=f"timestep {number:g} is not among the 3 calibrated"):
        index.set(number)
    assert index.missed == {number}


def test_float64_schedules_find_their_float32_rows() -> None:
    double = torch.tensor([1095.5141, -1553.6512, 3.3e-7], dtype=torch.float64)
    rows, missed = look_up(double, double.to(torch.float32))
    assert rows.tolist() == [0, 1, 2] and not missed.any()
    assert look_up(double * (1 + 1e-5), double.to(torch.float32))[1].tolist() == [True, True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_find_the_row_that_rounds_to_them(dtype: torch.dtype) -> None:
    table = torch.linspace(999, 0, 50).round()
    rows, missed = look_up(table.to(dtype), table)
    assert rows.tolist() == list(range(50)) and not missed.any()
    units = table / 1000  # Flux' pipeline rounds before it divides
    rows, missed = look_up(table.to(dtype) / 1000, units)
    assert rows.tolist() == list(range(50)) and not missed.any()


def test_bfloat16_takes_no_neighbour_in_silence() -> None:
    rows, missed = look_up(torch.tensor([997.0, 100.0]).to(torch.bfloat16), EVERY)  # 997 became 996
    assert missed.tolist() == [True, False]
    assert rows[1] == 899
    assert look_up(torch.tensor([970.0], dtype=torch.bfloat16), TABLE)[1].tolist() == [True]


def test_a_table_of_one_row_warns() -> None:
    index = StepIndex(torch.tensor([999.0]))
    (text,) = asked(index, 999, 500, 0)
    assert "2 of the 3 timesteps of this run are not among the 1 calibrated" in text
    assert index.missed == {500.0, 0.0}
    assert not asked(StepIndex(torch.tensor([999.0]), static=True), 999, 500, 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused(value: float) -> None:
    index = StepIndex(TABLE)
    with pytest.raises(NumericError, match="timestep is not a finite number"):
        index.set(torch.tensor([500.0, value]))
    assert look_up(torch.tensor([float("nan")]), TABLE)[1].tolist() == [True]


def test_one_warning_a_run_for_all_networks() -> None:
    first, second = StepIndex(TABLE), StepIndex(TABLE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            with step_run(), step_run():
                for timestep in (900, 700, 480, 100):
                    first.set(timestep)
                    second.set(torch.tensor([timestep, timestep]))
    texts = [str(each.message) for each in caught]
    assert len(texts) == 2
    assert (
        "2 of the 4 timesteps of this run" in texts[0]
        and "700, 480" in texts[0]
        and "0.5 calibrated steps away" in texts[0]
    )


def test_without_a_run_the_first_one_warns() -> None:
    index = StepIndex(TABLE)
    with pytest.warns(DqtoolWarning, match="timestep 480"):
        index.set(480)
    assert index.rows.tolist() == [1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        index.set(470)
        index.set(torch.tensor([900, 100]))
    assert index.rows.tolist() == [0, 2]
    assert index.missed == {480.0, 470.0}


def test_a_batch_of_one_step_has_one_row() -> None:
    index = StepIndex(TABLE)
    index.set(torch.tensor([100, 100, 100]))
    assert index.rows.tolist() == [2]
    index.set(torch.tensor(500).expand(4))
    assert index.rows.tolist() == [1]


def test_rows_move_to_a_device_once_and_anew_when_they_change() -> None:
    index = StepIndex(TABLE)
    here, there = torch.zeros(1), torch.zeros(1, device="meta")
    index.select(torch.tensor([1]))
    moved = index.rows_for(there)
    assert moved.device.type == "meta"
    assert index.rows_for(there) is moved
    assert index.rows_for(here).tolist() == index.rows.tolist() == [1]
    index.select(torch.tensor([0]))
    assert index.rows_for(here).tolist() == [0]


def test_rows_stay_on_the_device_of_the_timestep() -> None:
    index = StepIndex(TABLE)
    with step_run() as run:
        index.set(torch.zeros(3, device="meta"))  # reading a value of this device fails
        run.indices.clear()
        index._pending.clear()
    assert index.rows.device.type == "meta" and index.rows.shape == (3,)


def test_lookups_that_wait_are_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each copy from a GPU waits for it."""
    index = StepIndex(TABLE)
    index._pending = [
        (torch.tensor([900, 480]), torch.tensor([False, True])),
        (torch.tensor([101.5], dtype=torch.float16), torch.tensor([True])),
    ]
    copies = []
    own = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda x: (copies.append(x.shape), own(x))[1])
    with step_run() as run:
        index.read_pending(run)
        assert index.missed == {480.0, 101.5}
        assert run.asked == {900.0, 480.0, 101.5}
        assert sorted(run.missed) == [101.5, 480.0]
        run.missed.clear()
    assert copies == [(2, 3)]


def test_calibrated_points_are_not_noted() -> None:
    index = StepIndex(TABLE)
    with step_run(), calibrated_points():
        index.set(torch.tensor([480.0, 100.0]))
    assert index.rows.tolist() == [1, 2]
    assert not index._pending
    assert not index.missed
    with pytest.warns(DqtoolWarning, match="timestep 480"):
        index.set(480)


def test_copies_have_their_own_state() -> None:
    index = StepIndex(TABLE)
    for twin in (copy.deepcopy(index), pickle.loads(pickle.dumps(index))):
        with pytest.warns(DqtoolWarning):
            twin.set(480)
        assert not index.missed and twin._key != index._key


def test_graphs_take_the_same_rows() -> None:
    timesteps = torch.tensor([880.0, 300.1, 299.9, 0.0])
    assert torch.equal(nearest_rows(timesteps, TABLE), look_up(timesteps, TABLE)[0])


class _Stepped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps = StepIndex(TABLE)
        self.table = nn.Buffer(torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        self.steps.set(timestep)
        return x * self.table[self.steps.rows_for(x)]


def test_compiled_graphs_look_up_and_warn() -> None:
    torch._dynamo.reset()
    network = torch.compile(_Stepped(), backend="eager", fullgraph=True)
    x = torch.ones(1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with step_run():
            found = [float(network(x, torch.tensor(float(t)))) for t in (900, 500, 100, 480)]
    assert found == [1.0, 2.0, 3.0, 2.0]
    assert ["1 of the 4 timesteps" in str(each.message) for each in caught] == [True]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_graphs_read_the_table_of_the_network(device: str) -> None:
    """A table in main memory would be copied to a GPU, which the host waits for, in each call. Shapes stand for a GPU here."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            return x * self.factor * self._dqtool_steps.rows_for(x)

    network = Network().to(device)
    _attach_steps(network, TABLE.to(device))
    torch._dynamo.reset()
    compiled = torch.compile(network, backend=backend)
    result = compiled(torch.ones(2, device=device), torch.tensor([500.0, 100.0], device=device))
    assert result.shape == (2,)
    if device == "cpu":
        assert result.tolist() == [1.0, 2.0]
    nodes = [node for graph in graphs for node in graph.graph.nodes]
    assert [node for node in nodes if node.target is torch.ops.dqtool.step_rows]
    given = [node.meta["example_value"] for node in nodes if node.op == "placeholder"]
    assert {each.device.type for each in given} == {device}
    assert not [node for node in nodes if node.target in ("to", torch.Tensor.to)]


def test_graphs_take_their_own_table_where_the_buffer_does_not_serve() -> None:
    """Offloading leaves the buffer without numbers before the call, and a cast to a half type rounds it."""
    torch._dynamo.reset()
    index = StepIndex(torch.tensor([997.0, 996.0]))
    found = []
    for table in (torch.zeros(2, device="meta"), torch.tensor([996.0, 996.0], dtype=torch.bfloat16)):
        look = torch.compile(
            lambda t, table=table: (index.set(t, table), index.rows)[1] + 0, backend="eager", fullgraph=True
        )
        found.append(look(torch.tensor([996.0, 997.0])).tolist())
    assert found == [[1, 0], [1, 0]]


@pytest.mark.parametrize("capturing", [False, True])
def test_lookups_inside_of_graphs_keep_no_memory(capturing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph owns what its operations make. Shapes stand for an accelerator here."""
    index = steps.StepIndex(torch.arange(5) * 10.0)
    timestep = torch.empty(1, device="meta")
    if capturing:
        monkeypatch.setattr(steps, "_capturing", lambda: True)
        assert index.find(timestep).shape == (1,)
    else:
        found = steps._step_rows._init_fn(timestep, index.timesteps.to("meta"), index._key)
        assert found.shape == (1,)
    assert not index._pending
