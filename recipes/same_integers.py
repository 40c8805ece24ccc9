"""Compare accumulators of the integer runtimes with the int64 reference, and write recipes/results/same-integers.md.

Every quantized layer of an embedded model is compared at every step of its calibrated tables, at 4/4, 6/6 and 8/8. The exit
code is 1 if an accumulator differs.

    python recipes/same_integers.py [zoo:digits-ddpm] [--steps 20]
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from dqtool.artifacts.files import write_text
from dqtool.artifacts.outputs import check_writable
from dqtool.bench.integers import ENGINES
from dqtool.bench.machine import describe_machine
from dqtool.runtimes import RUNTIMES, load

BITS = ("4/4", "6/6", "8/8")
MARK = "<!-- page made by dqtool same-integers -->"
"""Comment by which the script knows its own page again."""


def main() -> int:
    """Export at each bit width, compare, and write the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", nargs="?", default="zoo:digits-ddpm")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("-o", "--output", default=str(Path(__file__).parent / "results" / "same-integers.md"))
    parser.add_argument("--overwrite", action="store_true", help="replace a file that this script did not write")
    options = parser.parse_args()
    check_writable(options.output, "page", inputs=[options.model], overwrite=options.overwrite)
    rows, wrong = [], 0
    with tempfile.TemporaryDirectory(prefix="dqtool-integers-") as work:
        run(work, "dilate", options.model)
        run(work, "calibrate", "--steps", str(options.steps), "--samples", str(16 * options.steps))
        for bits in BITS:
            name = "b" + bits[0]
            run(work, "distill", "--bits", bits, "--iters", "0", "-o", f"{name}.safetensors")
            run(work, "export", f"{name}.safetensors", "-o", name)
            for engine, count in ENGINES.items():
                if (reason := RUNTIMES[engine].engine().available()) is not None:
                    rows.append((bits, engine, "-", "-", f"not run: {reason}"))
                    continue
                found = list(count(load(str(Path(work) / name), "simulate")))
                different = sum(d for _, _, d in found)
                wrong += different
                rows.append((bits, engine, len(found), f"{sum(c for _, c, _ in found):,}", different))
    machine = describe_machine(torch.get_num_threads())
    lines = [
        f"`python recipes/same_integers.py {options.model} --steps {options.steps}`, {options.steps} steps, {machine.processor} "
        f"({', '.join(machine.flags or []) or platform.machine()})",
        "",
        "| bits | runtime | layers | accumulators compared | different from int64 |",
        "| --- | --- | --- | --- | --- |",
        *("| " + " | ".join(map(str, row)) + " |" for row in rows),
        "",
        MARK,
    ]
    write_text(Path(options.output), "\n".join(lines) + "\n")
    print("\n".join(lines))
    return 1 if wrong else 0


def run(work: str, *arguments: str) -> None:
    """Run one command of dqtool in the working directory."""
    subprocess.run(
        [sys.executable, "-m", "dqtool", *arguments, "--quiet"], cwd=work, check=True, stdout=subprocess.DEVNULL
    )


if __name__ == "__main__":
    sys.exit(main())
