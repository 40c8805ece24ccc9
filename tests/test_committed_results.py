"""README and the index of results say what the committed result files say."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

import index_results

from dqtool.artifacts.outputs import check_results


def test_readme_and_index_are_made_from_the_results() -> None:
    assert index_results.problems() == []


def test_readme_stays_a_front_page() -> None:
    text = index_results.README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    assert len(text.encode()) <= 12_000


def test_every_result_may_be_made_again() -> None:
    by_tests = {"classes", "fuzz", "mixins", "soak", "soak-large"}  # their drivers replace any file
    for path in sorted(index_results.RESULTS.glob("*.json")):
        if path.stem not in by_tests:
            check_results(path, [each for each in (path.with_suffix(".md"),) if each.exists()])


def test_a_number_without_a_result_is_found() -> None:
    assert index_results.unsupported("at 4/4 it has 47.3 dB and is 2.5x faster, see 1.2.3", "47.1") == ["2.5", "47.3"]
    assert index_results.unsupported("`9.9` in code, [a link](v9.9), 33.1 dB", "33.1") == []


def test_a_result_that_its_command_does_not_make_is_found() -> None:
    table, report = index_results.RESULTS / "bits.json", index_results.RESULTS / "digits-dit-ptq-w4a4.json"
    assert index_results.wrong_command(table, "make bits") is None
    assert "bits.yaml" in str(index_results.wrong_command(table, "make ablation"))
    assert "no target" in str(index_results.wrong_command(table, "make bitz"))
    assert index_results.wrong_command(report, "make digits-dit-w4a4-ptq") is None
    assert "does not write it" in str(index_results.wrong_command(report, "make digits-dit-w6a6"))
    assert "there is no" in str(index_results.wrong_command(report, "python recipes/nothing.py"))


def test_the_index_says_which_noise_a_result_was_made_with() -> None:
    old = {"metrics": {"reference": {"fd.digits": 1.862}}}
    new = {"metrics": {"reference": {"fd.digits": 2.58}}}
    assert [index_results.noise_of("digits-ddpm-w4a4", each) for each in (old, new)] == ["0.1", "0.2"]
    rows = {"format": "dqtool-table/1", "rows": [{"name": "PTQ", "made_by": [{"seed": 0}]}]}
    assert index_results.noise_of("ablation", rows) == "0.2"
    assert index_results.noise_of("ablation", rows | {"rows": [{"name": "PTQ"}]}) == "0.1"
