"""What `dilate` finds out from the file alone is what it would find out from the network."""

from __future__ import annotations

import threading
from pathlib import Path

import torch

from dqtool.core.dilation import channel_slack
from dqtool.models.sources import resolve_model
from dqtool.stages.ahead import channel_slacks, file_tensors, importing


def test_slacks_of_everything_that_may_be_a_weight() -> None:
    torch.manual_seed(0)
    tensors = {
        "conv.weight": torch.randn(6, 4, 3, 3),
        "half.weight": torch.randn(5, 7).half(),
        "bias": torch.randn(6),
        "codes": torch.zeros(2, 2, dtype=torch.int64),
        "broken.weight": torch.full((2, 2), torch.nan),
    }
    threads = torch.get_num_threads()
    found = channel_slacks(tensors)
    assert sorted(found) == ["conv.weight", "half.weight"]
    assert all(torch.equal(slack, channel_slack(tensors[name])) for name, slack in found.items())
    assert torch.get_num_threads() == threads


def test_tensors_of_a_file_that_loading_leaves_alone(made: Path) -> None:
    from dqtool.models.loading import load_weights

    source = resolve_model(str(made / "tiny"))
    found, loaded = file_tensors(source), load_weights(source)
    assert found.keys() == loaded.keys()
    assert all(torch.equal(found[name].float(), loaded[name]) for name in found)


def test_imports_end_with_the_block() -> None:
    running = threading.active_count()
    for name in ("UNet2DModel", "NoSuchClass"):
        with importing(name):
            pass
        assert threading.active_count() == running
