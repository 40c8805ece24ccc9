"""Fuzz every reader and the command line in process, by corpus and by structure, and count what must never happen.

    python tests/fuzz/driver.py --inputs 100000 --seed 0 -o recipes/results/fuzz

writes FILE.json and FILE.md. An input is a genuine file changed at random, a value of the right form with wrong parts, or
a command line. Whatever a reader raises must be a `DqtoolError` (code 2 to 5), within a second of CPU time; nothing may be written
outside the driver's own folder, by a reader nowhere, and no process or connection started.

The generator is our own and not hypothesis: an input costs a tenth of a millisecond in place of some, any one is made again
from its number, and nothing needs to be shrunk. Coverage guides `guided.py`, by atheris, one reader at a time.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from corpus import NETWORK, SCHEDULER, bent, files, unpack
from parsers import by_bytes, by_structure, commands
from watch import Watch

from dqtool import report
from dqtool.errors import DqtoolError
from dqtool.models.families import FAMILIES
from dqtool.models.sampling.sampler import make_sampler

__all__ = ["MEGABYTES", "fuzz"]

SECONDS, MEGABYTES, HANG = 1.0, 200, 30
SLOW = {
    **{"network config": 24, "scheduler config": 8, "packed tensors": 48, "calibrated tensors": 24, "command line": 48},
    **{"table": 12, "recipe": 6, "recipe with --set": 3, "LoRA by structure": 2, "pipeline by structure": 2},
}
"""Kinds that take long get one of so many inputs of the others."""


class _Silence(io.TextIOBase):
    def write(self, text: str) -> int:
        return len(text)


def schedule(kinds: list[str]) -> list[str]:
    """Return the order of kinds, repeated for as long as the run lasts: every kind about as long as every other."""
    most = max(SLOW.values())
    slots: list[str] = []
    for turn in range(most):
        slots += [kind for kind in kinds if turn % SLOW.get(kind, 1) == 0]
    return slots


def fuzz(inputs: int, seed: int, folder: Path, until: float = float("inf"), only: str | None = None) -> dict[str, Any]:
    """Run that many inputs, or as many as fit before the time `until`, and return the counts."""
    folder = folder.resolve()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    report.set_quiet(True)
    sys.dont_write_bytecode = True
    os.environ["DQTOOL_CACHE"] = os.environ["TMPDIR"] = str(folder)
    tempfile.tempdir = None
    chain, home = unpack(folder), Path.cwd()
    genuine, parsers, structures = files(), by_bytes(folder), by_structure(folder, chain)
    os.chdir(chain)
    kinds = [*parsers, *structures, "command line"]
    slots, counts = [only] if only else schedule(kinds), {kind: Counter[str]() for kind in kinds}
    slowest, spent = dict.fromkeys(kinds, 0.0), dict.fromkeys(kinds, 0.0)
    failures: list[dict[str, Any]] = []
    watch = Watch(folder)

    def hung(_signal: int, _frame: object) -> None:
        raise TimeoutError(f"no answer after {HANG} s")

    def once(kind: str, draw: random.Random) -> str:
        """Run one input with the driver's own writes unwatched; returns what came of it."""
        if kind == "command line":
            with watch.watching(strict=False):
                return commands(chain, draw)
        if kind in structures:
            with watch.watching(strict=False):  # some write their input first
                structures[kind](draw)
            return "read"
        place, parser = parsers[kind]
        place.write_bytes(bent(genuine[kind], draw))
        with watch.watching(strict=True):
            parser(place)
        return "read"

    before_signal = signal.signal(signal.SIGALRM, hung)
    done = 0
    try:
        with contextlib.redirect_stderr(_Silence()):
            for name, (place, parser) in parsers.items():
                place.write_bytes(genuine[name])
                parser(place)  # warm, and right
            FAMILIES["UNet2DModel"].build(NETWORK)
            make_sampler(SCHEDULER)
            for number in range(50):  # imports and caches
                with contextlib.suppress(Exception):
                    once(kinds[-1 - number % 11], random.Random(number))
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            expected = _tree(folder)
            for number in range(inputs):
                if time.time() > until:
                    break
                kind, draw = slots[number % len(slots)], random.Random(f"{seed}-{number}")
                signal.alarm(HANG)
                start = time.process_time()  # other work on the machine is not its fault
                what = ""
                try:
                    outcome = once(kind, draw)
                except DqtoolError as error:
                    outcome = f"code {error.exit_code}"
                    if error.exit_code == 1 or len(str(error)) > 500 or not str(error).isprintable():
                        what = repr(error)
                except AssertionError as error:
                    outcome, what = "code 1", str(error)
                except Exception as error:
                    outcome, what = "traceback", repr(error)
                signal.alarm(0)
                seconds = time.process_time() - start
                if watch.faults:
                    outcome, what = "outside", "; ".join(watch.faults)
                    watch.faults.clear()
                if seconds > SECONDS:
                    what = what or f"{seconds:.2f} s"
                if what:
                    failures.append({"kind": kind, "number": number, "what": what[:400]})
                    print(failures[-1], file=sys.__stderr__, flush=True)
                slowest[kind] = max(slowest[kind], seconds)
                spent[kind] += seconds
                counts[kind][outcome] += 1
                counts[kind]["over time"] += seconds > SECONDS
                done += 1
                if done % 50_000 == 0:
                    print(f"{done:,} inputs, {len(failures)} failures", file=sys.__stderr__, flush=True)
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
            left = sorted(_tree(folder) - expected)
    finally:
        signal.signal(signal.SIGALRM, before_signal)
        os.chdir(home)
        report.set_quiet(False)
    total = sum(counts.values(), Counter())
    return {
        "inputs": done,
        "seed": seed,
        "tracebacks": total["traceback"],
        "code 1": total["code 1"],
        "over time": total["over time"],
        "megabytes grown": round(grown, 1),
        "outside": total["outside"],
        "files left": left[:20],
        "failures": failures[:50],
        "cpu seconds": round(sum(spent.values()), 1),
        "kinds": {
            kind: {
                **counts[kind],
                "mean ms": round(1000 * spent[kind] / max(1, sum(counts[kind].values())), 2),
                "slowest ms": round(1000 * slowest[kind], 1),
            }
            for kind in kinds
        },
    }


