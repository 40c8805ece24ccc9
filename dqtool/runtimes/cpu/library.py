"""C++ kernels, compiled once per machine into the user's cache and called through ctypes.

The library does not need PyTorch's headers. It shares PyTorch's OpenMP threads, since both link the same `libgomp`. `get()`
returns None without a compiler, and `problem()` returns the reason.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from dqtool import report
from dqtool.artifacts import cache_directory
from dqtool.errors import EnvironmentFault

__all__ = [
    "get",
    "has_products",
    "has_vnni",
    "layout_of_machine",
    "on_tiles",
    "pointer",
    "problem",
    "strides",
]

SOURCES = ("kernels.cpp", "tiles.cpp", "amx.cpp", "products.cpp", "attention.cpp", "winograd.cpp", "rotation.cpp")
FLAGS = (
    "-std=c++20",
    "-O3",
    "-march=native",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-strict-aliasing",
    "-fopenmp",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-mprefer-vector-width=512",
)

_Strides = ctypes.c_int64 * 3
_P, _L, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_QUANTIZER = [_P, _I, _F, _F, _I]  # m, per_channel, lo, hi, zp
_SIGNATURES = {
    "dq_quantize": [_P, _P, *[_L] * 10, _I, *_QUANTIZER],
    "dq_group_norm_quantize": [_P, _P, *[_L] * 10, _F, _P, _P, _P, _P, _I, *_QUANTIZER],
    "dq_layer_norm_quantize": [_P, _P, *[_L] * 4, _F, _P, _P, _P, _P, *_QUANTIZER],
    "dq_geglu_quantize": [_P, _P, *[_L] * 3, *_QUANTIZER],
    "dq_rotate": [_P, _P, _L, _L, _F],
    "dq_on_tiles": [_L],
}
_WEIGHT = [_P, _P, _L, _I, _P]  # int8 codes, or packed words, bytes of a row, bits, zero points
_PRODUCTS = {
    "dq_pack": [*_WEIGHT, _P, _P, *[_L] * 4],
    "dq_conv": [_P, _P, _P, *[_I] * 3, *[_L] * 13, _P, _F, _P, _L, _L, _P, _L, _P, _F, _L, _P],
    "dq_linear_codes": [_P, _P, _P, *[_I] * 3, *[_L] * 3, _P, _F, _P, _L, _P, _L, _I, *_QUANTIZER],
    "dq_attention": [_P, _P, _P, _P, _P, _P, *[_L] * 5, _P, _P, _P, _P, *[_L] * 3, _P],
}
_WINOGRAD = {
    "dq_winograd_pack": [*_WEIGHT, _P, _P, *[_L] * 2],
    "dq_winograd": [_P, _P, _P, *[_L] * 7, _P, _F, _P, _L, _P, _F, _P],
}
_INTEGERS = ("dq_on_tiles", "dq_pack", "dq_winograd_pack")  # functions that return an int

_problem: str | None = None


def get() -> ctypes.CDLL | None:
    """The kernels, compiled if need be (seconds, once per machine and version); None where they can't be had."""
    return None if os.environ.get("DQTOOL_KERNELS") == "0" else _load()


def problem() -> str | None:
    """Return the reason why `get()` returned None."""
    if os.environ.get("DQTOOL_KERNELS") == "0":
        return "DQTOOL_KERNELS=0 is set"
    return _problem


@functools.cache
def has_products() -> bool:
    """Return whether int8 products are compiled in: the machine has AVX512-VNNI or AVX2."""
    kernels = get()
    return kernels is not None and bool(kernels.dq_features() & 1)


@functools.cache
def has_vnni() -> bool:
    """Return whether the products use AVX512-VNNI: codes of any width at one speed, and
    Winograd transforms of narrow ones."""
    kernels = get()
    return kernels is not None and bool(kernels.dq_features() & 2)


@functools.cache
def on_tiles(depth: int) -> bool:
    """Return whether products that sum over `depth` bytes run on AMX's matrix tiles: compiled in, granted by the system, and
    not switched off with DQTOOL_AMX=0."""
    kernels = get()
    return kernels is not None and bool(kernels.dq_on_tiles(depth))


def layout_of_machine(depth: int) -> int:
    """Return a number that identifies the layout of a weight of `depth` bytes for the kernels of this machine."""
    kernels = get()
    return -1 if kernels is None else int(kernels.dq_features()) << 1 | int(on_tiles(depth))


def strides(tensor: Tensor) -> ctypes.Array:
    """Return the strides of the first three dimensions, for the attention kernel."""
    return _Strides(*tensor.stride()[:3])


def pointer(tensor: Tensor | None) -> int | None:
    """Return the address of a tensor's data, None for None."""
    return None if tensor is None else tensor.data_ptr()


@functools.cache
def _load() -> ctypes.CDLL | None:
    global _problem
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if compiler is None:
        _problem = "no C++ compiler (g++ or clang++) was found"
        return None
    try:
        return _declare(ctypes.CDLL(str(_compiled(compiler))))
    except subprocess.CalledProcessError as e:
        lines = [line for line in e.stderr.splitlines() if "error" in line] or e.stderr.splitlines() or ["it failed"]
        _problem = f"{compiler} could not compile them: {lines[0]}"
    except (OSError, AttributeError, subprocess.SubprocessError) as e:
        _problem = f"the compiled kernels can't be used: {e}"
    return None


def _compiled(compiler: str) -> Path:
    """Return the path of the library for this source, compiler and CPU; compile it if it is missing."""
    here = Path(__file__).parent
    text = "\n".join((here / name).read_text(encoding="utf-8") for name in SOURCES)
    identity = "\n".join([text, compiler, *FLAGS, _cpu(), str(os.path.getmtime(shutil.which(compiler) or compiler))])
    name = f"dqtool-kernels-{hashlib.sha256(identity.encode()).hexdigest()[:24]}.so"
    try:
        folder = cache_directory("kernels")
        library = folder / name
        if library.exists():
            return library
        folder.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.mkdtemp(dir=folder)
    except (OSError, EnvironmentFault):  # no cache, or a read-only one: compile for this process alone
        folder = Path(scratch := tempfile.mkdtemp(prefix="dqtool-kernels-"))
        library = folder / name
    report.say("cpu: compiling kernels for this machine (once)")
    source, built = Path(scratch) / "all.cpp", Path(scratch) / name
    try:
        source.write_text(text, encoding="utf-8")
        subprocess.run(
            [compiler, *FLAGS, str(source), "-o", str(built)], check=True, capture_output=True, text=True, timeout=300
        )
        os.replace(built, library)  # atomic: several processes may compile at once
    finally:
        if Path(scratch) != folder or not library.exists():
            shutil.rmtree(scratch, ignore_errors=True)
    return library


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the argument types of the functions, and ask the system for matrix tiles, once per process."""
    features = library.dq_features()
    signatures = {**_SIGNATURES, **(_PRODUCTS if features & 1 else {}), **(_WINOGRAD if features & 2 else {})}
    for name, arguments in signatures.items():
        function = getattr(library, name)
        function.argtypes = arguments
        function.restype = ctypes.c_int if name in _INTEGERS else None
    library.dq_use_amx(int(os.environ.get("DQTOOL_AMX") != "0"))
    return library


def _cpu() -> str:
    """Return the processor properties that `-march=native` depends on: machines of several kinds may share one cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()} {torch.backends.cpu.get_cpu_capability()}"
    kept = ("vendor_id", "cpu family", "model", "flags", "Features")
    return "\n".join(sorted({line for line in lines if line.startswith(kept)}))
