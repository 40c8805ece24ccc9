"""Compile the kernels for one instruction set. Imports the standard library alone, because `setup.py` reads this file.

A library is named after its instruction set and the checksum of its sources and flags. A source installation compiles it at
first use, a wheel brings one for each instruction set.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

__all__ = [
    "BUILT",
    "FLAGS",
    "INSTRUCTION_SETS",
    "SOURCES",
    "compile_library",
    "find_compiler",
    "library_name",
    "source_text",
]

SOURCES = (
    "threads.cpp",
    "kernels.cpp",
    "tiles.cpp",
    "tiles_vnni.cpp",
    "tiles_avx2.cpp",
    "results.cpp",
    "amx.cpp",
    "products.cpp",
    "softmax.cpp",
    "operands.cpp",
    "attention.cpp",
    "winograd.cpp",
    "winograd_avx2.cpp",
    "rotation.cpp",
)
"""Files of the one translation unit, in their order."""

FLAGS = (
    "-std=c++20",
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-strict-aliasing",
    "-Wno-psabi",
    "-fopenmp",
    "-pthread",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
)

INSTRUCTION_SETS = {
    "amx": ("-march=sapphirerapids", "-mprefer-vector-width=512"),
    "vnni": ("-march=cascadelake", "-mprefer-vector-width=512"),
    "avx2": ("-march=haswell",),
}
"""Compiler flags by instruction set, the most capable first."""

BUILT = Path(__file__).parent / "built"
"""Folder of the libraries that a wheel brings."""


def source_text() -> str:
    """Return the sources as one translation unit."""
    return "\n".join((Path(__file__).parent / name).read_text(encoding="utf-8") for name in SOURCES)


def library_name(instruction_set: str, text: str, flags: Sequence[str] = FLAGS) -> str:
    """Return the file name of the library of these sources."""
    identity = "\n".join([text, *flags, *INSTRUCTION_SETS[instruction_set]])
    return f"dqtool-kernels-{instruction_set}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"


def find_compiler() -> str | None:
    """Return the C++ compiler of this machine: `$CXX`, g++, clang++ or c++."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")


def compile_library(
    compiler: str, instruction_set: str, text: str, output: Path, scratch: Path, flags: Sequence[str] = FLAGS
) -> None:
    """Compile `text` in the folder `scratch`, and move the library to `output` when it is whole.

    Raises:
        subprocess.SubprocessError: the compiler failed, with its messages in `stderr`, or took half an hour.
        OSError: the compiler is missing, or a file can't be written.
    """
    source, built = scratch / "all.cpp", scratch / output.name
    source.write_text(text, encoding="utf-8")
    command = [compiler, *flags, *INSTRUCTION_SETS[instruction_set], str(source), "-o", str(built)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=1800)
    os.replace(built, output)  # atomic: several processes may compile at once
