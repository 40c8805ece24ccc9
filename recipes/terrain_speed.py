"""Time a step of the terrain model: exported, as float32 in onnxruntime and in PyTorch, with a free machine and with a busy core.

    make terrain-speed                   quantizes the model without training and times it
    python recipes/terrain_speed.py --export DIR --rounds 5

Each contender is a process of its own that waits while the others run. They take turns; a contender's time is the median
over the rounds of the median of a turn, at batch 1. The busy core runs an endless loop. The script writes
recipes/results/terrain-speed-SET.md and .json; SET is the instruction set of the integer kernels, as in `bench_pipeline.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
OURS, ONNX, TORCH = "dqtool", "onnxruntime float32", "PyTorch float32"
BARS = {"faster": 1.5, "busy": 2.2}
"""Times faster than onnxruntime's float32 that a 4/4 step should be, and times slower that a busy core may make it."""
SECONDS, PAUSE = 3.0, 0.5
"""Length of a turn, and of the pause before it, in which the threads of the last one fall asleep."""


def main() -> None:
    """Quantize where that is to do, time all contenders, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("results/terrain-speed"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--bits", nargs="+", default=["4/4", "8/8"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.serve[0], int(given.serve[1]), given.work)
        return
    from dqtool.artifacts.outputs import check_results
    from dqtool.runtimes.cpu.library import instruction_sets

    stem = given.results / f"terrain-speed-{instruction_sets()[0]}"
    check_results(stem.with_suffix(".json"), [stem.with_suffix(".md")])
    for bits in given.bits:
        export(bits, given.work)
    found = []
    for threads in given.threads:
        found += measure(threads, given)
        write(found, stem)


def export(bits: str, work: Path) -> None:
    """Quantize the terrain model without training; finished stages are cached."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "model").is_dir():
        from terrain_model import find_graph, write_pipeline

        write_pipeline(find_graph(), work / "model")
    output = directory_of(bits, work)
    command = [
        sys.executable,
        "-m",
        "dqtool",
        "quantize",
        work / "model",
        "-o",
        output,
        "--effort",
        "fast",
        "--bits",
        bits,
    ]
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)


def directory_of(bits: str, work: Path) -> Path:
    """Return the directory of the export."""
    return work / f"w{bits.replace('/', 'a')}"


