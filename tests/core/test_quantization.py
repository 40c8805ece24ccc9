"""`QuantizationSpec`: parsing, errors, the bits of every kind of layer, and its form in manifests."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dqtool.artifacts.records import LayerRecord
from dqtool.core.bits import AttentionBits, LayerBits, bits_from_json, parse_bits
from dqtool.core.cost import bops, float_bops
from dqtool.core.quantization import KeptLayers, QuantizationSpec
from dqtool.errors import UsageError


@pytest.mark.parametrize(("text", "expected"), [("4/4", (4, 4)), (" 8/6 ", (8, 6)), ("4/16", (4, 16)), ("2/8", (2, 8))])
def test_bits_are_parsed(text: str, expected: tuple[int, int]) -> None:
    assert parse_bits(text) == LayerBits(*expected)


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        ({"bits": "4"}, "--bits"),
        ({"bits": "9/4"}, "--bits"),
        ({"bits": "4/4", "keep": ("conv_in",)}, "--keep"),
        ({"bits": "4/4", "keep": ("=8/8",)}, "--keep"),
        ({"bits": "4/4", "keep": ("conv(=8/8",)}, "--keep"),
        ({"bits": "4/4", "keep": ("conv=8",)}, "--keep"),
        ({"bits": "4/4", "softmax_bits": 9}, "--softmax-bits"),
        ({"bits": "4/4", "preset": "odd"}, "--preset"),
    ],
)
def test_a_specification_that_is_not_offered_is_refused(arguments: dict, where: str) -> None:
    with pytest.raises(UsageError) as caught:
        QuantizationSpec.parse(**arguments)
    assert caught.value.where == where


def test_each_kind_of_layer_has_the_bits_of_its_own_type() -> None:
    spec = QuantizationSpec.parse("4/6", softmax_bits=5)
    assert spec.layer_bits("mid", "linear", is_end=False) == LayerBits(4, 6)
    assert spec.layer_bits("conv_in", "conv2d", is_end=True) == LayerBits(8, 8)
    assert spec.layer_bits("attn", "attention", is_end=False) == AttentionBits(qkv=6, softmax=5)


def test_float_inputs_leave_both_attention_products_in_float() -> None:
    assert QuantizationSpec.parse("4/16").layer_bits("attn", "attention", is_end=False) == AttentionBits(16, 16)


def test_the_last_pattern_wins_over_the_preset_and_earlier_ones() -> None:
    spec = QuantizationSpec.parse("4/4", ["mid.*=8/8", "mid.attn=6/6"]).leaving_float(["mid.attn", "up"])
    assert spec.layer_bits("mid.conv", "conv2d", is_end=False) == LayerBits(8, 8)
    assert spec.layer_bits("mid.attn", "attention", is_end=False) == AttentionBits(qkv=6, softmax=8)
    assert spec.layer_bits("up", "conv2d", is_end=False) == LayerBits(16, 16)


def test_a_pattern_that_matches_no_layer_is_refused() -> None:
    spec = QuantizationSpec(LayerBits(4, 4), kept=(KeptLayers("nothing", LayerBits(8, 8)),))
    with pytest.raises(UsageError, match="'nothing' matches no layer"):
        spec.check_names(["conv_in"])


def test_manifests_keep_their_form() -> None:
    spec = QuantizationSpec.parse("4/4", ["conv_in=8/8"]).leaving_float(["up.0"])
    assert spec.to_json() == {"bits": "4/4", "keep": [r"up\.0=16/16", "conv_in=8/8"], "softmax_bits": 8}


@pytest.mark.parametrize("bits", [LayerBits(4, 6), AttentionBits(qkv=6, softmax=8)])
def test_bits_round_trip_through_json(bits: LayerBits | AttentionBits) -> None:
    kind = "attention" if isinstance(bits, AttentionBits) else "linear"
    assert bits_from_json(kind, bits.to_json()) == bits


def test_bit_operations_of_the_two_attention_products() -> None:
    bits = AttentionBits(qkv=4, softmax=8)
    assert [bits.of(operand) for operand in ("q", "k", "v", "probs")] == [4, 4, 4, 8]
    assert bits.operations(10) == 5 * 4 * 4 + 5 * 8 * 4
    layer = LayerRecord("a", "attention", (1, 1), 10, bits=bits.widths)
    assert bops([layer]) == bits.operations(10)
    assert bops([replace(layer, bits=None)]) == float_bops([layer]) == 10 * 32 * 32
