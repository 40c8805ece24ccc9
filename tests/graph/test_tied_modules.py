"""Modules that a class builds repeatedly and a model has once."""

from __future__ import annotations

import torch
from families import build

from dqtool.graph.tied_modules import drop_copies, restore_copies, tie_modules
from dqtool.models.architectures import architecture
from dqtool.models.families import FAMILIES

FAMILY = FAMILIES["DiTTransformer2DModel"]
COPY, ORIGINAL = "transformer_blocks.1.norm1.emb", "transformer_blocks.0.norm1.emb"
PAIRS = [(COPY, ORIGINAL)]


def test_copies_that_differ_are_kept() -> None:
    state = build("dit").state_dict()
    assert drop_copies(state, PAIRS).keys() == state.keys()


def test_equal_copies_are_dropped_shared_and_restored() -> None:
    network = build("dit")
    network.get_submodule(COPY).load_state_dict(network.get_submodule(ORIGINAL).state_dict())
    state = network.state_dict()
    once = drop_copies(state, PAIRS)
    assert state.keys() - once.keys() == {name for name in state if name.startswith(COPY)}
    tied = tie_modules(build("dit", seed=1), once, PAIRS)
    assert tied.get_submodule(COPY) is tied.get_submodule(ORIGINAL)
    assert tied.state_dict().keys() == once.keys()
    tied.load_state_dict(once)
    example = FAMILY.example({"sample_size": 8, "in_channels": 4, "num_embeds_ada_norm": 10}, batch=2)
    with torch.no_grad():
        assert torch.equal(tied(**example).sample, network(**example).sample)
    full = restore_copies(once, PAIRS)
    assert full.keys() == state.keys()
    assert all(torch.equal(full[name], state[name]) for name in state)


def test_dit_xl_has_the_published_number_of_parameters() -> None:
    published = architecture("dit-xl2")
    with torch.device("meta"):
        network = FAMILY.build(published.config)
    names = [n for n in network.state_dict() if ".norm1.emb." not in n or n.startswith("transformer_blocks.0.")]
    tied = tie_modules(network, names, FAMILY.tied_modules(published.config))
    count = sum(t.numel() for t in tied.state_dict().values())
    assert abs(count / published.parameters - 1) < 0.01


def test_the_class_of_the_stock_pipeline_for_none_is_the_last_row() -> None:
    """`DiTPipeline` asks for class 1000 when it means none; a network of ten takes that for its own."""
    network = build("dit")
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([5, 5])
    with torch.no_grad():
        theirs = network(x, t, torch.tensor([3, 1000])).sample
        ours = network(x, t, torch.tensor([3, 10])).sample
    assert torch.equal(theirs, ours)
