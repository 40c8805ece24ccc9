"""`dqtool bench`: compare speed, memory and load time of an exported network with float and with other quantizers.

The report goes to standard output, and with `-o` to a JSON file. All contenders run in one process, in turns.
"""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dqtool import report
from dqtool.artifacts import Artifact, check_writable, commit_report, open_artifact
from dqtool.artifacts.bench_report import AloneRow, BenchedModel, BenchReport, LoadRow, RooflineRow, SpeedRow
from dqtool.artifacts.jsonvalues import Json
from dqtool.bench.tables import report_lines
from dqtool.bench.usual_bits import usual_bits
from dqtool.core.device import choose_device
from dqtool.errors import ArtifactError, EnvironmentFault, NumericError, UsageError
from dqtool.runtimes.names import GPU
from dqtool.stages.options.bench import BenchOptions
from dqtool.stages.shared.paths import read_paths
from dqtool.stages.shared.running import input_artifact
from dqtool.stages.shared.settings import RunSettings

if TYPE_CHECKING:
    import torch

    from dqtool.bench.alone import Alone
    from dqtool.bench.contender import Loaded
    from dqtool.bench.measure import Timing
    from dqtool.bench.subject import Arguments, Subject

__all__ = ["BenchPlan", "bench", "on_one_device", "render"]

BATCHES = (1, 4, 16)


@dataclass(frozen=True)
class BenchPlan:
    """Plan of a benchmark, for a dry run: what would be timed, at which batch sizes, and for how long each."""

    contenders: list[str]
    batches: list[int]
    seconds: float
    arch: str | None
    directory: str | None

    def to_json(self) -> dict[str, Json]:
        """Return the plan as JSON."""
        plan = {key: value for key, value in asdict(self).items() if key != "directory"}
        return {"plan": plan, "directory": self.directory}


def bench(options: BenchOptions, settings: RunSettings) -> BenchReport | BenchPlan:
    """Measure and return the report; in a dry run, return the plan. `render` makes text of both.

    Raises:
        UsageError: an unknown runtime or architecture.
        ArtifactError: the directory is no intact export, or a runtime can't run it.
        EnvironmentFault: an extra is missing, or the machine lacks what a runtime needs.
        NumericError: a contender's output is not finite.
    """
    from dqtool.bench.contenders import contender_names, contender_of
    from dqtool.bench.machine import describe_machine
    from dqtool.runtimes import RUNTIMES

    if options.output is not None:
        check_writable(options.output, "report", inputs=read_paths(options), overwrite=settings.overwrite)
    if settings.device.startswith("cuda"):
        return _bench_gpu(options, settings)
    names = [*_runtimes(options.runtime), *contender_names(options.against)]
    batches = options.batch or _own_batches(options.arch)
    if settings.dry_run:
        return BenchPlan(names, list(batches), options.seconds, options.arch, options.artifact)
    choose_device("cpu")  # where there is a GPU, networks would go there, and the times would be called a GPU's
    for name in names:  # before anything is written
        if (require := contender_of(name).require) is not None:
            require()
    artifact = _subject_artifact(options, settings)
    names = [*_runtimes(options.runtime, artifact.manifest.parameters.format or ""), *contender_names(options.against)]
    import torch

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="dqtool-bench-") as workspace:
        subject = _subject(artifact, options, workspace, torch.get_num_threads())
        _prepare(names, subject)
        apart = [name for name in names if contender_of(name).alone]
        loaded = {name: contender_of(name).load(subject) for name in names if name not in apart}
        speed = {batch: _time(loaded, subject, batch, options.seconds) for batch in batches if loaded}
        notes = {name: each.note for name, each in loaded.items()}
        del loaded  # fresh processes measure memory: they need theirs
        alone = {batch: _alone(names, subject, batch, options.seconds) for batch in batches if apart}
        roofline, scaling = _roofline(artifact, subject, batches[0], options) if options.roofline else ([], {})
        probes = _probes(names, subject, batches[0]) if options.memory else []
    from dqtool.runtimes.choice import remember_timings

    medians = {batch: {name: timing.median for name, timing in found.items()} for batch, found in speed.items()}
    if remember_timings(artifact, medians):
        report.say("bench: --runtime auto will take what was fastest here for this network")
    result = BenchReport(
        _command(options),
        _model(artifact, options),
        describe_machine(subject.threads),
        options.seconds,
        {str(batch): _rows(notes, timings) for batch, timings in speed.items()},
        probes,
        batches[0],
        {name: RUNTIMES[name].weights_in_memory for name in names if name in RUNTIMES},
        {str(batch): rows for batch, rows in alone.items()},
        roofline,
        scaling,
    )
    if options.output is not None:
        commit_report(options.output, result.to_json(), overwrite=settings.overwrite)
    return result


