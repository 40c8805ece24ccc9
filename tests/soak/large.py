"""Kill calibrate, distill and eval of a full-size network, and measure how much work each kill costs.

    python tests/soak/large.py --arch sd14 --kills 3 -o recipes/results/soak-large

The network has random weights of a published architecture (`tiny`: a model of 8x8 pixels), one block of it is trained. The
second pass and the correction of predictions run on latents of 8x8, since they sample dozens of images: calls are shorter, and
all else is the same. Errors of operands are measured on `tiny` alone, since those of Stable Diffusion take 17 GB.

Each stage runs once undisturbed; then attempts are killed at random instants until one is through. It must come to the same
bits, and at most a minute of processor time may lie between a kill and the last piece that the killed run saved: with one
thread that is a minute of an idle machine, however crowded this one is. `--at-once` saves after every call and iteration,
so that small networks are killed between two pieces too.

Stable Diffusion v1.4 needs 16 GB of disk and memory, and an hour on two cores. Writes NAME.json and NAME.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from kills import digest, leftovers, pieces, preload, start, wait

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

LIMIT = 60.0
"""Processor seconds of work that a kill may cost."""
TICKS = os.sysconf("SC_CLK_TCK")
BLOCKS = {"dit-xl2": r"transformer_blocks\.0"}
BLOCK = r"down_blocks\.0\.resnets\.0"
OUTPUTS = {
    "calibrate": "calibrated.safetensors",
    "distill": "distilled.safetensors",
    "second pass": "refined.safetensors",
    "branches": "branched.safetensors",
    "eval": "eval.json",
}
"""Output of each stage; `eval` reads that of `distill`."""


def stages(arch: str) -> dict[str, tuple[str, ...]]:
    """Return the arguments of each stage, without its output."""
    conditions = () if arch == "tiny" else ("--random-conditions",)
    size = ("--steps", "4", "--samples", "16") if arch == "tiny" else ("--steps", "2", "--samples", "2")
    untrained = ("--refine-iters", "0", "--no-correct-noise")
    block = BLOCKS.get(arch, BLOCK)
    # Choosing factors for two hundred layers takes most of the time, and is saved layer by layer.
    scaling = ("--scaling", "auto" if arch == "tiny" else "keep")
    images = "8" if arch == "tiny" else "1"
    return {
        "calibrate": ("calibrate", "dilated.safetensors", *size, "--batch-size", "4", *scaling, *conditions),
        "distill": (
            *("distill", "calibrated.safetensors", "--blocks", block),
            *("--iters", "40" if arch == "tiny" else "8", *untrained),
        ),
        "second pass": ("distill", "small.safetensors", "--blocks", block, "--iters", "0", "--refine-iters", "2"),
        "branches": (
            *("distill", "small.safetensors", "--iters", "0", *untrained, "--low-rank", "16"),
            *(("--protect", "30") if arch == "tiny" else ()),
        ),
        "eval": (
            *("eval", "distilled.safetensors", "--samples", images, "--metrics", "similarity", "--reference", "model"),
            *("--batch-size", "4"),
        ),
    }


def save_at_once() -> None:
    """Make the command of this process save after every call and iteration."""
    from dqtool.artifacts import checkpoints
    from dqtool.training.data import DistillationTask

    checkpoints.EVERY = 0.0
    made = DistillationTask.__init__

    def init(self: DistillationTask, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        self.checkpoint_seconds = 0.0

    DistillationTask.__init__ = init  # type: ignore[method-assign]


def last_save(output: Path) -> float:
    """Return when the unfinished run of an output last saved a piece, as `time.time` counts; 0 where it never did."""
    try:
        return (output.with_name(f".{output.name}.partial") / "index.json").stat().st_mtime
    except OSError:
        return 0.0


def processor_seconds(child: int) -> float:
    """Return the processor time that a child has used so far."""
    fields = Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def wait_and_watch(child: int, seconds: float, output: Path) -> tuple[int | None, float]:
    """Wait for a child, `seconds` at most; return its exit code as `wait` does, and its processor time at its last save."""
    saved, seen, end = 0.0, last_save(output), time.monotonic() + seconds
    while time.monotonic() < end:
        code = wait(child, 0.05)
        if code is not None:
            return code, saved
        if (now := last_save(output)) != seen:
            saved, seen = processor_seconds(child), now
    return None, saved


def prepare(arch: str, home: Path) -> None:
    """Write the model and its dilated artifact."""
    if arch == "tiny":
        from helpers import tiny_pipeline

        tiny_pipeline(home / "model")
    else:
        from full_size import written_model

        written_model(arch, home / "model")
    made = [("dilate", "model", "-o", "dilated.safetensors")]
    if arch == "tiny":
        calibrate = stages(arch)["calibrate"]
    else:
        with_latents_of_8x8(home / "model", home / "small")
        made.append(("dilate", "small", "-o", "small-dilated.safetensors"))
        calibrate = ("calibrate", "small-dilated.safetensors", *stages(arch)["calibrate"][2:])
    for arguments in (*made, (*calibrate, "-o", "small.safetensors")):
        code = wait(start(arguments, home))
        if code != 0:
            raise SystemExit(f"{arguments[0]} failed with {code}: {(home.parent / 'log.txt').read_text()[-500:]}")


def with_latents_of_8x8(model: Path, copy: Path) -> None:
    """Write a copy of a component directory whose network takes samples of 8x8; both share the weights' files."""
    shutil.copytree(model, copy, copy_function=os.link)
    config = json.loads((model / "config.json").read_text())
    (copy / "config.json").unlink()
    (copy / "config.json").write_text(json.dumps({**config, "sample_size": 8}))


