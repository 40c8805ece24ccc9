"""Kill processes of shared commands, and whole commands, at random instants, and check what dqtool promises about that.

    python tests/soak/processes.py --kills 100 -o recipes/results/soak-processes

Each episode calibrates and distills a tiny model. It kills attempts until enough have been killed, and then lets one finish:

- episodes of one process, and of two, end with the bits of an undisturbed run of as many processes;
- episodes whose attempts have one to three processes in turns end with the same layers, and losses within `TOLERANCE`;
- a command ends within `SECONDS` of the kill of one of its processes, with code 4 and a paragraph that names the process;
- no process of a command outlives it by more than `SECONDS`, and no file but the output and its pieces is left.

Writes NAME.json and NAME.md with the counts, and exits with 1 where a check failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

SECONDS, TOLERANCE = 10.0, 0.25
"""Bars: seconds from a kill to the end, and the relative difference of the last losses. A tiny network at 4/4 is chaotic: the
rounding of one sum moves codes, and the loss of single batches with them."""
STAGES = {
    "calibrate": ("calibrate", "dilated.safetensors", "--steps", "4", "--samples", "64"),
    "distill": ("distill", "calibrated.safetensors", "--iters", "60", "--refine-iters", "30"),
    "distill-at-once": (
        *("distill", "calibrated.safetensors", "--iters", "60", "--refine-iters", "30"),
        "--parallel-blocks",
    ),
}
OUTPUTS = {
    "calibrate": "calibrated.safetensors",
    "distill": "distilled.safetensors",
    "distill-at-once": "at-once.safetensors",
}
KINDS = ("one", "two", "mixed")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "dqtool", *arguments]


def processes_of(job: int) -> list[int]:
    """Return the processes that a command has started."""
    with contextlib.suppress(OSError):
        return [int(each) for each in Path(f"/proc/{job}/task/{job}/children").read_text().split()]
    return []


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Soak:
    """The counts, the failed checks, and the undisturbed runs that others are compared with."""

    def __init__(self, work: Path, seed: int) -> None:
        self.work, self.drawn = work, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self.longest = 0.0
        self.whole: dict[tuple[str, int], Path] = {}
        self.seconds: dict[str, float] = {}

    def prepare(self) -> None:
        """Make the model, and each stage's output without disturbance by one process and by two."""
        from helpers import tiny_pipeline

        tiny_pipeline(self.work / "tiny")
        subprocess.run(command("dilate", "tiny", "--quiet"), cwd=self.work, check=True, stdout=subprocess.DEVNULL)
        for stage, arguments in STAGES.items():
            for count in (1, 2):
                # The calibration by one process is what all others train on.
                output = self.work / (OUTPUTS[stage] if count == 1 else f"whole-{stage}.safetensors")
                begin = time.monotonic()
                extra = ("--quiet", "-o", output.name, "--nproc", str(count))
                subprocess.run(command(*arguments, *extra), cwd=self.work, check=True, stdout=subprocess.DEVNULL)
                self.seconds[stage] = time.monotonic() - begin
                self.whole[stage, count] = output

    def episode(self, stage: str, kind: str, kills: int) -> None:
        """Kill `kills` attempts and let one finish."""
        folder = Path(tempfile.mkdtemp(dir=self.work))
        output = folder / OUTPUTS[stage]
        self.counts[f"episodes: {stage}, {kind}"] += 1
        for _ in range(kills):
            if not self.killed_attempt(stage, self._count(kind), output):
                break
        count = self._count(kind)
        job = subprocess.run(
            command(*STAGES[stage], "--quiet", "-o", str(output), "--nproc", str(count)),
            cwd=self.work,
            capture_output=True,
            text=True,
        )
        where = f"{stage}, {kind}"
        self._check(job.returncode == 0, f"{where}: ended with {job.returncode}: {job.stderr[-300:]}")
        left = {each.name for each in folder.iterdir()} - {output.name, output.with_suffix(".json").name}
        self._check(not left, f"{where}: left {sorted(left)}")
        if job.returncode == 0:
            self._compare(stage, kind, output)
        shutil.rmtree(folder)

    def killed_attempt(self, stage: str, count: int, output: Path) -> bool:
        """Start an attempt and kill it or one of its processes; return False if it was faster."""
        job = subprocess.Popen(
            command(*STAGES[stage], "-o", str(output), "--nproc", str(count)),
            cwd=self.work,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        time.sleep(self.drawn.uniform(0.2, 1.0) * self.seconds[stage])
        workers = processes_of(job.pid)
        whole = count == 1 or not workers or self.drawn.random() < 0.3
        number = self.drawn.choice((signal.SIGKILL, signal.SIGTERM)) if whole else signal.SIGKILL
        if job.poll() is not None:
            job.communicate()
            return False
        begin = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            os.kill(job.pid if whole else self.drawn.choice(workers), number)
        told = (job.communicate()[1] or "").strip().splitlines()
        while any(map(alive, workers)) and time.monotonic() - begin < 3 * SECONDS:
            time.sleep(0.05)
        seconds = time.monotonic() - begin
        self.longest = max(self.longest, seconds)
        self.counts[f"{'command' if whole else 'process'} {signal.Signals(number).name}"] += 1
        self._check(seconds < SECONDS, f"{stage}: {count} processes took {seconds:.1f} s to end")
        if not whole and job.returncode:
            named = bool(told) and "was killed by SIGKILL" in told[-1] and job.returncode == 4
            self._check(named, f"{stage}: code {job.returncode}, {told[-1:]}")
        return job.returncode != 0

    def _count(self, kind: str) -> int:
        return {"one": 1, "two": 2, "mixed": self.drawn.choice((1, 2, 3))}[kind]

    def _compare(self, stage: str, kind: str, output: Path) -> None:
        where = f"{stage}, {kind}"
        if kind != "mixed":
            same = output.read_bytes() == self.whole[stage, 1 if kind == "one" else 2].read_bytes()
            self._check(same, f"{where}: other bits than undisturbed")
            return
        one, found = (json.loads(path.with_suffix(".json").read_text()) for path in (self.whole[stage, 1], output))
        self._check(
            [e["name"] for e in one["layers"]] == [e["name"] for e in found["layers"]], f"{where}: other layers"
        )
        if stage != "calibrate":
            losses = [each["metrics"]["refine_loss"][1] for each in (one, found)]
            near = abs(losses[1] / losses[0] - 1) < TOLERANCE
            self._check(near, f"{where}: losses {losses}")

    def _check(self, holds: bool, text: str) -> None:
        if not holds:
            self.failures.append(text)
            print(f"FAILED {text}", file=sys.stderr, flush=True)


def render(found: dict[str, Any]) -> str:
    lines = ["# Kills of shared commands", "", f"`{found['command']}`, {found['seconds']:.0f} s.", ""]
    lines += ["| what | count |", "| --- | --- |", f"| kills | {found['kills']} |"]
    lines += [f"| {name} | {count} |" for name, count in sorted(found["counts"].items())]
    lines += [
        "",
        f"Longest time from a kill to the end of all processes: {found['longest_end']:.1f} s (bar: {SECONDS:g} s).",
    ]
    lines += ["", "No check failed." if not found["failures"] else "Failed checks:"]
    return "\n".join([*lines, *(f"- {each}" for each in found["failures"])]) + "\n"


def main() -> int:
    """Run episodes until enough kills were made; write the counts and return the exit code."""
    from dqtool.artifacts.files import write_text
    from dqtool.artifacts.outputs import check_results

    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    path, table = (given.output.with_suffix(suffix) for suffix in (".json", ".md"))
    check_results(path, [table])
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dqtool-soak-") as folder:
        soak = Soak(Path(folder), given.seed)
        soak.prepare()
        made = 0
        while made < given.kills:
            stage, kind = soak.drawn.choice(tuple(STAGES)), soak.drawn.choice(KINDS)
            soak.episode(stage, kind, min(soak.drawn.randint(1, 4), given.kills - made))
            made = sum(count for name, count in soak.counts.items() if " SIG" in name)
            print(f"{made} kills, {len(soak.failures)} failures", file=sys.stderr, flush=True)
    found = {
        "format": "dqtool-soak-processes/1",
        "command": f"python tests/soak/processes.py --kills {given.kills} --seed {given.seed} -o {given.output}",
        "seconds": time.monotonic() - begin,
        "kills": made,
        "counts": dict(soak.counts),
        "longest_end": soak.longest,
        "failures": soak.failures,
    }
    write_text(path, json.dumps(found, indent=1) + "\n")
    write_text(table, render(found))
    print(render(found))
    return 1 if soak.failures else 0


if __name__ == "__main__":
    sys.exit(main())