def measure(threads: int, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each contender: seconds of a step with a free machine and with a busy core."""
    names = [*(f"{OURS} {bits}" for bits in given.bits), ONNX, TORCH]
    started = {name: start(name, threads, given.work) for name in names}
    times: dict[str, dict[str, list[float]]] = {name: {"free": [], "busy": []} for name in names}
    engines = {name: ask(process) for name, process in started.items()}
    for _ in range(given.rounds):
        for state in ("free", "busy"):
            with busy_core() if state == "busy" else contextlib.nullcontext():
                for name, process in started.items():
                    time.sleep(PAUSE)
                    times[name][state].append(float(ask(process, "go")))
    for process in started.values():
        ask(process, "end")
    return [
        {
            "threads": threads,
            "contender": name,
            "engine": engines[name],
            **{state: statistics.median(each) for state, each in times[name].items()},
            "turns": times[name],
        }
        for name in names
    ]


def start(name: str, threads: int, work: Path) -> subprocess.Popen[str]:
    """Start the process of a contender."""
    command = [sys.executable, __file__, "--serve", name, str(threads), "--work", str(work)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def ask(process: subprocess.Popen[str], word: str | None = None) -> str:
    """Send a word to a contender and return its answer; without a word, return what it says first."""
    assert process.stdin is not None
    assert process.stdout is not None
    if word is not None:
        process.stdin.write(word + "\n")
        process.stdin.flush()
    answer = process.stdout.readline().strip()
    if not answer:
        raise SystemExit("A contender ended without an answer; its error stands above")
    return answer


@contextlib.contextmanager
def busy_core() -> Iterator[None]:
    """Keep the first core busy."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    os.sched_setaffinity(process.pid, {min(os.sched_getaffinity(0))})
    try:
        yield
    finally:
        process.kill()
        process.wait()


def serve(name: str, threads: int, work: Path) -> None:
    """Load a contender, say its engine, and answer each line with the median seconds of a step."""
    import torch

    torch.set_num_threads(threads)
    with torch.inference_mode():
        step, engine = prepared(name, threads, work)
        for _ in range(3):
            step()
        print(engine, flush=True)
        for line in sys.stdin:
            if line.strip() == "end":
                print("end", flush=True)
                return
            taken: list[float] = []
            until = time.perf_counter() + SECONDS
            while time.perf_counter() < until or len(taken) < 3:
                begin = time.perf_counter()
                step()
                taken.append(time.perf_counter() - begin)
            print(statistics.median(taken), flush=True)


def prepared(name: str, threads: int, work: Path) -> tuple[Callable[[], Any], str]:
    """Return a function that runs one step at batch 1, and the name of what runs it."""
    import torch

    if name == ONNX:
        import onnxruntime
        from terrain_model import find_graph
        from terrain_peers import inputs_of

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(str(find_graph()), options, providers=["CPUExecutionProvider"])
        given = inputs_of(torch.randn(1, 1, 128, 128), torch.tensor([50]))
        return lambda: session.run(None, given), f"onnxruntime {onnxruntime.__version__}"
    x, timestep, label = torch.randn(1, 1, 128, 128), torch.tensor(1.0), torch.tensor([50])
    if name == TORCH:
        from diffusers import UNet2DModel

        network = UNet2DModel.from_pretrained(work / "model" / "unet").eval().to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
        return lambda: network(x, timestep, class_labels=label), f"PyTorch {torch.__version__}, channels-last"
    from dqtool.stages.evaluation.engines import run_exported

    exported: Any = run_exported(str(directory_of(name.removeprefix(f"{OURS} "), work)), "auto", 1)
    timestep = calibrated_timestep(name, work)
    return lambda: exported(x, timestep, class_labels=label), exported.runtime


def calibrated_timestep(name: str, work: Path) -> Any:
    """Return the first timestep that the export was calibrated at."""

    from dqtool.artifacts import open_artifact
    from dqtool.stages.evaluation.images import maker_of_artifact

    work_files = Path(f"{directory_of(name.removeprefix(f'{OURS} '), work)}.work")
    artifact = open_artifact(str(work_files / "calibrated.safetensors"), ["calibrate"])
    return maker_of_artifact(artifact, 1, 0).sampler.timesteps()[0].detach().clone()


def write(found: list[dict[str, Any]], stem: Path) -> None:
    """Write the rows as JSON and as a table."""
    from dqtool.bench.machine import describe_machine

    machine = describe_machine(max(row["threads"] for row in found)).to_json()
    base = {row["threads"]: row["free"] for row in found if row["contender"] == ONNX}
    title = f"Terrain: time of a step at batch 1, {stem.name.rsplit('-', 1)[1].upper()}"
    content = {
        "format": "dqtool-result/1",
        "title": title,
        "command": "make terrain-speed",
        "machine": machine,
        "rows": found,
    }
    stem.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    lines = [
        f"# {title}",
        "",
        f"`make terrain-speed`, {machine['processor']}. Contenders take turns. *Busy* is with an endless loop on one of the cores.",
        f"Bars: 4/4 at least {BARS['faster']}x faster than onnxruntime's float32, and at most {BARS['busy']}x slower with a busy core.",
        "",
        "| threads | contender | engine | step, ms | faster than onnxruntime float32 | busy, ms | slower when busy |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in found:
        free, busy = 1000 * row["free"], 1000 * row["busy"]
        cells = [str(row["threads"]), row["contender"], row["engine"], f"{free:.1f}"]
        cells += [f"{base[row['threads']] / row['free']:.2f}x", f"{busy:.1f}", f"{busy / free:.2f}x"]
        lines.append(f"| {' | '.join(cells)} |")
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
