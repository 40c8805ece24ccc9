"""Load time and peak memory of one contender, each measured in a fresh process.

*Load* is the time of the call that loads the network, with libraries imported and files in the system's cache. *Ready*
adds the first step. *Peak memory* is the largest resident memory during loading and running, less the resident memory
after the imports. There are two figures: `peak_bytes` counts all pages, those of mapped weight files included (the
kernel's high-water mark); `private_bytes` leaves mapped files out, because the system can drop such pages and read them
again (sampled every few milliseconds).
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dqtool import errors, report
from dqtool.bench.alone import Alone, file_bytes, time_calls
from dqtool.bench.subject import Subject
from dqtool.core.device import choose_device
from dqtool.errors import DqtoolError, EnvironmentFault

__all__ = ["Probe", "alone", "prepare", "probe"]

SAMPLE_EVERY = 0.004
"""Seconds between two samples of private memory."""
STEPS = 3
"""Forward passes after the first one, so that buffers of later steps are measured as well."""


@dataclass(frozen=True)
class Probe:
    """Seconds to load, seconds until the end of the first step, and bytes at the peak (None if the system keeps no count)."""

    load: float
    ready: float
    peak_bytes: int | None
    private_bytes: int | None


def prepare(contender: str, subject: Subject) -> None:
    """Let the contender write its files in a fresh process, whose memory is freed when it ends."""
    _child({"action": "prepare", "contender": contender, "subject": subject.to_json()})


def probe(contender: str, subject: Subject, batch: int) -> Probe:
    """Measure a contender in a fresh process, after a first process has filled the caches (files, compiled graphs)."""
    request = {"action": "probe", "contender": contender, "subject": subject.to_json(), "batch": batch}
    _child(request)
    found, private = _child(request)
    base = found["private_baseline"]
    return Probe(
        found["load"],
        found["ready"],
        found["peak_bytes"],
        None if private is None or base is None else max(0, private - base),
    )


def alone(contender: str, subject: Subject, batch: int, seconds: float) -> Alone:
    """Time a contender in a fresh process that does nothing else."""
    from dqtool.bench.contenders import contender_of

    chosen = contender_of(contender)
    if chosen.measure is not None:
        return Alone(**chosen.measure(subject, batch, seconds))
    request = {
        "action": "time",
        "contender": contender,
        "subject": subject.to_json(),
        "batch": batch,
        "seconds": seconds,
    }
    path = Path(subject.directory) if chosen.file is None else chosen.file(subject)
    return Alone(**_child(request)[0], file_bytes=file_bytes(path))


def _child(request: dict[str, Any]) -> tuple[dict[str, Any], int | None]:
    """Return the answer of a fresh process, and its largest private memory after the imports, in bytes.

    Raises:
        DqtoolError: the process raised it.
        EnvironmentFault: the process died, for example for lack of memory.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as messages:
        return _run(request, messages)


def _run(request: dict[str, Any], messages: IO[str]) -> tuple[dict[str, Any], int | None]:
    command = [sys.executable, "-W", "ignore", "-m", "dqtool.bench.probe"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=messages, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(request))
        process.stdin.close()
        process.stdout.readline()  # the child prints a line when its imports are done
        samples = []
        while process.poll() is None:
            samples.append(memory_status(process.pid).get("private", 0))  # 0 in the instant of its end
            time.sleep(SAMPLE_EVERY)
        text = process.stdout.read()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    lines = text.splitlines()
    if not lines or process.returncode:
        messages.seek(0)
        said = [line.strip() for line in messages if line.strip()]
        raise EnvironmentFault(
            f"The process to {request['action']} '{request['contender']}' ended with code "
            f"{process.returncode}{': ' + said[-1][:300] if said else ''}",
            where="--runtime or --against",
            fix="Leave the contender out, or free memory: code -9 usually means that memory ran out",
        )
    answer = json.loads(lines[-1])
    if "error" in answer:
        kind = getattr(errors, answer["error"]["kind"])
        raise kind(answer["error"]["what"], where=answer["error"]["where"], fix=answer["error"]["fix"])
    return answer, max(samples, default=0) or None


def memory_status(pid: int | str = "self") -> dict[str, int]:
    """Return the memory of a process in bytes: `resident`, its high-water mark `peak`, and `private` (no mapped files).

    Entries are missing if the system does not count them.
    """
    keys = {"VmRSS": "resident", "VmHWM": "peak", "RssAnon": "private", "RssShmem": "shared"}
    found: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            key, _, value = line.partition(":")
            if key in keys:
                found[keys[key]] = int(value.split()[0]) * 1024
    if "private" in found:
        found["private"] += found.pop("shared", 0)
    return found


def main() -> int:
    """Run in the fresh process: read a request from standard input and print the answer as the last line."""
    request = json.load(sys.stdin)
    report.set_quiet(True)
    answer_to = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        try:
            result = answer(request, lambda: print("imported", file=answer_to, flush=True))
        except DqtoolError as e:
            result = {"error": {"kind": type(e).__name__, "what": e.what, "where": e.where, "fix": e.fix}}
    print(json.dumps(result), file=answer_to, flush=True)
    return 0


def answer(request: dict[str, Any], imported: Callable[[], object]) -> dict[str, Any]:
    """Serve a request in this process. `imported` is called when the libraries are imported."""
    from importlib import import_module

    from dqtool.bench.contenders import contender_of

    subject = Subject(**request["subject"])
    contender = contender_of(request["contender"])
    if request["action"] == "prepare":
        imported()
        if contender.prepare is not None:
            contender.prepare(subject)
        return {}
    import torch

    torch.set_num_threads(subject.threads)
    choose_device("cpu")
    for library in contender.libraries:
        import_module(library)
    if "diffusers" in contender.libraries:
        getattr(import_module("diffusers"), subject.diffusers_class)  # diffusers imports its classes on first use
    inputs = subject.inputs(request["batch"])
    before = memory_status()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    imported()
    start = time.perf_counter()
    loaded = contender.load(subject)
    if request["action"] == "time":
        figures = time_calls(loaded, inputs, request["seconds"])
        return {**figures, "peak_bytes": _peak(before)}
    load = time.perf_counter() - start
    adapted = [loaded.adapt(arguments) for arguments in inputs]
    loaded.run(adapted[0])
    ready = time.perf_counter() - start
    for number in range(STEPS):
        loaded.run(adapted[number % len(adapted)])
    return {"load": load, "ready": ready, "peak_bytes": _peak(before), "private_baseline": before.get("private")}


def _peak(before: dict[str, int]) -> int | None:
    """Return the largest resident memory since, above the resident memory then; None if the system keeps no count."""
    after = memory_status()
    return after["peak"] - before["resident"] if "peak" in after and "resident" in before else None


if __name__ == "__main__":
    sys.exit(main())
