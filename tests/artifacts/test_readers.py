"""Files are read by the bounded readers of `dqtool.artifacts` alone; every other place is listed here with its reason."""

from __future__ import annotations

import ast
from pathlib import Path

import dqtool

ROOT = Path(dqtool.__file__).parent

NAMES = frozenset(
    {"open", "safe_open", "load_file", "memmap", "from_file", "fromfile", "genfromtxt", "loadtxt", "Unpickler"}
)
"""Functions that read a file, under whatever module they are called."""
METHODS = frozenset({"read_text", "read_bytes", "from_pretrained", "from_single_file", "read_model", "ZipFile", "mmap"})
METHODS |= {"read_array"}
CODE = frozenset({"eval", "exec", "compile", "__import__"})
LIBRARIES = {
    **{"json": {"load", "loads"}, "torch": {"load"}, "np": {"load"}, "numpy": {"load"}, "onnx": {"load"}},
    **{"yaml": {"load", "safe_load", "load_all", "full_load", "unsafe_load", "safe_load_all"}, "tarfile": {"open"}},
    **{"pickle": {"load", "loads", "Unpickler"}, "marshal": {"load", "loads"}, "shelve": {"open"}, "jit": {"load"}},
    **{"configparser": {"read"}, "ElementTree": {"parse"}, "tomllib": {"load", "loads"}},
}

_OWN = "reads what the same process wrote"
_PROC = "reads /proc, which the kernel writes"
_WRITES = "opens to write only"
_PACKAGED = "reads files of the package"
_CHECKED = "library call on a directory that `check_model_directory` or `check_library_directory` passed"

ALLOWED = {
    "__main__": "opens the null device",
    "artifacts.files": "maps a file that `check_regular` passed, to hash it; opens to flush",
    "artifacts.hashed_file": _WRITES,
    "artifacts.locking": "opens lock files, whose content is not read",
    "artifacts.manifest": _OWN,
    "artifacts.npz": "reads members of an archive that `check_archive` passed, each with a bound",
    "artifacts.reading": "holds the bounded readers",
    "artifacts.tensorfile": "loads safetensors after `read_header`; maps a file to pack it",
    "artifacts.torch_archive": "reads members of an archive that `check_archive` passed, with its own unpickler",
    "artifacts.torch_files": "unpickles after counting the instructions, tensors only",
    "bench.float_contenders": _OWN,
    "bench.machine": _PROC,
    "bench.openvino_contenders": _OWN,
    "bench.peer_contenders": _OWN,
    "bench.probe": _PROC + "; the parent's request on standard input",
    "cli.workers": "opens the null device",
    "core.allocator": _PROC,
    "core.memory": _PROC,
    "distributed.failures": "reads what a process of the same command wrote",
    "formats.onnx": _OWN,
    "metrics.batches": "reads images and members of archives through `open_regular`, in listed formats, up to a size",
    "metrics.clip": _CHECKED,
    "metrics.classifiers": _PACKAGED,
    "metrics.measuring": "opens extractors by dqtool's own table of names",
    "models.components.companions": _CHECKED,
    "models.networks.recorded_graph": _OWN,
    "models.sources.library_models": _CHECKED,
    "models.sources.original.checkpoint": "unpickles tensors only, after `check_torch_file`",
    "page.quantization_errors": "opens artifacts by `open_artifact`",
    "runtimes.choice": _PROC,
    "runtimes.cpu.build": _PACKAGED,
    "runtimes.cpu.library": _PACKAGED + " and /proc",
    "runtimes.openvino_graphs": "reads a graph that `open_regular` passed, and dqtool's own compiled ones",
    "stages.export": _WRITES,
    "stages.report_page": "opens artifacts by `open_artifact`",
    "tables.cells": "opens lock files, whose content is not read",
    "tables.planning": _OWN,
    "zoo.train_latent": _PACKAGED,
    "training.tensor_store": _OWN,
    "zoo.data": "reads Debian's data set up to its known size",
    "zoo.fitting": "unpickles tensors only, from a training's own state",
    "zoo.measure": _PACKAGED,
}


def readers(tree: ast.AST) -> set[str]:
    """Return the calls of a module that may read a file without a bound."""
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        if isinstance(called, ast.Name) and called.id in NAMES | CODE:
            found.add(called.id)
        elif isinstance(called, ast.Attribute):
            owner = called.value
            module = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
            known = called.attr in NAMES | METHODS or called.attr in LIBRARIES.get(module, ())
            if known:
                found.add(f"{module}.{called.attr}")
    return found


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_every_reader_is_bounded_or_listed_with_its_reason() -> None:
    found = {module_of(path): readers(ast.parse(path.read_text())) for path in sorted(ROOT.rglob("*.py"))}
    found = {module: calls for module, calls in found.items() if calls}
    unlisted = {module: sorted(calls) for module, calls in found.items() if module not in ALLOWED}
    assert unlisted == {}, "read through dqtool.artifacts.reading, or give the reason here"
    assert sorted(set(ALLOWED) - set(found)) == [], "these read nothing any more"


def test_such_calls_are_seen() -> None:
    for line in (
        "open(path)",
        "path.read_text()",
        "Path(a).read_bytes()",
        "json.load(stream)",
        "yaml.safe_load(text)",
        "torch.load(path)",
        "torch.jit.load(path)",
        "np.load(path)",
        "safe_open(path)",
        "load_file(path)",
        "zipfile.ZipFile(path)",
        "tarfile.open(path)",
        "pickle.load(stream)",
        "CLIPModel.from_pretrained(path)",
        "eval(text)",
        "path.open()",
    ):
        assert readers(ast.parse(line)), line
    assert not readers(ast.parse("network.eval(); read_file(path, 10); load_json(path)"))
