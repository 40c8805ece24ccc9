"""Statistics of calibration: counts that are the same in each form, and attention operands seen sample by sample."""

from __future__ import annotations

import pytest
import torch

from dqtool.graph.trace import LayerInfo
from dqtool.nn import statistics
from dqtool.nn.statistics import BINS, _ObservingProcessor, _Recorder, occurrences


@pytest.mark.parametrize("on_cpu", [True, False])
def test_occurrences(on_cpu: bool) -> None:
    values = torch.tensor([3, 0, 3, 5, 3], dtype=torch.int32)
    assert occurrences(values, 7, on_cpu).tolist() == [1, 0, 0, 3, 0, 1, 0]
    empty = torch.zeros(0, dtype=torch.int32)
    assert occurrences(empty, 2, on_cpu).tolist() == [0, 0]


def test_operands_of_attention_are_counted_by_head() -> None:
    x = torch.randn(3, 2, 5, 4)  # samples, heads, positions, channels
    recorder = _Recorder()
    observer = _ObservingProcessor("attn", recorder, "single")
    observer.quantize(torch.nn.Identity(), "q", x)
    recorder.counting = True
    assert observer.quantize(torch.nn.Identity(), "q", x) is x
    by_head = x.transpose(0, 1).flatten(1)
    assert torch.equal(recorder.ranges["attn.q"], torch.stack(torch.aminmax(by_head, dim=1), 1))
    counts = recorder.counts["attn.q"]
    assert counts.shape == (2, BINS)
    assert counts.sum(1).tolist() == [60, 60]
    for head in range(2):
        expected = torch.histc(by_head[head].double(), BINS, *recorder.ranges["attn.q"][head].tolist())
        assert (counts[head] - expected).abs().sum() <= 4  # values at the edges of bins


@pytest.mark.parametrize(("device", "launches"), [("cpu", 4), ("meta", 1)])
def test_an_accelerator_counts_more_values_at_a_time(
    device: str, launches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def counted(values: torch.Tensor, size: int) -> torch.Tensor:
        asked.append(len(values))
        return torch.zeros(size, dtype=torch.int64, device=values.device)

    monkeypatch.setattr(statistics, "occurrences", counted)
    recorder, rows = _Recorder(), torch.ones(2, 2 * statistics.PIECE, device=device)
    for recorder.counting in (False, True):
        recorder.see("layer", rows)
    assert asked == [4 * statistics.PIECE // launches] * launches


def test_divisors_move_to_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[torch.device] = []

    def moved(x: torch.Tensor, device: torch.device) -> torch.Tensor:
        moves.append(device)
        return torch.full(x.shape, 2.0)

    monkeypatch.setattr(statistics, "to_device", moved)
    network = torch.nn.Sequential(torch.nn.Linear(3, 3))
    info = LayerInfo("0", "linear", (3, 3), 9)
    x = torch.tensor([[1.0, 2.0, 4.0]])
    elsewhere = {"0": torch.empty(3, device="meta")}
    found = statistics.collect(network, [info], elsewhere, [lambda: network(x)] * 3)
    assert found["0.range"].tolist() == [[0.5, 2.0]] * 3
    assert moves == [x.device]
