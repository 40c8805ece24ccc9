"""Compare memory and time of `dqtool dilate` on a file of full size with reading and writing it by safetensors.

    python recipes/dilate_cost.py [NAME [RUNS]]

The script writes recipes/results/dilate-NAME.md and .json (default sd14: 3.4 GB). Each run is a fresh process. Times are the
best of RUNS (default 3), taken in turns; memory is the largest. Memory counts anonymous pages, so mapped files are left
out. The level after imports is that of a process which has imported what dilate imports.

Times are compared twice: without imports, and as whole processes. The copy's time without imports starts after its imports;
dilate's is that of its process less that of a process that only imports. Both comparisons must keep within the limit.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from full_size import FORMAT, RESULTS, stage, written_model

IMPORTS = """
import sys
from dqtool.stages.shared.running import set_up_torch
set_up_torch("cpu")
import accelerate, diffusers, safetensors.torch
import dqtool.stages.dilate, dqtool.scaling.folding, dqtool.scaling.dilating, dqtool.scaling.verifying, dqtool.graph.trace
from dqtool.models.families import family_of
family_of(sys.argv[1], "imports")
getattr(diffusers, sys.argv[1])
"""
LEVEL = IMPORTS + "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('RssAnon')][0])\n"
COPY = """
import sys, time
from safetensors.torch import load_file, save_file
import os
start = time.perf_counter()
save_file(load_file(sys.argv[1]), sys.argv[2], metadata={"format": "pt"})
with open(sys.argv[2], "rb+") as written:
    os.fsync(written.fileno())
print(time.perf_counter() - start, time.process_time())
"""
MOST_MEMORY, MOST_TIME = 1.3, 5.0


def printed(code: str, *arguments: str) -> list[float]:
    """Run Python code in a fresh process and return the numbers that it prints."""
    command = [sys.executable, "-c", code, *arguments]
    return [float(word) for word in subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()]


def processor_seconds() -> float:
    """Return the processor seconds of all finished child processes."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(name: str, runs: int) -> dict:
    """Measure one architecture and return its figures."""
    from dqtool.artifacts import read_manifest
    from dqtool.models.architectures import architecture

    class_name = architecture(name).class_name
    with tempfile.TemporaryDirectory(prefix="dqtool-dilate-") as folder:
        work = Path(folder)
        written_model(name, work / "model")
        weights = work / "model" / "diffusion_pytorch_model.safetensors"
        size = weights.stat().st_size
        level = printed(LEVEL, class_name)[0] * 1024
        imports, copies, copiers, seconds, peaks, copying, dilating, loads = [], [], [], [], [], [], [], []
        for _ in range(runs):
            loads.append(os.getloadavg()[0])
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", IMPORTS, class_name], check=True)
            imports.append(time.perf_counter() - start)
            start = time.perf_counter()
            took, used = printed(COPY, str(weights), str(work / "copy.safetensors"))
            copiers.append(time.perf_counter() - start)
            copies.append(took)
            copying.append(used)
            (work / "copy.safetensors").unlink()
            before = processor_seconds()
            took, peak = stage("dilate", "model", "--scaling", "wd", "--force", cwd=work)
            dilating.append(processor_seconds() - before)
            seconds.append(took)
            peaks.append(peak * 1e9)
        inside = read_manifest(str(work / "dilated.safetensors")).seconds
    memory, ratio = max(peaks) - level, min(seconds) / min(copies)
    after = min(seconds) - min(imports)
    return {
        "file_bytes": size,
        "copy_seconds": [round(each, 2) for each in copies],
        "copy_process_seconds": [round(each, 2) for each in copiers],
        "dilate_seconds": [round(each, 2) for each in seconds],
        "copy_processor_seconds": [round(each, 2) for each in copying],
        "dilate_processor_seconds": [round(each, 2) for each in dilating],
        "stage_seconds": inside,
        "import_seconds": [round(each, 2) for each in imports],
        "bytes_after_imports": int(level),
        "peak_bytes": int(max(peaks)),
        "memory_ratio": round(memory / size, 3),
        "time_ratio": round(ratio, 2),
        "time_ratio_of_processes": round(min(seconds) / min(copiers), 2),
        "time_ratio_after_imports": round(after / min(copies), 2),
        "processor_time_ratio": round(min(dilating) / min(copying), 2),
        "met": memory <= MOST_MEMORY * size
        and after <= MOST_TIME * min(copies)
        and min(seconds) <= MOST_TIME * min(copiers),
        "load_average": round(max(loads), 1),
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS") or os.cpu_count(),
    }


def _met(ratio: float) -> str:
    return f"{'met' if ratio <= MOST_TIME else 'not met'} ({ratio:.2f}x)"


def render(name: str, row: dict) -> str:
    """Return the table as Markdown."""
    lines = [
        f"# `dqtool dilate` on {name}, random weights",
        "",
        f"`python recipes/dilate_cost.py {name}` ({row['threads']} thread(s)). Memory is anonymous pages above the level",
        f"after imports; times are the best of {len(row['dilate_seconds'])} runs taken in turn, at a load average of "
        f"{row['load_average']:.1f} on {row['cores']} cores.",
        "The copy's time is from its first read to its last byte on disk. dilate's time without imports is that of its process",
        "less that of a process that only imports.",
        "",
        f"The bar for the time is {_met(row['time_ratio_after_imports'])} without imports and "
        f"{_met(row['time_ratio_of_processes'])} for whole processes;",
        f"dilate's whole process takes {row['time_ratio']:.2f}x the copy without its imports.",
        "",
        "| | dilate | bar |",
        "| --- | --- | --- |",
        f"| weights file | {row['file_bytes'] / 1e9:.2f} GB | |",
        f"| level after imports | {row['bytes_after_imports'] / 1e6:.0f} MB | |",
        f"| peak above it | {(row['peak_bytes'] - row['bytes_after_imports']) / 1e9:.2f} GB"
        f" ({row['memory_ratio']:.2f}x the file) | {MOST_MEMORY}x |",
        f"| read and written with safetensors | {min(row['copy_seconds']):.1f} s | |",
        f"| the same, whole process | {min(row['copy_process_seconds']):.1f} s | |",
        f"| time, whole process | {min(row['dilate_seconds']):.1f} s ({row['time_ratio']:.2f}x) | {MOST_TIME}x |",
        f"| imports alone | {min(row['import_seconds']):.1f} s | |",
        f"| time without them | {min(row['dilate_seconds']) - min(row['import_seconds']):.1f} s "
        f"({row['time_ratio_after_imports']:.2f}x) | {MOST_TIME}x |",
        f"| processor time | {min(row['dilate_processor_seconds']):.1f} s, copy {min(row['copy_processor_seconds']):.1f} s"
        f" ({row['processor_time_ratio']:.2f}x) | |",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, write the results and print them. Exit with an error if a limit is exceeded."""
    from dqtool.artifacts.files import write_text
    from dqtool.artifacts.outputs import check_results

    name = sys.argv[1] if len(sys.argv) > 1 else "sd14"
    path = RESULTS / f"dilate-{name}.json"
    table = path.with_suffix(".md")
    check_results(path, [table])
    row = measure(name, int(sys.argv[2]) if len(sys.argv) > 2 else 3)
    write_text(path, json.dumps({"format": FORMAT, **row}, indent=1) + "\n")
    write_text(table, render(name, row))
    print(render(name, row))
    if not row["met"]:
        raise SystemExit("a bar is not met")


if __name__ == "__main__":
    main()
