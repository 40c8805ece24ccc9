"""Statistics of calibration: counts that are the same in each form, and attention operands seen sample by sample."""

from __future__ import annotations

import pytest
import torch

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
