"""Kill commands at random instants and check what dqtool promises about that.

    python tests/soak/kills.py --kills 2000 --models tiny,digits-ddpm -o recipes/results/soak

A server imports the libraries once and forks a child for each command, so that a run costs its work and no imports. Each
episode picks a model, a stage and a disturbance, kills attempts at random instants, lets the last one finish, and checks:

- an output whose manifest is valid has exactly the bits of an undisturbed run, at every instant (a reader looks all the time);
- nothing is left beside the output once a run has finished;
- finished pieces never get fewer from one attempt to the next, unless the attempt wrote the output: a kill costs the unit at
  hand at most;
- exit codes are those promised: 143 after SIGTERM, 130 after SIGINT, 4 where the surroundings are in the way.

Writes NAME.json and NAME.md with the counts, and exits with 1 where a check failed. With `--resume` the counts of an earlier
run are carried on, with other random numbers, until there are `--kills` in all.
"""

from __future__ import annotations

import argparse
import hashlib
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

STAGES = {
    "dilate": ("dilate", "{model}"),
    "calibrate": ("calibrate", "--steps", "4", "--samples", "32"),
    "distill": ("distill", "--iters", "3", "--refine-iters", "3"),
    "export": ("export",),
    "eval": ("eval", "--samples", "16"),
}
OUTPUTS = {
    "dilate": "dilated.safetensors",
    "calibrate": "calibrated.safetensors",
    "distill": "distilled.safetensors",
    "export": "exported",
    "eval": "eval.json",
    "run": "results/distilled.safetensors",
}
RECIPE = """model: {model}
stages:
  dilate: {{}}
  calibrate: {{steps: 4, samples: 32}}
  distill: {{iters: 3, refine-iters: 3}}
"""
DISTURBANCES = ("kill",) * 12
DISTURBANCES += ("force", "terminate", "terminate", "interrupt", "writers", "vanish", "full", "small", "fixed", "past")
UNTIMED = ("seconds", "training_seconds", "training_cpu_seconds", "earlier_seconds")


@dataclass
class Counts:
    """Numbers of the report, and what went wrong."""

    numbers: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    @property
    def signals(self) -> int:
        """Number of signals sent."""
        return sum(value for name, value in self.numbers.items() if name.startswith("signals: "))

    def check(self, right: bool, what: str) -> None:
        """Record a fault unless `right`."""
        if not right:
            self.faults.append(what)
            print(f"FAULT {what}", flush=True)


@dataclass
class Stage:
    """A command in a directory of its own, with the output of an undisturbed run."""

    name: str
    model: str
    arguments: tuple[str, ...]
    output: str
    seconds: float = 0.0
    golden: str = ""


def preload() -> None:
    """Import everything that the commands need, before anything is forked."""
    import dqtool.__main__  # noqa: F401, I001
    import diffusers  # noqa: F401
    import torch

    from dqtool.models.families import FAMILIES, family_of

    torch.set_num_threads(1)
    for name in FAMILIES:
        family_of(name, "preload")
    for module in ("calibrate", "dilate", "distill", "eval", "export", "run"):
        __import__(f"dqtool.stages.{module}")
    for module in ("training.on_policy", "training.bkd", "training.prediction", "metrics.digits", "runtimes.simulate"):
        __import__(f"dqtool.{module}")