def _bench_gpu(options: BenchOptions, settings: RunSettings) -> BenchReport | BenchPlan:
    """Measure on the CUDA device that the settings name."""
    import torch

    from dqtool.bench.gpu_bench import device_contenders
    from dqtool.core.device import choose_device

    asked = () if options.against == BenchOptions().against else options.against
    batches = list(options.batch or _own_batches(options.arch))
    if settings.dry_run:
        names = device_contenders(asked, torch.device("cuda"))
        return BenchPlan(names, batches, options.seconds, options.arch, options.artifact)
    device = choose_device(settings.device)
    names = device_contenders(asked, device)
    result = on_one_device(_subject_artifact(options, settings), options, device, names, batches)
    if options.output is not None:
        commit_report(options.output, result.to_json(), overwrite=settings.overwrite)
    return result


def on_one_device(
    artifact: Artifact, options: BenchOptions, device: torch.device, names: Sequence[str], batches: Sequence[int]
) -> BenchReport:
    """Measure the contenders `names` on one device, and predict the times of the network's products there."""
    import torch

    from dqtool.bench.gpu_bench import measure_on
    from dqtool.bench.gpu_contenders import on_device, quantized_network
    from dqtool.bench.gpu_model import kernel_rows, recorded_products
    from dqtool.bench.machine import describe_machine
    from dqtool.runtimes import RUNTIMES, load
    from dqtool.runtimes.cuda.tiles import gpu_at

    with tempfile.TemporaryDirectory(prefix="dqtool-bench-") as workspace:
        subject = _subject(artifact, options, workspace, torch.get_num_threads())
        speed, loads, left_out = measure_on(device, subject, names, batches, options.seconds)
        network = quantized_network(load(subject.directory, "simulate"), device)
        products = recorded_products(network, on_device(subject.inputs(batches[0])[0], torch.float16, device))
    gpu = gpu_at(device)
    return BenchReport(
        f"{_command(options)} --device {device.type}",
        _model(artifact, options),
        describe_machine(torch.get_num_threads()),
        options.seconds,
        speed,
        loads,
        batches[0],
        {"ours": RUNTIMES["cuda"].weights_in_memory},
        gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device}, model of {gpu.name}",
        left_out=left_out,
        kernels=kernel_rows(gpu, products),
    )


def render(result: BenchReport | BenchPlan) -> list[str]:
    """Return the report, or the plan, as lines of text."""
    if isinstance(result, BenchReport):
        return report_lines(result)
    what = result.arch or result.directory or "the exported directory"
    return [
        f"would time {', '.join(result.contenders)} on {what}",
        f"batch {', '.join(map(str, result.batches))}, {result.seconds:g} s each after warm-up",
    ]


def _runtimes(asked: Sequence[str], kind: str = "dq") -> list[str]:
    """Return the runtimes to measure, each once. `all` stands for `auto` and every runtime that runs this format here."""
    from dqtool.runtimes import RUNTIMES, runtime_name

    names: dict[str, None] = {}
    for name in map(runtime_name, asked or ("auto",)):
        if name == "all":
            names.update(dict.fromkeys([*_available(kind), "auto"]))
        elif name == GPU:
            raise UsageError(f"The {GPU} runtime is measured on a GPU", where="--runtime", fix="Add --device cuda")
        elif name == "auto" or name in RUNTIMES:
            names[name] = None
        elif name != "none":
            raise UsageError(
                f"unknown runtime '{name}'",
                where="--runtime",
                fix=f"Choose from {', '.join(RUNTIMES)}, auto, all or none",
            )
    return list(names)


