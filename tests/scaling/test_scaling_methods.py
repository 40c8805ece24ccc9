import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dqtool.core.bits import LayerBits
from dqtool.core.dilation import weight_dilation, weight_ranges
from dqtool.errors import NumericError, UsageError
from dqtool.scaling.methods import METHODS, Samples, ScalingInput, ScalingMethod, ScalingResult, scaling_method

CASES = {"linear": ((24, 200), 1), "conv": ((8, 12, 3, 3), 1), "grouped": ((8, 4, 3, 3), 4)}


def case(name: str) -> tuple[Tensor, int, Tensor]:
    torch.manual_seed(0)
    shape, groups = CASES[name]
    channels = shape[1] * groups
    spreads = torch.logspace(-2, 2, channels)[torch.randperm(channels)]
    x = torch.randn(6, channels, *[7] * (len(shape) - 2))
    return torch.randn(shape), groups, x * spreads.view(1, -1, *[1] * (len(shape) - 2))


def inputs(weight: Tensor, groups: int, x: Tensor) -> ScalingInput:
    flat = x.transpose(0, 1).flatten(1)
    return ScalingInput([weight], groups, flat.amin(1), flat.amax(1), samples=samples(x, groups))


def samples(x: Tensor, groups: int = 1) -> Samples:
    def product(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w) if w.ndim == 2 else F.conv2d(x, w, groups=groups)

    return Samples([x], [product], LayerBits(4, 4), -1 if x.ndim == 2 else 1)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("layer", CASES)
def test_scaling_is_equivalent(name: str, layer: str) -> None:
    weight, groups, x = case(layer)
    method = scaling_method(name)
    result = method(inputs(weight, groups, x))
    scaled = method.apply(weight, result.scale, groups)
    assert result.shift is None
    assert result.scale.shape == (weight.shape[1] * groups,)
    x_scaled = x / result.scale.view(1, -1, *[1] * (x.ndim - 2))

    def run(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w) if w.ndim == 2 else F.conv2d(x, w, groups=groups)

    reference = run(x, weight)
    torch.testing.assert_close(run(x_scaled, scaled), reference, rtol=1e-5, atol=1e-5 * reference.abs().max().item())
    if method.keeps_range:
        assert all(torch.equal(a, b) for a, b in zip(weight_ranges(weight), weight_ranges(scaled), strict=True))


def test_wd_is_weight_dilation_with_its_cap() -> None:
    weight, groups, _ = case("grouped")
    assert torch.equal(scaling_method("wd")(ScalingInput([weight], groups)).scale, weight_dilation(weight, groups))
    sparse = torch.tensor([[1.0, 0.001]])
    assert scaling_method("wd")(ScalingInput([sparse], cap=16)).scale.tolist() == [1, 16]


def test_formulas_by_hand() -> None:
    weight = torch.tensor([[1.0, -4.0, 0.0, 1.0], [0.5, 2.0, 0.0, 1.0]])
    low, high = torch.tensor([-9.0, -1.0, -5.0, 0.0]), torch.tensor([2.0, 16.0, 5.0, 0.0])
    given = ScalingInput([weight], 1, low, high)
    # a = 9, 16, 5, 0 and w = 1, 4, 0, 1; the last two are dead on one side.
    assert METHODS["smoothquant"](given).scale.tolist() == [3, 2, 1, 1]
    assert METHODS["awq"](given).scale.tolist() == [1, 2, 1, 1]
    assert METHODS["none"](given).scale.tolist() == [1, 1, 1, 1]
    # Percentile by linear interpolation: 9 + 7 * (0.995 * 3 - 2).
    torch.testing.assert_close(METHODS["dgq"](given).scale, torch.tensor([1, 16 / 15.895, 1, 1]))


def test_smoothquant_takes_the_largest_of_weights_that_share_an_input() -> None:
    one, two = torch.tensor([[1.0, 4.0]]), torch.tensor([[16.0, 1.0]])
    given = ScalingInput([one, two], 1, torch.tensor([-1.0, -1.0]), torch.ones(2))
    assert METHODS["smoothquant"](given).scale.tolist() == [0.25, 0.5]


def test_awq_scales_one_percent_of_the_channels() -> None:
    weight, groups, x = case("linear")
    scale = METHODS["awq"](inputs(weight, groups, x)).scale
    a = x.abs().amax(0)
    assert set((scale != 1).nonzero().flatten().tolist()) == set(a.topk(2).indices.tolist())


def test_silent_inputs_are_left_alone() -> None:
    given = ScalingInput([torch.randn(3, 4)], 1, torch.zeros(4), torch.zeros(4), samples=samples(torch.zeros(2, 4)))
    for name in METHODS:
        if name != "wd":
            assert METHODS[name](given).scale.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].needs_statistics])
def test_statistics_are_required_and_checked(name: str) -> None:
    weight = torch.randn(3, 4)
    with pytest.raises(UsageError, match=rf"calibrate --scaling {name}"):
        scaling_method(name)(ScalingInput([weight]))
    with pytest.raises(UsageError, match="4 in-channels"):
        scaling_method(name)(ScalingInput([weight], 1, torch.zeros(5), torch.ones(5)))
    with pytest.raises(NumericError, match="finite"):
        scaling_method(name)(
            ScalingInput([weight], 1, torch.zeros(4), torch.full((4,), torch.nan), samples=samples(torch.ones(2, 4)))
        )


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(UsageError, match=r"smoothquand.*wd, none, smoothquant, awq, dgq"):
        scaling_method("smoothquand")


def test_a_method_is_one_function_and_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(given: ScalingInput) -> ScalingResult:
        return ScalingResult(torch.full((given.channels,), 2.0))

    monkeypatch.setitem(METHODS, "twice", ScalingMethod("twice", twice))
    weight = torch.randn(3, 4)
    method = scaling_method("twice")
    assert torch.equal(method.apply(weight, method(ScalingInput([weight])).scale), weight * 2)
