"""Scalings that quantize and look: their thresholds and choices are the best of what they try."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dqtool.core.bits import LayerBits
from dqtool.core.dilation import broadcast_scale
from dqtool.errors import UsageError
from dqtool.scaling.methods import METHODS, OutputError, Samples, ScalingInput, ScalingResult, scaling_method

STEPS = 3


def layer(kind: str, bits: str = "4/4", shiftable: bool = False) -> ScalingInput:
    """Inputs whose channels differ in size and lie off zero, at three steps of different scale."""
    torch.manual_seed(0)
    weight = torch.randn(12, 16, *[3, 3] * (kind == "conv"))
    size = torch.logspace(-1, 1, 16)[torch.randperm(16)].view(1, 16, *[1, 1] * (kind == "conv"))
    offset = 3 * torch.randn_like(size)
    steps = [(torch.randn(6, 16, *[5, 5] * (kind == "conv")) + offset) * size * (n + 1) for n in range(STEPS)]

    def product(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w, padding=1) if kind == "conv" else F.linear(x, w)

    flat = torch.cat(steps).transpose(0, 1).flatten(1)
    widths = LayerBits(*map(int, bits.split("/")))
    samples = Samples(steps, [product], widths, 1 if kind == "conv" else -1)
    return ScalingInput([weight], 1, flat.amin(1), flat.amax(1), samples=samples, shiftable=shiftable)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_osplus_has_the_threshold_of_least_error(kind: str) -> None:
    inputs = layer(kind)
    result, error = METHODS["osplus"](inputs), OutputError(inputs)
    reach = inputs.input_absmax()
    ratio = reach / result.scale
    threshold = float(ratio[result.scale > 1].median()) if bool((result.scale > 1).any()) else float(reach.max())
    torch.testing.assert_close(result.scale, (reach / threshold).clamp(min=1), rtol=1e-5, atol=0)
    for other in torch.linspace(1.0, 0.1, 16).tolist():
        assert error(result) <= error(ScalingResult((reach / (reach.max() * other)).clamp(min=1)))
    assert result.shift is None


def test_osplus_centres_what_can_be_moved() -> None:
    inputs = layer("linear", shiftable=True)
    assert inputs.input_min is not None
    assert inputs.input_max is not None
    result = METHODS["osplus"](inputs)
    assert result.shift is not None
    torch.testing.assert_close(result.shift, (inputs.input_min + inputs.input_max) / 2)
    assert OutputError(inputs)(result) < OutputError(inputs)(ScalingResult(torch.ones(16)))


def test_auto_is_at_least_as_good_as_each_of_its_methods() -> None:
    for kind in ("linear", "conv"):
        for bits in ("4/4", "8/8", "4/16"):
            inputs = layer(kind, bits)
            error, chosen = OutputError(inputs), METHODS["auto"](inputs)
            errors = {name: error(METHODS[name](inputs)) for name in ("none", "wd", "smoothquant")}
            assert error(chosen) <= min(errors.values())
            assert chosen.method in errors


def test_auto_centres_where_that_is_better() -> None:
    inputs = layer("linear", shiftable=True)  # its channels are not centred on zero
    error, chosen = OutputError(inputs), METHODS["auto"](inputs)
    assert chosen.shift is not None
    assert torch.equal(chosen.shift, inputs.midpoint())
    assert error(chosen) <= min(error(METHODS[name](inputs)) for name in ("none", "wd", "smoothquant", "omniquant"))
    assert METHODS["auto"](replace(inputs, shiftable=False)).shift is None


def test_the_error_of_a_moved_input_is_of_the_same_output() -> None:
    """A large mean makes the whole output large: what a moved input gets wrong is not divided by what is left of it."""
    inputs = layer("linear", "16/16", shiftable=True)
    assert inputs.samples is not None
    (weight,) = inputs.weights
    lost = LayerBits(16, 4)
    of_input = replace(inputs, samples=replace(inputs.samples, bits=lost))
    shift = inputs.midpoint()
    (operation,) = inputs.samples.operations
    whole = sum(float(operation(x, weight).square().sum()) for x in inputs.samples.steps)
    moved = replace(inputs.samples, steps=[x - shift for x in inputs.samples.steps], bits=lost)
    rest = sum(float(operation(x, weight).square().sum()) for x in moved.steps)
    one = torch.ones(16)
    by_rest = OutputError(replace(inputs, samples=moved))(ScalingResult(one))
    torch.testing.assert_close(OutputError(of_input)(ScalingResult(one, shift)), by_rest * rest / whole)


def test_auto_depends_on_the_layer() -> None:
    torch.manual_seed(0)

    def product(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w)

    flat = torch.randn(64, 8)
    weight = torch.randn(6, 8)
    outlier = flat * torch.tensor([40.0, *[1.0] * 7])
    picks = []
    for x in (flat, outlier):
        samples = Samples([x], [product], LayerBits(4, 4))
        picks.append(METHODS["auto"](ScalingInput([weight], 1, x.amin(0), x.amax(0), samples=samples)))
    assert picks[1].method == "smoothquant"  # WD and none leave the outlier alone
    spread_of = [float(pick.scale[0] / pick.scale[1:].mean()) for pick in picks]
    assert spread_of[1] > 3 * spread_of[0]


def test_the_error_falls_with_bits_and_vanishes_without_quantizers() -> None:
    errors = [OutputError(layer("conv", bits))(ScalingResult(torch.ones(16))) for bits in ("3/3", "4/4", "6/6", "8/8")]
    assert errors == sorted(errors, reverse=True)
    assert OutputError(layer("conv", "16/16"))(ScalingResult(torch.full((16,), 4.0))) < 1e-10


@pytest.mark.parametrize("name", ["osplus", "omniquant"])
def test_a_shift_and_its_bias_are_equivalent(name: str) -> None:
    inputs = layer("linear", shiftable=True)
    result = METHODS[name](inputs)
    assert inputs.samples is not None
    assert result.shift is not None
    (weight,) = inputs.weights
    for x in inputs.samples.steps:
        moved = ((x - result.shift) / result.scale) @ (weight * broadcast_scale(result.scale, weight, 1)).T
        torch.testing.assert_close(moved + weight @ result.shift, x @ weight.T, rtol=1e-4, atol=1e-3)


def test_omniquant_starts_as_smoothquant() -> None:
    inputs = layer("conv")
    assert torch.equal(METHODS["omniquant"](inputs).scale, METHODS["smoothquant"](inputs).scale)
    assert {name for name, method in METHODS.items() if method.learning_rate} == {"omniquant", "auto"}


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].needs_samples])
def test_methods_that_compare_need_inputs(name: str) -> None:
    with pytest.raises(UsageError, match="no inputs"):
        scaling_method(name)(ScalingInput([torch.randn(3, 4)], 1, -torch.ones(4), torch.ones(4)))
