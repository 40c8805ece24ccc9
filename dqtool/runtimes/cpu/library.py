"""C++ kernels, called through ctypes: those of the wheel, or compiled once per machine into the user's cache.

The library does not need PyTorch's headers. It shares PyTorch's OpenMP threads, since both link the same `libgomp`. `get()`
returns None where there are none, and `problem()` returns the reason.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from dqtool import report
from dqtool.artifacts import cache_directory
from dqtool.errors import EnvironmentFault, UsageError
from dqtool.runtimes.cpu.build import (
    BUILT,
    FLAGS,
    compile_library,
    find_compiler,
    library_name,
    source_text,
)

__all__ = [
    "FLAGS",
    "get",
    "has_products",
    "has_vnni",
    "instruction_sets",
    "layout_of_machine",
    "on_tiles",
    "pointer",
    "problem",
    "strides",
]

LIMIT = "DQTOOL_ISA"
"""Environment variable that limits the instruction set: avx2, vnni or amx."""

_VNNI = frozenset({"avx2", "fma", "bmi2", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"})
NEEDED = {
    "amx": _VNNI | {"amx_tile", "amx_int8"},
    "vnni": _VNNI,
    "avx2": frozenset({"avx2", "fma", "bmi2"}),
}
"""Flags that a processor has for each of `INSTRUCTION_SETS`, under Linux's names."""

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
    "dq_use_mkl": [_P],
    "dq_begin_step": [_P],
    "dq_end_step": [_I],
    "dq_float_threads": [_I],
}
_WEIGHT = [_P, _P, _L, _I, _P]  # int8 codes, or packed words, bytes of a row, bits, zero points
_PRODUCTS = {
    "dq_pack": [*_WEIGHT, _P, _P, *[_L] * 4],
    "dq_compact": [_P, _P, _P, _L, _L],
    "dq_conv": [*[_P] * 4, *[_I] * 3, *[_L] * 13, _P, _F, _P, _L, _L, _P, _L, _P, _F, _L, _P],
    "dq_linear_codes": [*[_P] * 4, *[_I] * 3, *[_L] * 3, _P, _F, _P, _L, _P, _L, _I, *_QUANTIZER],
    "dq_attention": [_P, _P, _P, _P, _P, _P, *[_L] * 5, _P, _P, _P, _P, *[_L] * 3, _P],
    "dq_winograd_pack": [*_WEIGHT, _P, _P, *[_L] * 2, _I],
    "dq_winograd": [*[_P] * 4, *[_I] * 2, *[_L] * 7, _P, _F, _P, _L, _P, _F, _P],
}
_INTEGERS = (
    "dq_on_tiles",
    "dq_pack",
    "dq_compact",
    "dq_winograd_pack",
    "dq_begin_step",
)  # functions that return an int

_problem: str | None = None


def get() -> ctypes.CDLL | None:
    """Return the kernels, compiled on first use (seconds, once per machine and version); None if they are not available."""
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
    """Return whether the products use AVX512-VNNI: codes of any width at one speed."""
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


def instruction_sets() -> list[str]:
    """Return those of `build.INSTRUCTION_SETS` that the processor has and DQTOOL_ISA allows, the most capable first.

    Raises:
        UsageError: DQTOOL_ISA names no instruction set, or one that this processor lacks.
    """
    present, limit = _processor_flags(), os.environ.get(LIMIT)
    found = [name for name, needed in NEEDED.items() if needed <= present]
    if limit is None:
        return found
    if limit not in found:
        raise UsageError(
            f"{LIMIT}={limit} names an instruction set that this processor lacks, or none at all",
            where=LIMIT,
            fix=f"Choose from {', '.join(found)}, or leave it out" if found else "Leave it out",
        )
    return found[found.index(limit) :]


@functools.cache
def _load() -> ctypes.CDLL | None:
    global _problem
    _problem, text, compiler = "the processor lacks AVX2", source_text(), find_compiler()
    for wanted in instruction_sets():
        brought = BUILT / library_name(wanted, text, FLAGS)
        if compiler is None and not brought.exists():
            _problem = "no C++ compiler (g++ or clang++) was found"
            continue
        try:
            path = brought if brought.exists() else _compiled(str(compiler), wanted, text)
            found = _declare(ctypes.CDLL(str(path)))
            _problem = None
            return found
        except subprocess.CalledProcessError as e:  # an old compiler may know less than the processor
            lines = (
                [line for line in e.stderr.splitlines() if "error" in line] or e.stderr.splitlines() or ["it failed"]
            )
            _problem = f"{compiler} could not compile them: {lines[0]}"
        except (OSError, AttributeError, subprocess.SubprocessError) as e:
            _problem = f"the compiled kernels can't be used: {e}"
    return None


def _compiled(compiler: str, wanted: str, text: str) -> Path:
    """Return the path of the library for this source, compiler and instruction set; compile it if it is missing."""
    changed = str(os.path.getmtime(shutil.which(compiler) or compiler))
    name = library_name(wanted, text, (*FLAGS, compiler, changed))
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
    try:
        compile_library(compiler, wanted, text, library, Path(scratch), FLAGS)
    finally:
        if Path(scratch) != folder or not library.exists():
            shutil.rmtree(scratch, ignore_errors=True)
    return library


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the argument types of the functions, and ask the system for matrix tiles, once per process."""
    features = library.dq_features()
    signatures = {**_SIGNATURES, **(_PRODUCTS if features & 1 else {})}
    for name, arguments in signatures.items():
        function = getattr(library, name)
        function.argtypes = arguments
        function.restype = ctypes.c_int if name in _INTEGERS else None
    library.dq_use_amx(int(os.environ.get("DQTOOL_AMX") != "0"))
    library.dq_use_mkl(_mkl_threads())
    return library


def _mkl_threads() -> int | None:
    """Return the address of the function that sets the calling thread's number of MKL threads; None where PyTorch has no MKL."""
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(torch_cpu.MKL_Set_Num_Threads_Local, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


def _processor_flags() -> frozenset[str]:
    """Return the processor's instruction sets under Linux's names; those that PyTorch found on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        found = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
        return NEEDED["avx2"] if found else frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").partition(":")[2].split())