def _available(kind: str) -> list[str]:
    from dqtool.runtimes import READERS, RUNTIMES, pick

    fast = [name for name in RUNTIMES if name != "simulate"]
    return [runtime.name for runtime, reason in pick(READERS.get(kind, fast)) if reason is None and runtime.name != GPU]


def _own_batches(arch: str | None) -> tuple[int, ...]:
    """Return 1, 4 and 16 images; for an architecture that is used with guidance, two: one pass over both halves."""
    from dqtool.models.architectures import architecture

    own = architecture(arch).batch if arch is not None else 1
    return BATCHES if own == 1 else (own,)


def _subject_artifact(options: BenchOptions, settings: RunSettings) -> Artifact:
    if options.arch is None:
        return input_artifact(options.artifact, ["export"], "export")
    from dqtool.bench.random_export import random_export

    return open_artifact(random_export(options.arch, options.spec, settings.force), ["export"])


def _subject(artifact: Artifact, options: BenchOptions, workspace: str, threads: int) -> Subject:
    from dqtool.bench.subject import Subject
    from dqtool.models.components.export_layout import weights_file

    manifest = artifact.manifest
    timesteps = [0.0]
    if manifest.parameters.format == "dq":
        timesteps = artifact.tensors(file=weights_file(manifest.pipeline))["timesteps"].tolist()
    config = dict(manifest.network.config)
    if options.sample_size is not None:
        if not manifest.network.class_name.startswith("UNet2D"):
            raise UsageError(
                f"A {manifest.network.class_name} has one input size", where="--sample-size", fix="Leave it out"
            )
        config["sample_size"] = options.sample_size
    return Subject(
        str(artifact.path),
        manifest.network.class_name,
        config,
        timesteps,
        workspace,
        threads,
        options.reference,
    )


def _prepare(names: Sequence[str], subject: Subject) -> None:
    """Write the files that the contenders are loaded from."""
    from dqtool.bench.contenders import contender_of
    from dqtool.bench.probe import prepare

    # Contenders that are loaded from the same files have the same `prepare`.
    chosen = {contender_of(name).prepare: name for name in reversed(names) if contender_of(name).prepare is not None}
    if not chosen:
        return
    with report.progress("bench: prepare", len(chosen), "contender") as progress:
        for name in chosen.values():
            prepare(name, subject)
            progress.advance(note=name)


def _probes(names: Sequence[str], subject: Subject, batch: int) -> list[LoadRow]:
    """Return load time and memory of the contenders, each measured in a fresh process."""
    from dqtool.bench.contenders import contender_of
    from dqtool.bench.probe import probe

    chosen = [name for name in names if contender_of(name).probed]
    found = []
    with report.progress("bench: load time and memory", len(chosen), "contender") as progress:
        for name in chosen:
            found.append(LoadRow(name, **asdict(probe(name, subject, batch))))
            progress.advance()
    return found


def _alone(names: Sequence[str], subject: Subject, batch: int, seconds: float) -> list[AloneRow]:
    """Time every contender in a process of its own, fastest first."""
    from dqtool.bench.contenders import BASELINES
    from dqtool.bench.probe import alone

    found: dict[str, Alone] = {}
    with report.progress(f"bench: each alone at batch {batch}", len(names), "contender") as progress:
        for name in names:
            found[name] = alone(name, subject, batch, seconds)
            progress.advance(note=name)
    base = min((found[name].wall for name in BASELINES if name in found), default=None)
    ordered = sorted(found.items(), key=lambda item: item[1].wall)
    return [AloneRow(name, **asdict(each), ratio=None if base is None else base / each.wall) for name, each in ordered]


