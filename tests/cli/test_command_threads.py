"""Threads of the command line that wait for each other leave the processor to those that work."""

from __future__ import annotations

import pytest

from dqtool import __main__


@pytest.mark.parametrize(
    ("given", "spins"), [({}, __main__._SPIN), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_waiting_threads_sleep_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], spins: str | None
) -> None:
    import os

    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # restored afterwards, whatever is set between
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    __main__._share_processors()
    assert os.environ.get("GOMP_SPINCOUNT") == spins