def killed(
    home: Path, arguments: tuple[str, ...], output: str, kills: int, draw: random.Random, hook: Any
) -> dict[str, Any]:
    """Run one stage undisturbed and then with kills; return what was measured."""
    begin = time.monotonic()
    code = wait(start((*arguments, "-o", f"golden/{output}"), home))
    undisturbed, golden = time.monotonic() - begin, digest(home / "golden" / output)
    assert code == 0 and golden not in (None, "half"), (home.parent / "log.txt").read_text()[-500:]
    shutil.rmtree(Path(os.environ["DQTOOL_CACHE"]) / "errors", ignore_errors=True)  # measured again, and killed there
    row: dict[str, Any] = {
        "undisturbed": undisturbed,
        "kills": 0,
        "lost": 0.0,
        "before the first save": 0.0,
        "faults": [],
    }
    target, begin, kept = home / output, time.monotonic(), 0
    for attempt in range(kills):
        child = start((*arguments, "-o", output), home, hook)
        latest = 0.8 if attempt else 0.4  # the first kill comes before the end of a run that is twice as fast
        code, saved = wait_and_watch(child, undisturbed * (0.2 + latest * draw.random()), target)
        if code is not None:
            break
        used = processor_seconds(child)
        os.kill(child, signal.SIGKILL)
        wait(child)
        row["kills"] += 1
        key = "lost" if saved else "before the first save"
        row[key] = max(row[key], used - saved)
        if pieces(target) < kept:
            row["faults"].append(f"{kept} pieces became {pieces(target)}")
        kept = pieces(target)
        row["pieces"] = kept
        if digest(target) not in (None, golden):
            row["faults"].append("a wrong output after a kill")
    code = wait(start((*arguments, "-o", output), home, hook))
    row["with kills"] = time.monotonic() - begin
    if code != 0 or digest(target) != golden:
        row["faults"].append(f"code {code}, or another output than undisturbed")
    for when in ("lost", "before the first save"):
        if row[when] > LIMIT:
            row["faults"].append(f"{row[when]:.0f} s of work lost ({when})")
    if left := leftovers(home):
        row["faults"].append(f"left {left}")
    return row


def main() -> int:
    """Measure every stage, write the report; return 1 where a check failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--arch", default="sd14")
    parser.add_argument("--kills", type=int, default=3, help="of each stage, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-once", action="store_true")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DQTOOL_CACHE"] = str(Path(folder) / "cache")
        home = Path(folder) / "home"
        (home / "golden").mkdir(parents=True)
        preload()
        prepare(options.arch, home)
        hook = save_at_once if options.at_once else lambda: None
        draw = random.Random(options.seed)
        for name, arguments in stages(options.arch).items():
            rows[name] = killed(home, arguments, OUTPUTS[name], options.kills, draw, hook)
            print(name, rows[name], flush=True)
    faults = [f"{name}: {fault}" for name, row in rows.items() for fault in row["faults"]]
    if options.output is not None:
        about = {"command": f"python {' '.join(sys.argv)}", "limit": LIMIT, "stages": rows, "faults": faults}
        options.output.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")
        heads = ("undisturbed", "with kills", "kills", "lost", "before the first save")
        lines = [
            *("# Kills of a full-size network", "", f"`{about['command']}`: seconds, {len(faults)} faults.", ""),
            *(f"| stage | {' | '.join(heads)} |", "| --- |" + " ---: |" * len(heads)),
            *(f"| {name} | {' | '.join(f'{row[head]:.4g}' for head in heads)} |" for name, row in rows.items()),
        ]
        options.output.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print(faults or "no faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
