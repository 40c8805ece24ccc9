"""Imports point one way, and no module waits for itself: every import statement of the package is read, wherever it
stands (at the top of a module, in a function, under `TYPE_CHECKING`)."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import dqtool

ROOT = Path(dqtool.__file__).parent

LAYERS = (
    {"cli", "tables", "zoo", "__main__"},
    {"stages"},
    {"precision", "training", "scaling", "runtimes", "formats", "metrics", "models", "page", "bench"},
    {"nn"},
    {"graph"},
    {"core"},
    {"artifacts", "distributed", "report", "errors", "stopping"},
)
"""Layers from the top down. A package may import its own layer and those below it; the last layer serves all the others."""

SERVICES = {"recipe", "yamltree", "_hook", ""}
"""Modules outside of the layers: the recipe reader and the root, which imports on use."""


def modules_of(root: Path, package: str) -> dict[str, Path]:
    """Every module below `root` by its dotted name."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = [package, *path.relative_to(root).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported_names(path: Path, module: str) -> Iterator[str]:
    """Dotted names that a file imports, relative ones resolved."""
    home = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = home.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *([base] if base else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def import_graph(modules: Mapping[str, Path]) -> dict[str, set[str]]:
    """Each module's imports among `modules`; importing a name from a module imports that module."""
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        graph[module] = set()
        for name in imported_names(path, module):
            while name and name not in modules:
                name = name.rpartition(".")[0]
            if name and name != module:
                graph[module].add(name)
    return graph


def find_circle(graph: Mapping[str, set[str]]) -> list[str] | None:
    """One circle of imports, its first module repeated at its end; None where there is none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str] | None:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return None
        for other in sorted(graph[module]):
            circle = visit(other, [*path, module])
            if circle:
                return circle
        done.add(module)
        return None

    for module in sorted(graph):
        circle = visit(module, [])
        if circle:
            return circle
    return None


def upward_imports(graph: Mapping[str, set[str]]) -> list[str]:
    """`importer -> imported` for every import of a higher layer."""
    level = {package: index for index, layer in enumerate(LAYERS) for package in layer}

    def package_of(module: str) -> str:
        return module.partition(".")[2].partition(".")[0]

    return [
        f"{module} -> {other}"
        for module, others in sorted(graph.items())
        for other in sorted(others)
        if package_of(module) in level
        and package_of(other) in level
        and level[package_of(module)] > level[package_of(other)]
    ]


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    return import_graph(modules_of(ROOT, "dqtool"))


def test_no_module_imports_itself_by_way_of_others(graph) -> None:
    circle = find_circle(graph)
    assert circle is None, " -> ".join(circle)


def test_imports_follow_the_layers(graph) -> None:
    assert upward_imports(graph) == []


def test_every_package_has_a_layer(graph) -> None:
    known = SERVICES.union(*LAYERS)
    assert {module.partition(".")[2].partition(".")[0] for module in graph} <= known


@pytest.mark.parametrize(
    ("low", "high", "circle"),
    [
        ("", "from toy.nn.low import thing", False),
        ("from toy.nn.high import other", "from toy.nn.low import thing", True),
        ("import toy.nn.high", "from . import low", True),
        ("if TYPE_CHECKING:\n    from toy.nn.high import other", "from .low import thing", True),
        ("def f():\n    from toy.nn import high", "import toy.nn.low as low", True),
    ],
)
def test_a_circle_is_found_wherever_its_imports_stand(tmp_path: Path, low: str, high: str, circle: bool) -> None:
    (tmp_path / "nn").mkdir()
    for name, text in (("low", low), ("high", high)):
        (tmp_path / "nn" / f"{name}.py").write_text(text)
    found = find_circle(import_graph(modules_of(tmp_path, "toy")))
    assert (found is not None) is circle
    if found:
        assert set(found) == {"toy.nn.low", "toy.nn.high"}


def test_an_import_of_a_higher_layer_is_found(tmp_path: Path) -> None:
    for package, text in (("core", "def f():\n    from toy.nn.layers import x"), ("nn", "import toy.core.layers")):
        (tmp_path / package).mkdir()
        (tmp_path / package / "layers.py").write_text(text)
    assert upward_imports(import_graph(modules_of(tmp_path, "toy"))) == ["toy.core.layers -> toy.nn.layers"]
