"""The list of slow tests names tests that exist."""

from __future__ import annotations

import ast

from conftest import SLOW

NAMES = [line for line in SLOW.read_text().splitlines() if line and not line.startswith("#")]


def test_it_names_tests_that_exist() -> None:
    for name in NAMES:
        file, *path = name.split("[")[0].split("::")
        found: ast.AST = ast.parse((SLOW.parents[1] / file).read_text())
        for part in path:
            inner = [x for x in getattr(found, "body", ()) if isinstance(x, ast.FunctionDef | ast.ClassDef)]
            found = next((x for x in inner if x.name == part), None)  # type: ignore[assignment]
            assert found is not None, name


def test_no_name_stands_twice() -> None:
    assert sorted(set(NAMES)) == NAMES
