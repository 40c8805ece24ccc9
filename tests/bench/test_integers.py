"""The comparison of `recipes/same_integers.py` on the embedded model, with all layers, fewer steps and made-up tables.

The openvino runtime has the same test in tests/runtimes/test_openvino.py.
"""

from __future__ import annotations

import pytest
from synthetic import synthetic_network

from dqtool.bench.integers import count_cpu
from dqtool.runtimes.cpu import library
from dqtool.runtimes.cpu.native_product import NativeProduct


@pytest.mark.parametrize("bits", ["4/4", "6/6", "8/8"])
def test_accumulators_of_digits_ddpm_equal_the_reference(bits: str) -> None:
    found = list(count_cpu(synthetic_network("zoo:digits-ddpm", bits, 3)))
    assert len(found) == 66 + 11 or not library.has_products()
    assert all(compared > 0 and different == 0 for _, compared, different in found)


def test_a_difference_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    if not library.has_products():
        pytest.skip("the processor lacks AVX2")
    original = NativeProduct._multiply
    monkeypatch.setattr(
        NativeProduct, "_multiply", lambda self, *given, **keywords: original(self, *given, **keywords) + 1
    )
    name, compared, different = next(iter(count_cpu(synthetic_network("zoo:digits-ddpm", "4/4", 1))))
    assert isinstance(name, str)
    assert different == compared > 0
