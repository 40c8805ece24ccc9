"""Builds the `cpu` kernels into wheels, one library for each instruction set; all else stands in pyproject.toml.

Without a compiler, or with DQTOOL_BUILD_KERNELS=0, the wheel is for every platform, and kernels compile at first use.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

KERNELS = Path("dqtool/runtimes/cpu")


def build_module() -> ModuleType:
    """Return `dqtool.runtimes.cpu.build`, read from its file: importing the package would import torch."""
    spec = importlib.util.spec_from_file_location("kernel_build", Path(__file__).parent / KERNELS / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def builds_here() -> bool:
    """Return whether this build makes kernels."""
    suits = sys.platform == "linux" and platform.machine().lower() in ("x86_64", "amd64")
    return suits and os.environ.get("DQTOOL_BUILD_KERNELS") != "0" and build_module().find_compiler() is not None


class BuildKernels(build_py):
    """Compile the kernels of every instruction set that the compiler knows, beside the modules."""

    def run(self) -> None:
        """Copy the modules, and add the libraries."""
        super().run()
        if self.editable_mode or not builds_here():
            return
        build = build_module()
        folder = Path(self.build_lib) / KERNELS / build.BUILT.name
        folder.mkdir(parents=True, exist_ok=True)
        text = build.source_text()
        for name in build.INSTRUCTION_SETS:
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                try:
                    output = folder / build.library_name(name, text)
                    build.compile_library(build.find_compiler(), name, text, output, Path(scratch))
                except subprocess.SubprocessError as e:  # an old compiler: first use takes the next instruction set
                    said = str(getattr(e, "stderr", None) or e)[:300]
                    print(f"warning: kernels for {name} were left out: {said}", file=sys.stderr)


class WithKernels(Distribution):
    """Tell setuptools that the package is for one platform where it holds libraries."""

    def has_ext_modules(self) -> bool:
        """Return whether the kernels are built."""
        return builds_here()


class PlatformWheel(bdist_wheel):
    """Name the wheel after the platform alone: the libraries depend on no version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the wheel's tag."""
        tag = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])


setup(distclass=WithKernels, cmdclass={"build_py": BuildKernels, "bdist_wheel": PlatformWheel})