def _roofline(
    artifact: Artifact, subject: Subject, batch: int, options: BenchOptions
) -> tuple[list[RooflineRow], dict[str, float]]:
    """Return the rows of the roofline and the seconds of a step by number of threads, both of the `cpu` runtime."""
    from dqtool.bench.roofline import measure_roofline, measure_scaling
    from dqtool.runtimes.cpu import library

    if not library.has_products():
        raise EnvironmentFault(
            f"The roofline is that of the cpu runtime's kernels, and they are missing: {library.problem()}",
            where="--roofline",
            fix="Leave it out",
        )
    bits = usual_bits(artifact.manifest.layers).partition("/")[2]
    if not bits.isdigit():
        raise ArtifactError("This network has no quantized layers", where="--roofline", fix="Leave it out")
    rows = measure_roofline(subject, batch, min(8, int(bits)), options.seconds)
    return rows, measure_scaling(subject, batch, options.seconds)


def _time(loaded: Mapping[str, Loaded], subject: Subject, batch: int, seconds: float) -> dict[str, Timing]:
    """Check that every contender gives finite numbers of the right shape, then time them all."""
    from dqtool.bench.measure import interleaved

    inputs = subject.inputs(batch)
    steps = {}
    with report.progress(f"bench: warm up at batch {batch}", len(loaded), "contender") as progress:
        shape = None
        for name, each in loaded.items():
            adapted = [each.adapt(arguments) for arguments in inputs]
            output = each.run(adapted[0])
            shape = tuple(output.shape) if shape is None else shape
            if not bool(output.isfinite().all()):
                raise NumericError("A contender's output is not finite", where=f"{name}, batch {batch}")
            if tuple(output.shape) != shape:
                raise ArtifactError(
                    f"{name} gives a result of shape {tuple(output.shape)}, others {shape}",
                    where="--reference",
                    fix="Give the model that was quantized, or leave --reference out",
                )
            steps[name] = [_call(each, arguments) for arguments in adapted]
            progress.advance()
    with report.progress(f"bench: batch {batch}", None, "turn") as progress:
        return interleaved(steps, seconds, advance=progress.advance)


def _call(loaded: Loaded, arguments: Arguments) -> Any:
    return lambda: loaded.run(arguments)


def _rows(notes: Mapping[str, str], timings: Mapping[str, Timing]) -> list[SpeedRow]:
    """Return one row a contender, fastest first; `ratio` is the speedup over the baseline."""
    baseline = _baseline(timings)
    rows = []
    for name, timing in sorted(timings.items(), key=lambda item: item[1].median):
        ratio = None if baseline is None else timings[baseline].median / timing.median
        rows.append(SpeedRow(name, **asdict(timing), ratio=ratio, note=notes[name], baseline=name == baseline))
    return rows


def _baseline(timings: Mapping[str, Timing]) -> str | None:
    """Return the faster of eager float32's two memory formats."""
    from dqtool.bench.contenders import BASELINES

    present = [name for name in BASELINES if name in timings]
    return min(present, key=lambda name: timings[name].median, default=None)


def _model(artifact: Artifact, options: BenchOptions) -> BenchedModel:
    from dqtool.models.components.export_layout import component_prefix

    manifest = artifact.manifest
    prefix = component_prefix(manifest.pipeline)
    sizes = [entry.bytes for name, entry in (manifest.files or {}).items() if name.startswith(prefix)]
    return BenchedModel(
        manifest.network.class_name,
        manifest.network.parameters,
        usual_bits(manifest.layers),
        sum(sizes),
        f"{options.arch}, random weights" if options.arch else artifact.given,
        options.arch,
        artifact.sha256,
    )


def _command(options: BenchOptions) -> str:
    """Return the command line that measures this again."""
    words = ["dqtool", "bench", *([options.artifact] if options.artifact else [])]
    if options.arch is not None:
        words += ["--arch", options.arch, "--bits", options.bits]
    words += [word for name in options.runtime for word in ("--runtime", name)]
    words += ["--against", ",".join(options.against) or "none"]
    if options.batch:
        words += ["--batch", ",".join(map(str, options.batch))]
    if options.sample_size is not None:
        words += ["--sample-size", str(options.sample_size)]
    if options.threads is not None:
        words += ["--threads", str(options.threads)]
    words += ["--seconds", f"{options.seconds:g}"]
    if options.reference is not None:
        words += ["--reference", options.reference]
    words += ["--roofline"] if options.roofline else []
    return shlex.join(words if options.memory else [*words, "--no-memory"])
