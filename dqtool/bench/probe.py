"""Load time and peak memory of one contender, each measured in a fresh process.

*Load* runs from the call that loads the network to its return, with libraries imported and files in the system's cache;
*ready* until the first step is done as well. *Peak memory* is the most that was resident while loading and running, less
what was resident after the imports. Two figures: `peak_bytes` counts all pages (the kernel's own high-water mark), those of
mapped weight files included; `private_bytes` leaves mapped files out, since the system can drop such pages and read
them again (sampled every few milliseconds).
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
from dqtool.bench.subject import Subject
from dqtool.errors import DqtoolError, EnvironmentFault

__all__ = ["Probe", "prepare", "probe"]

SAMPLE_EVERY = 0.004
STEPS = 3
"""Forward passes after the first one: buffers of later steps count as well."""


@dataclass(frozen=True)
class Probe:
    """Seconds to load, seconds until the first step was done, bytes at the peak (None where the system doesn't tell)."""

    load: float
    ready: float
    peak_bytes: int | None
    private_bytes: int | None


def prepare(contender: str, subject: Subject) -> None:
    """Let the contender write its files, in a process of its own, so that nothing of it stays in this one's memory."""
    _child({"action": "prepare", "contender": contender, "subject": subject.to_json()})


def probe(contender: str, subject: Subject, batch: int) -> Probe:
    """Measure a contender. A first process fills the caches (files, compiled graphs); the second one counts."""
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


def _child(request: dict[str, Any]) -> tuple[dict[str, Any], int | None]:
    """The answer of a fresh process, and the most private memory it was seen with once it had imported everything.

    Raises:
        DqtoolError: what the process raised.
        EnvironmentFault: it died, for example for lack of memory.
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
        process.stdout.readline()  # the imports are done
        samples = []
        while process.poll() is None:
            samples.append(status(process.pid).get("private", 0))  # 0 in the instant of its end
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
            f"The process that was to {request['action']} '{request['contender']}' ended with code "
            f"{process.returncode}{': ' + said[-1][:300] if said else ''}",
            where="--runtime or --against",
            fix="Leave it out, or make room: code -9 usually means that memory ran out",
        )
    answer = json.loads(lines[-1])
    if "error" in answer:
        kind = getattr(errors, answer["error"]["kind"])
        raise kind(answer["error"]["what"], where=answer["error"]["where"], fix=answer["error"]["fix"])
    return answer, max(samples, default=0) or None


def status(pid: int | str = "self") -> dict[str, int]:
    """Bytes of a process's memory: `resident`, its high-water mark `peak`, and `private` (no mapped files); empty where
    the system has no such account."""
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
    """In the fresh process: do what standard input asks for, answer with the last line of standard output."""
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
    """Do what the request asks for in this process; `imported` is called when the libraries are there."""
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
    for library in contender.libraries:
        import_module(library)
    if "diffusers" in contender.libraries:
        getattr(import_module("diffusers"), subject.class_name)  # imported lazily
    inputs = subject.inputs(request["batch"])
    before = status()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    imported()
    start = time.perf_counter()
    loaded = contender.load(subject)
    load = time.perf_counter() - start
    adapted = [loaded.adapt(arguments) for arguments in inputs]
    loaded.run(adapted[0])
    ready = time.perf_counter() - start
    for number in range(STEPS):
        loaded.run(adapted[number % len(adapted)])
    after = status()
    peak = after["peak"] - before["resident"] if "peak" in after and "resident" in before else None
    return {"load": load, "ready": ready, "peak_bytes": peak, "private_baseline": before.get("private")}


if __name__ == "__main__":
    sys.exit(main())
