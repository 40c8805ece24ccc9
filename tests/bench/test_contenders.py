"""Names of contenders: each stands for one contender or one runtime."""

from __future__ import annotations

import pytest

from dqtool.bench.contenders import CONTENDERS, contender_of, load_runtime
from dqtool.runtimes import RUNTIMES


@pytest.mark.parametrize("name", RUNTIMES)
def test_the_name_of_a_runtime_is_that_runtime(name: str):
    assert name not in CONTENDERS
    contender = contender_of(name)
    assert contender.load.func is load_runtime
    assert contender.load.keywords == {"runtime": name}
    assert contender.prepare is None