def start(arguments: Sequence[str], directory: Path, prepare: Callable[[], None] = lambda: None) -> int:
    """Fork a child that runs `dqtool ARGUMENTS` in `directory`; return its process id. Its messages go to `log.txt`."""
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        os.chdir(directory)
        log = os.open(directory.parent / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.argv = ["dqtool", *arguments]
        prepare()
        from dqtool.__main__ import main

        code = main()
        sys.stdout.flush()
        os._exit(code)
    except BaseException as error:
        os.write(2, f"escaped: {error!r}\n".encode())
        os._exit(99)


def wait(child: int, seconds: float | None = None) -> int | None:
    """Wait for a child; return its exit code, minus the signal that ended it, or None where `seconds` were not enough."""
    end = None if seconds is None else time.monotonic() + seconds
    while True:
        found, status = os.waitpid(child, 0 if end is None else os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        assert end is not None
        if time.monotonic() >= end:
            return None
        time.sleep(0.002)


def digest(path: Path) -> str | None:
    """Return the digest of an output by what a reader may trust of it; None where there is no valid one.

    Raises an error that is no `DqtoolError` where reading one fails in another way than promised.
    """
    from dqtool.artifacts import open_artifact
    from dqtool.artifacts.manifest import Manifest
    from dqtool.errors import DqtoolError

    if path.suffix == ".json":
        try:
            report = Manifest.from_json(path.read_text(encoding="utf-8"), str(path))
        except (OSError, DqtoolError):
            return None
        return hashlib.sha256(json.dumps(strip(report.metrics.to_json()), sort_keys=True).encode()).hexdigest()
    try:
        artifact = open_artifact(str(path))
        manifest = artifact.manifest
        if path.is_dir():
            found = {n: hashlib.sha256((path / n).read_bytes()).hexdigest() for n in sorted(manifest.files or {})}
            recorded = {name: entry.sha256 for name, entry in (manifest.files or {}).items()}
        else:
            found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}
            assert manifest.file is not None
            recorded = {path.name: manifest.file.sha256}
    except (DqtoolError, OSError):
        return None
    if found != recorded and digest_again(path, found):
        return "half"
    return hashlib.sha256(
        json.dumps([recorded, strip(manifest.metrics.to_json())], sort_keys=True).encode()
    ).hexdigest()


def digest_again(path: Path, found: dict[str, str]) -> bool:
    """Return whether the output still has the bytes `found`: it was not replaced while it was read."""
    try:
        again = {n: hashlib.sha256((path / n if path.is_dir() else path).read_bytes()).hexdigest() for n in found}
    except OSError:
        return False
    return again == found


def strip(value: object) -> object:
    """Return a manifest's metrics without times and memory, which differ from run to run."""
    if isinstance(value, dict):
        return {
            key: strip(entry)
            for key, entry in value.items()
            if not key.endswith(("seconds", "share")) and "peak" not in key and key not in UNTIMED
        }
    return [strip(each) for each in value] if isinstance(value, list) else value


def pieces(output: Path) -> int:
    """Return how many finished pieces an unfinished run has kept."""
    try:
        index = json.loads((output.with_name(f".{output.name}.partial") / "index.json").read_text())
        return len(index["pieces"])
    except (OSError, ValueError):
        return 0


def identity(output: Path) -> tuple[int, int] | None:
    """Return what changes when an output is replaced; None without one."""
    try:
        about = output.stat()
    except OSError:
        return None
    return about.st_ino, about.st_mtime_ns


def leftovers(directory: Path) -> list[str]:
    """Return names that a finished run must not leave."""
    return [path.name for path in directory.rglob(".*")]


def read_forever(path: Path, golden: Sequence[str], tally: Path) -> None:
    """Look at an output again and again until killed; count in `tally` what was seen that must not be.

    It sleeps nine times as long as a look takes, so that it leaves the processor to the command it watches.
    """
    reads = wrong = 0
    while True:
        begin = time.monotonic()
        found = digest(path)
        took = time.monotonic() - begin
        reads += 1
        wrong += found is not None and found not in golden
        tally.with_suffix(".new").write_text(f"{reads} {wrong}")
        os.replace(tally.with_suffix(".new"), tally)
        time.sleep(9 * took + 0.001)


def mount(*command: str | Path) -> bool:
    """Run a `mount` or `umount` command; return whether it was allowed."""
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def size_of(folder: Path) -> int:
    """Return how many bytes the files of a folder occupy, in whole pages."""
    return sum(4096 * (1 + path.stat().st_size // 4096) for path in folder.rglob("*"))


class Soak:
    """All episodes of one run."""

    def __init__(self, work: Path, models: Sequence[str], seed: int, counts: Counts) -> None:
        self.work = work
        self.random = random.Random(seed)
        self.counts = counts
        self.stages: list[Stage] = []
        self.inputs: dict[str, Path] = {}
        for model in models:
            self._make_golden(model)

    def _make_golden(self, model: str) -> None:
        """Run every stage undisturbed, twice: the first run warms caches, the second one is timed."""
        home = self.work / f"golden-{model}"
        home.mkdir()
        if model == "tiny":
            from helpers import tiny_pipeline

            tiny_pipeline(home / "tiny")
            given = "tiny"
        else:
            given = f"zoo:{model}"
        (home / "recipe.yaml").write_text(RECIPE.format(model=given))
        for name in (*STAGES, "run"):
            arguments = ("run", "recipe.yaml", "-o", "results") if name == "run" else STAGES[name]
            arguments = tuple(each.format(model=given) for each in arguments)
            output = OUTPUTS[name]
            for _ in range(2):
                begin = time.monotonic()
                code = wait(start((*arguments, "--force"), home))
                if code != 0:
                    raise SystemExit(f"{arguments} failed with {code}: {(self.work / 'log.txt').read_text()}")
            seconds = time.monotonic() - begin
            golden = digest(home / output)
            assert golden not in (None, "half")
            self.stages.append(Stage(name, model, arguments, output, seconds, golden))
        self.inputs[model] = home

    def episode(self, number: int) -> None:
        """Disturb one stage until it is through."""
        stage = self.random.choice(self.stages)
        kind = self.random.choice(DISTURBANCES)
        home = self.work / f"episode-{number}" / "home"
        home.mkdir(parents=True)
        source = self.inputs[stage.model]
        for entry in source.iterdir():
            names = ("dilate", "calibrate", "distill", "export", "eval")
            order = names.index(stage.name) if stage.name in names else 0
            made = {OUTPUTS[name] for name in names[order:]} | {"results"}
            made |= {str(Path(name).with_suffix(".json")) for name in made if name.endswith(".safetensors")}
            if entry.name not in made:
                (shutil.copytree if entry.is_dir() else shutil.copy2)(entry, home / entry.name)
        tally = home.parent / "reads"
        reader = os.fork()
        if not reader:
            try:
                read_forever(home / stage.output, [stage.golden], tally)
            finally:
                os._exit(98)
        try:
            getattr(self, f"_{kind}", self._kill)(stage, home)
            self._finish(stage, home)
        finally:
            os.kill(reader, signal.SIGKILL)
            ended = wait(reader)
            mount("umount", "--lazy", home)  # a tmpfs of this episode; a process may have a file open on it
            self.counts.check(ended == -signal.SIGKILL, f"{stage.name}: the reader failed")
        if tally.exists():
            reads, wrong = map(int, tally.read_text().split())
            self.counts.numbers["reads"] += reads
            self.counts.check(not wrong, f"{kind} {stage.model} {stage.name}: {wrong} reads saw a wrong artifact")
        self.counts.numbers[f"episodes: {kind}"] += 1
        shutil.rmtree(home.parent)

    def _moment(self, stage: Stage) -> float:
        return self.random.random() * stage.seconds * 1.05

    def _kill(self, stage: Stage, home: Path, number: int = signal.SIGKILL, *options: str) -> None:
        """Kill attempts at random instants, up to eight in a row."""
        output = home / stage.output
        for _ in range(self.random.randint(1, 8)):
            kept, before = pieces(output), identity(output)
            child = start((*stage.arguments, *options), home)
            code = wait(child, self._moment(stage))
            if code is not None:
                self.counts.check(code == 0, f"{stage.name} ended with {code}: {self._log(home)}")
                return
            os.kill(child, number)
            sent = time.monotonic()
            code = wait(child)
            self.counts.numbers[f"signals: {signal.Signals(number).name}"] += 1
            self.counts.numbers[f"signals in {stage.name}"] += 1
            if number == signal.SIGKILL:
                self.counts.check(code in (-9, 0), f"{stage.name}: {code} after SIGKILL")
            else:
                wanted = {signal.SIGTERM: 143, signal.SIGINT: 130}[signal.Signals(number)]
                self.counts.check(
                    code in (wanted, 0, -number), f"{stage.name}: {code} in place of {wanted}: {self._log(home)}"
                )
                self.counts.numbers["signals before the handler"] += code == -number
                self.counts.check(time.monotonic() - sent < 5, f"{stage.name}: took more than 5 s to end")
            if code != 0:
                after = pieces(output)
                written = identity(output) != before
                self.counts.check(after >= kept or written, f"{stage.model} {stage.name}: {kept} pieces became {after}")
            found = digest(output)
            self.counts.check(found in (None, stage.golden), f"{stage.name}: {found} after a kill")

    def _force(self, stage: Stage, home: Path) -> None:
        """Kill forced runs over a finished output: the old or the new one stands."""
        self._finish(stage, home)
        self._kill(stage, home, signal.SIGKILL, "--force")

    def _terminate(self, stage: Stage, home: Path) -> None:
        self._kill(stage, home, signal.SIGTERM)

    def _interrupt(self, stage: Stage, home: Path) -> None:
        self._kill(stage, home, signal.SIGINT)

    def _writers(self, stage: Stage, home: Path) -> None:
        """Start two writers of one output: one may be refused, neither may spoil it."""
        children = [start(stage.arguments, home), start(stage.arguments, home)]
        for code in map(wait, children):
            self.counts.numbers["writers"] += 1
            self.counts.check(code in (0, 4), f"{stage.name}: one of two writers ended with {code}: {self._log(home)}")

    def _vanish(self, stage: Stage, home: Path) -> None:
        """Move the working directory away while a stage runs: it fails with code 4, or writes where it began."""
        child = start(stage.arguments, home)
        code = wait(child, self._moment(stage))
        away = home.with_name("away")
        home.rename(away)
        if code is None:
            code = wait(child)
        away.rename(home)
        self.counts.numbers["vanished directories"] += 1
        self.counts.check(code in (0, 3, 4), f"{stage.name}: {code} when its directory vanished: {self._log(home)}")

    def _full(self, stage: Stage, home: Path) -> None:
        """Let writes fail past a random size, as on a full disk."""
        import resource

        size = self.random.randint(0, 3_000_000)

        def limit() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

        code = wait(start(stage.arguments, home, limit))
        self.counts.numbers["full disks"] += 1
        self.counts.check(code in (0, 4), f"{stage.name}: {code} where files may have {size} bytes: {self._log(home)}")

    def _small(self, stage: Stage, home: Path) -> None:
        """Run on a disk that gets full: a tmpfs with room for the inputs and a little more, which grows for the last run."""
        inputs, needed = home.with_name("inputs"), size_of(self.inputs[stage.model])
        home.rename(inputs)
        home.mkdir()
        room = size_of(inputs) + 65536 + int(self.random.random() * needed)
        if not mount("mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", home):
            home.rmdir()
            inputs.rename(home)
            return
        shutil.copytree(inputs, home, dirs_exist_ok=True)
        code = wait(start(stage.arguments, home))
        self.counts.numbers["small disks"] += 1
        self.counts.numbers["small disks that got full"] += code != 0
        self.counts.check(code in (0, 4), f"{stage.name}: {code} on a disk of {room} bytes: {self._log(home)}")
        found = digest(home / stage.output)
        self.counts.check(found in (None, stage.golden), f"{stage.name}: {found} on a disk that got full")
        mount("mount", "-o", "remount,size=4g", home)

    def _fixed(self, stage: Stage, home: Path) -> None:
        """Run in a directory that nothing can be written to, before and after a kill: code 4, and nothing changes."""
        self._kill(stage, home)
        before = sorted(str(path) for path in home.rglob("*"))
        if not mount("mount", "--bind", home, home):
            return
        mount("mount", "-o", "remount,bind,ro", home)
        finished = digest(home / stage.output) is not None
        code = wait(start(stage.arguments, home))
        self.counts.numbers["read-only directories"] += 1
        right = (0, 4) if finished else (4,)
        self.counts.check(code in right, f"{stage.name}: {code} in a read-only directory: {self._log(home)}")
        mount("umount", "--lazy", home)
        after = sorted(str(path) for path in home.rglob("*"))
        self.counts.check(after == before, f"{stage.name}: a read-only directory changed")

    def _past(self, stage: Stage, home: Path) -> None:
        """Run with a clock that stands in 1999 and goes backwards."""

        def turn_back() -> None:
            now = [946_000_000.0]

            def clock() -> float:
                now[0] -= 0.5
                return now[0]

            time.time = clock

        code = wait(start(stage.arguments, home, turn_back))
        self.counts.numbers["clocks in the past"] += 1
        self.counts.check(code == 0, f"{stage.name}: {code} with a clock in the past: {self._log(home)}")

    def _finish(self, stage: Stage, home: Path) -> None:
        """Let a stage run to its end and check everything."""
        begin = time.monotonic()
        code = wait(start(stage.arguments, home), 60 + 20 * stage.seconds)
        name = f"{stage.model} {stage.name}"
        self.counts.numbers["runs to the end"] += 1
        self.counts.check(code == 0, f"{name}: the run after ended with {code}: {self._log(home)}")
        self.counts.numbers["seconds to the end"] += round(time.monotonic() - begin, 3)
        found = digest(home / stage.output)
        self.counts.check(found == stage.golden, f"{name}: {found} in place of the undisturbed output")
        left = leftovers(home)
        self.counts.check(not left, f"{name}: left {left}")

    @staticmethod
    def _log(home: Path) -> str:
        log = home.parent / "log.txt"
        return " ".join(log.read_text(errors="replace").split())[-300:] if log.exists() else ""


def write_report(path: Path, counts: Counts, seconds: float, runs: int) -> None:
    """Write the counts as NAME.json and NAME.md."""
    command = f"python {' '.join(sys.argv)}"
    numbers = {"signals": counts.signals, **dict(sorted(counts.numbers.items())), "faults": len(counts.faults)}
    about = {
        "command": command,
        "runs": runs,
        "seconds": round(seconds),
        "counts": numbers,
        "faults": counts.faults[:50],
    }
    path.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")
    rows = [f"| {name} | {round(value):,} |" for name, value in numbers.items()]
    text = ["# Kills and other disturbances", "", f"`{command}`, {round(seconds)} s.", "", "| what | count |"]
    path.with_suffix(".md").write_text("\n".join([*text, "| --- | --- |", *rows]) + "\n")


def earlier_counts(path: Path) -> tuple[Counts, float, int]:
    """Return the counts, seconds and number of runs of the report NAME.json."""
    about = json.loads(path.with_suffix(".json").read_text())
    numbers = Counter({k: v for k, v in about["counts"].items() if k not in ("signals", "faults")})
    return Counts(numbers, about["faults"]), about["seconds"], about.get("runs", 1)


def main() -> int:
    """Run episodes until there were enough kills or the time is up."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--kills", type=int, default=2000)
    parser.add_argument("--models", default="tiny,digits-ddpm")
    parser.add_argument("--minutes", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    counts, seconds, runs = Counts(), 0.0, 0
    if options.resume and options.output and options.output.with_suffix(".json").exists():
        counts, seconds, runs = earlier_counts(options.output)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DQTOOL_CACHE"] = str(Path(folder) / "cache")
        os.environ["TMPDIR"] = folder
        preload()
        soak = Soak(Path(folder), options.models.split(","), options.seed + runs, counts)
        print(", ".join(f"{s.model} {s.name} {s.seconds:.1f} s" for s in soak.stages), flush=True)
        number = 0
        end = time.monotonic() + 60 * options.minutes
        while counts.signals < options.kills and time.monotonic() < end:
            soak.episode(number)
            number += 1
            if number % 10 == 0 and options.output:
                write_report(options.output, counts, seconds + time.monotonic() - begin, runs + 1)
            if number % 50 == 0:
                print(f"{number} episodes, {counts.signals} signals, {len(counts.faults)} faults", flush=True)
    if options.output:
        write_report(options.output, counts, seconds + time.monotonic() - begin, runs + 1)
    print(f"{counts.signals} signals, {counts.numbers['reads']} reads, {len(counts.faults)} faults", flush=True)
    return 1 if counts.faults else 0


if __name__ == "__main__":
    sys.exit(main())
