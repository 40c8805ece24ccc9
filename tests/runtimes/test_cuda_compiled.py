"""The cuda runtime's kernels compile for a GPU: what Triton's interpreter lets pass, its compiler may refuse."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

RECIPES = Path(__file__).parents[2] / "recipes"

SCRIPT = """
import gpu_kernels
from dqtool.runtimes.cuda.compiled import compiled_for
from dqtool.runtimes.cuda.tiles import Tile
with compiled_for(90) as made:
    gpu_kernels.product(4, Tile(64, 64, 4, 4))
    gpu_kernels.one_channel()
    gpu_kernels.attention(40)
for kernel in made:
    print(kernel.name, kernel.instructions, kernel.spilled)
"""

AS_IN_3_4 = """
import triton, triton.language
from triton.runtime import driver
if hasattr(triton, "constexpr_function"):
    triton.language.constexpr_function = triton.constexpr_function
    del triton.constexpr_function

    class Old:
        def set_active(self, driver):
            self.active = driver

    driver.__class__ = Old
    driver.__dict__.clear()
    driver.active = driver.default = None
"""
"""Names as Triton 3.4 has them, the oldest version that the package takes."""


def lines_of(script: str) -> list[list[str]]:
    """Return the words of each line that a script of its own process prints."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=RECIPES, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


@pytest.mark.parametrize("before", ["", AS_IN_3_4], ids=["newest", "3.4"])
def test_kernels_multiply_on_tensor_cores_without_spills(before: str) -> None:
    lines = lines_of(before + SCRIPT)
    products = [words for words in lines if words[0] in ("product_kernel", "attention_kernel")]
    assert len(products) == 3 and all(words[2] in ("wgmma", "mma") for words in products)
    assert all(words[-1] == "0" for words in lines)
