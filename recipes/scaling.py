"""Compare calibrate, distill and eval of `digits-ddpm` by one process and by several of one thread each.

    python recipes/scaling.py [--processes 2] [--seeds 3] [--kills 5]

The script writes recipes/results/scaling.md and .json, and exits with an error if a bar is missed. The machine must be idle.
Each seed calibrates, trains and samples by one process and by several, in turns; both distill the calibration of one
process, so that training alone differs. The time of the work is that of the command less that of the same command with next
to no samples and iterations, which imports PyTorch, starts the processes and loads the model.

Each kill ends a random process of a distillation at a random instant, and the same command goes on with another number of
processes. The result is compared with one of an undisturbed run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

RESULTS = Path(__file__).parent / "results"
FORMAT = "dqtool-scaling/1"
SPEEDUP, DECIBELS, SECONDS = 1.6, 0.1, 10.0
"""Bars: the least speedup of two processes, the most difference of mean PSNR, and the most seconds from a kill to the end."""
OPTIONS: dict[str, tuple[str, ...]] = {
    "calibrate": ("--steps", "20", "--samples", "5120"),
    "distill": ("--bits", "4/4", "--iters", "100", "--refine-iters", "100"),
    "eval": ("--samples", "256", "--metrics", "similarity"),
}
FAST: dict[str, tuple[str, ...]] = {
    "calibrate": ("--steps", "2", "--samples", "8"),
    "distill": ("--bits", "4/4", "--iters", "2", "--refine-iters", "2", "--no-correct-noise", "--train-samples", "20"),
    "eval": ("--samples", "4", "--metrics", "similarity"),
}
"""Options of the runs that measure the start of a command."""
TRIED: dict[str, tuple[str, ...]] = {
    "calibrate": ("--steps", "20", "--samples", "40"),
    "distill": ("--bits", "4/4", "--iters", "4", "--refine-iters", "4"),
    "eval": ("--samples", "8", "--metrics", "similarity"),
}
"""Options with `--fast`, which tries the script: its figures mean nothing."""
STAGES = tuple(OPTIONS)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "dqtool", *arguments]


def run(*arguments: str, cwd: Path) -> float:
    """Run a command line and return its seconds."""
    begin = time.perf_counter()
    subprocess.run(command(*arguments, "--quiet"), cwd=cwd, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def manifest(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def measure_seed(work: Path, processes: int, seed: int) -> list[dict[str, Any]]:
    """Return a row for each stage and number of processes: seconds of the work and of the whole command, and PSNR."""
    rows = []
    for count in (1, processes):
        name = f"{seed}-{count}"
        inputs = {
            "calibrate": ("dilated.safetensors",),
            "distill": (f"calibrated-{seed}-1.safetensors",),
            "eval": (f"distilled-{name}.safetensors", "--reference", "model"),
        }
        outputs = {
            "calibrate": f"calibrated-{name}.safetensors",
            "distill": f"distilled-{name}.safetensors",
            "eval": f"eval-{name}.json",
        }
        for stage in STAGES:
            given = (stage, *inputs[stage], "--nproc", str(count), "--seed", str(seed))
            os.environ["DQTOOL_CACHE"] = str(work / f"cache-{name}")  # the reference is sampled each time
            start = run(*given, *FAST[stage], "-o", f"start-{outputs[stage]}", cwd=work)
            whole = run(*given, *OPTIONS[stage], "-o", outputs[stage], cwd=work)
            row = {
                "stage": stage,
                "seed": seed,
                "processes": count,
                "seconds": whole - start,
                "command_seconds": whole,
            }
            made = manifest(work / outputs[stage].replace(".safetensors", ".json"))
            if stage == "eval":
                row["psnr"] = made["metrics"]["psnr"]["mean"]
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def children_of(process: int) -> list[int]:
    text = Path(f"/proc/{process}/task/{process}/children").read_text()
    return [int(each) for each in text.split()]


def kill_once(work: Path, processes: int, drawn: random.Random, number: int) -> dict[str, Any]:
    """Kill a random process of a distillation, finish it with another number of processes, and return what was seen."""
    output = f"killed-{number}.safetensors"
    arguments = ("distill", "calibrated-0-1.safetensors", *OPTIONS["distill"], "-o", output)
    job = subprocess.Popen(
        command(*arguments, "--nproc", str(processes)),
        cwd=work,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait = drawn.uniform(8.0, 30.0)
    time.sleep(wait)
    victim = drawn.choice(children_of(job.pid))
    begin = time.perf_counter()
    os.kill(victim, signal.SIGKILL)
    told = (job.communicate()[1] or "").strip().splitlines()[-1]
    seconds = time.perf_counter() - begin
    others = drawn.choice([count for count in (1, 2, 3) if count != processes])
    run(*arguments, "--nproc", str(others), cwd=work)
    whole, again = (manifest(work / f"{name}.json")["metrics"] for name in ("distilled-0-1", output.split(".")[0]))
    first = next(iter(whole["block_loss"]))
    row = {
        "after": wait,
        "seconds_to_end": seconds,
        "code": job.returncode,
        "message": told,
        "went_on_with": others,
        "first_block_loss": [whole["block_loss"][first][1], again["block_loss"][first][1]],
        "refine_loss": [whole["refine_loss"][1], again["refine_loss"][1]],
    }
    print(json.dumps(row), flush=True)
    return row


def median(rows: Sequence[dict[str, Any]], stage: str, processes: int, key: str = "seconds") -> float:
    return statistics.median(row[key] for row in rows if (row["stage"], row["processes"]) == (stage, processes))


def summary(rows: list[dict[str, Any]], kills: list[dict[str, Any]], processes: int) -> dict[str, Any]:
    """Return the figures that the bars are about."""
    speedups = {stage: median(rows, stage, 1) / median(rows, stage, processes) for stage in STAGES}
    quality = {
        count: statistics.mean(row["psnr"] for row in rows if row["stage"] == "eval" and row["processes"] == count)
        for count in (1, processes)
    }
    return {
        "speedup": speedups,
        "psnr": {str(count): value for count, value in quality.items()},
        "psnr_difference": quality[processes] - quality[1],
        "longest_end": max((row["seconds_to_end"] for row in kills), default=None),
        "met": all(value >= SPEEDUP for value in speedups.values())
        and abs(quality[processes] - quality[1]) <= DECIBELS
        and all(row["seconds_to_end"] <= SECONDS and row["code"] == 4 for row in kills),
    }


def render(found: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    count, rows = found["processes"], found["rows"]
    lines = [
        f"# {count} processes against one, digits-ddpm",
        "",
        f"`{found['command']}`: one thread a process, {found['cores']} cores, load average {found['load_average']:.1f} before.",
        "Seconds are medians over the seeds: of the work (the command less the same one with next to no samples and iterations),",
        "and of the whole command.",
        "",
        f"| stage | 1 process, s | {count} processes, s | speedup | bar | whole command, s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for stage in STAGES:
        whole = [median(rows, stage, each, "command_seconds") for each in (1, count)]
        lines.append(
            f"| {stage} | {median(rows, stage, 1):.1f} | {median(rows, stage, count):.1f} "
            f"| {found['speedup'][stage]:.2f}x | {SPEEDUP}x | {whole[0]:.1f}, {whole[1]:.1f} |"
        )
    lines += [
        "",
        f"PSNR to full precision, mean of {found['seeds']} seeds: {found['psnr']['1']:.2f} dB by one process, "
        f"{found['psnr'][str(count)]:.2f} dB by {count} (bar: {DECIBELS} dB apart).",
        "",
        "| seed | 1 process, dB | more, dB |",
        "| --- | --- | --- |",
    ]
    by_seed = {(row["seed"], row["processes"]): row["psnr"] for row in rows if row["stage"] == "eval"}
    lines += [
        f"| {seed} | {by_seed[seed, 1]:.2f} | {by_seed[seed, count]:.2f} |"
        for seed in sorted({key[0] for key in by_seed})
    ]
    if found["kills"]:
        lines += [
            "",
            f"Kills of a random process, after which the command ends (bar: {SECONDS:g} s) and goes on with another number:",
            "",
            "| killed after, s | ended in, s | code | went on with | last loss of the second pass: undisturbed, killed |",
            "| --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {row['after']:.0f} | {row['seconds_to_end']:.1f} | {row['code']} | {row['went_on_with']} "
            f"| {row['refine_loss'][0]:.3g}, {row['refine_loss'][1]:.3g} |"
            for row in found["kills"]
        ]
        lines += ["", f"The message: `{found['kills'][0]['message']}`"]
    lines += ["", f"The bars are {'met' if found['met'] else 'not all met'}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, write the results and print them. Exit with an error if a bar is missed."""
    from dqtool.artifacts.files import write_text
    from dqtool.artifacts.outputs import check_results

    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "scaling")
    parser.add_argument("--fast", action="store_true")
    given = parser.parse_args()
    if given.fast:
        OPTIONS.update(TRIED)
    path, table = (given.output.with_suffix(suffix) for suffix in (".json", ".md"))
    check_results(path, [table])
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="dqtool-scaling-") as folder:
        work = Path(folder)
        run("zoo", "get", "digits-ddpm", "-o", "model", cwd=work)
        run("dilate", "model", "-o", "dilated.safetensors", cwd=work)
        rows = [row for seed in range(given.seeds) for row in measure_seed(work, given.processes, seed)]
        drawn = random.Random(0)
        kills = [kill_once(work, given.processes, drawn, number) for number in range(given.kills)]
    found = {
        "format": FORMAT,
        "command": "make scaling",
        "cores": len(os.sched_getaffinity(0)),
        "load_average": load,
        "processes": given.processes,
        "seeds": given.seeds,
        **summary(rows, kills, given.processes),
        "rows": rows,
        "kills": kills,
    }
    write_text(path, json.dumps(found, indent=1) + "\n")
    write_text(table, render(found))
    print(render(found))
    if not found["met"]:
        raise SystemExit("a bar is not met")


if __name__ == "__main__":
    main()
