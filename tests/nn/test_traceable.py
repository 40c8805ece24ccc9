"""The traceable network computes what the packed one does, with the step tables inside."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from helpers import tiny_pipeline
from synthetic import synthetic_network
from torch import nn

from dqtool.models.families import FAMILIES
from dqtool.nn.traceable import TraceableGroupNorm, TraceableLayer, TraceableNetwork, flat_arguments, nested_arguments
from dqtool.nn.traceable_codes import ProductForm


class FoldingProduct(ProductForm):
    folds_norms = True


@pytest.mark.parametrize("bits", ["4/4", "8/8", "4/16", "16/6"])
@pytest.mark.parametrize("product", [ProductForm, FoldingProduct])
def test_traceable_equals_packed(bits: str, product: type[ProductForm], tmp_path: Path) -> None:
    packed = synthetic_network(str(tiny_pipeline(tmp_path / "tiny")), bits)
    family = FAMILIES["UNet2DModel"]
    example = family.example(packed.config, batch=2)
    traceable = TraceableNetwork(copy.deepcopy(packed), example, product()).eval()
    assert any(isinstance(m, TraceableLayer) for m in traceable.modules())
    for timestep in (torch.tensor([50.0]), torch.tensor([200.0, 0.0])):
        expected = packed(example["sample"], timestep.expand(2), return_dict=False)[0]
        got = traceable(example["sample"], timestep)[0]
        # Codes on a rounding tie may flip with the last bit of a norm; most outputs are not touched.
        assert (got - expected).norm() < 0.1 * expected.norm()
    traceable.tables.leave()


def test_group_norm_as_a_multiply_add() -> None:
    for norm, shape in ((nn.GroupNorm(4, 12), (2, 12, 5, 6)), (nn.GroupNorm(3, 12, affine=False), (2, 12, 9))):
        if norm.affine:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
        x = torch.randn(shape) * 3 + 1
        assert torch.allclose(TraceableGroupNorm(norm)(x), norm(x), atol=1e-5)
    norm = nn.GroupNorm(1, 4)
    assert bool(torch.isfinite(TraceableGroupNorm(norm)(torch.randn(1, 4, 8, 8) * 0.02 + 100)).all())


def test_arguments_flatten_and_nest() -> None:
    arguments = {"x": torch.ones(1), "more": {"a": torch.ones(2), "b": None}, "flag": True}
    flat = flat_arguments(arguments)
    assert list(flat) == ["x", "more.a"]
    assert nested_arguments(flat)["more"]["a"] is arguments["more"]["a"]
