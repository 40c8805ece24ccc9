"""The tests that the page of promises names exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_promise_names_a_test_that_exists() -> None:
    rows = (ROOT / "dqtool" / "artifacts" / "README.md").read_text(encoding="utf-8").splitlines()
    named = [re.search(r"`(tests/[\w/]+\.py)::(test_\w+)`", row) for row in rows if row.startswith("| ")][2:]
    assert len(named) > 30
    for found in named:
        assert found is not None
        assert f"def {found[2]}(" in (ROOT / found[1]).read_text(encoding="utf-8"), found[0]