def _tree(folder: Path) -> set[str]:
    """Return the relative names under a directory."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def rendered(found: dict[str, Any], command: str) -> str:
    """Return the counts as Markdown."""
    heads = (
        "read",
        "code 2",
        "code 3",
        "code 4",
        "code 5",
        "code 1",
        "traceback",
        "outside",
        "over time",
        "mean ms",
        "slowest ms",
    )
    lines = [
        "# Fuzzing",
        "",
        f"`{command}`: {found['inputs']:,} inputs, {found['tracebacks']} tracebacks, {found['code 1']} of code 1, "
        f"{found['over time']} over {SECONDS:g} s of CPU time, {found['outside']} writes outside the folder, {len(found['files left'])} "
        f"files left behind, peak memory grown by {found['megabytes grown']:g} MB.",
        "",
        "Times are processor time of the driver's process from the call of a reader to its answer (`time.process_time`), so "
        "that other work on the machine does not count. Every input has its own seed, `SEED-NUMBER`.",
        "",
        "| reader | " + " | ".join(heads) + " |",
        "| --- |" + " ---: |" * len(heads),
    ]
    lines += [f"| {k} | " + " | ".join(str(v.get(head, 0)) for head in heads) + " |" for k, v in found["kinds"].items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the command line; returns 1 where something happened that must not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this time with what was done")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="KIND", help="one kind of input alone")
    parser.add_argument("-o", "--output", help="name of the report, without its ending")
    given = parser.parse_args()
    output = None if given.output is None else Path(given.output).resolve()
    with tempfile.TemporaryDirectory() as folder:
        found = fuzz(given.inputs, given.seed, Path(folder), time.time() + 60 * given.minutes, given.only)
    command = f"python tests/fuzz/driver.py --inputs {found['inputs']} --seed {given.seed}"
    text = rendered(found, command)
    if output is not None:
        output.with_suffix(".md").write_text(text)
        output.with_suffix(".json").write_text(json.dumps({"command": command, **found}, indent=1) + "\n")
    print(text)
    bad = found["tracebacks"] + found["code 1"] + found["over time"] + found["outside"] + len(found["files left"])
    return int(bad > 0 or found["megabytes grown"] > MEGABYTES)


if __name__ == "__main__":
    sys.exit(main())
