"""README and the index of results say what the committed result files say."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

import index_results


def test_readme_and_index_are_made_from_the_results() -> None:
    assert index_results.problems() == []


def test_readme_stays_a_front_page() -> None:
    text = index_results.README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    assert len(text.encode()) <= 12_000


def test_a_number_without_a_result_is_found() -> None:
    assert index_results.unsupported("at 4/4 it has 47.3 dB and is 2.5x faster, see 1.2.3", "47.1") == ["2.5", "47.3"]
    assert index_results.unsupported("`9.9` in code, [a link](v9.9), 33.1 dB", "33.1") == []
