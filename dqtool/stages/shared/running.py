"""Steps around the work of every stage: input, cache, lock, commit. Imports no torch until there is work to do."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dqtool import distributed, report
from dqtool.artifacts import (
    ATTACHMENT,
    Artifact,
    DeferredTensors,
    Manifest,
    OutputKind,
    Written,
    check_outputs,
    clear_leftovers,
    commit,
    commit_directory,
    commit_report,
    environment,
    fingerprint,
    is_current,
    lock,
    open_artifact,
    remove_pieces,
)
from dqtool.artifacts.jsonvalues import JsonObject
from dqtool.artifacts.named import remember_named
from dqtool.artifacts.records import (
    METRICS,
    InputRecord,
    LayerRecord,
    MetricsRecord,
    ModelRecord,
    ParametersRecord,
    PipelineRecord,
)
from dqtool.artifacts.schema import unchecked
from dqtool.errors import ArtifactError, EnvironmentFault
from dqtool.stages.registry import default_output
from dqtool.stages.shared.settings import Execution, RunSettings

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Execution",
    "RunSettings",
    "StageOutput",
    "check_steps",
    "input_artifact",
    "run_unless_cached",
    "set_up_torch",
]


SHARED = ("calibrate", "distill", "eval")
"""Stages whose work the processes of a command share."""


@dataclass
class StageOutput:
    """Output of a stage before it is committed: tensors of a file, or `build` for a directory, or neither for a report."""

    tensors: Mapping[str, Tensor] | None
    model: ModelRecord
    pipeline: PipelineRecord | None
    layers: list[LayerRecord]
    metrics: JsonObject = field(default_factory=dict)
    build: Callable[[Path], JsonObject] | None = None
    attachments: Mapping[str, Tensor] = field(default_factory=dict)
    """Files that travel with `tensors`: a pipeline's other components, by relative path, uint8."""
    proof: Callable[[Written], JsonObject] | None = None
    """Check that runs while `tensors` are being written, and returns further metrics. If it raises, nothing is committed. Its
    argument waits for the file and maps it."""
    earlier_seconds: float = 0.0
    """Seconds that earlier, interrupted runs spent on this output."""


def input_artifact(given: str | None, stages: Collection[str], default: str) -> Artifact:
    """Open the input of a command: the given path, else the line from a pipe, else the previous stage's default.

    Raises:
        ArtifactError: a pipe or file brought nothing, or the artifact is not of one of `stages`.
        EnvironmentFault: there is no such path.
    """
    if given is None:
        given = distributed.broadcast(_from_standard_input() if distributed.is_main() else None)
    if given is None:
        given = default_output(default)
        if not os.path.lexists(given):
            raise EnvironmentFault(
                f"No artifact was given and the default, {given}, is not here",
                where=os.getcwd(),
                fix=f"Name one, or run `dqtool {default}` first",
            )
    return open_artifact(given, stages)


def check_steps(artifact: Artifact, steps: int | None) -> None:
    """Raise `ArtifactError` if `steps` differs from the number of steps of the artifact's tables."""
    calibrated = artifact.manifest.sampling
    if steps is not None and calibrated is not None and steps != calibrated.steps:
        raise ArtifactError(
            f"This artifact was calibrated for {calibrated.steps} steps, not {steps}",
            where=artifact.given,
            fix=f"Leave out --steps, or run `dqtool calibrate --steps {steps}` and what follows it first",
        )


_LONGEST_LINE = 1 << 16


def _from_standard_input() -> str | None:
    """Return one line of standard input if it is a pipe or a file; None for a terminal, `/dev/null` or a closed stream."""
    import stat

    try:
        mode = os.fstat(0).st_mode
    except OSError:
        return None
    if sys.stdin is None:  # closed at the start; another file may have its number by now
        return None
    if not (stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)):
        return None
    try:
        line = sys.stdin.readline(_LONGEST_LINE).strip()
    except UnicodeDecodeError:
        line = ""
    if "\0" in line or len(line) >= _LONGEST_LINE - 1:  # a stream of something else
        line = ""
    if not line:
        raise ArtifactError(
            "Standard input is a pipe or file and brought no path",
            where="standard input",
            fix="The stage before may have failed; give the artifact's path, or redirect from /dev/null",
        )
    return line


def run_unless_cached(
    stage: str,
    code_version: int,
    output: str,
    parameters: JsonObject,
    inputs: Sequence[InputRecord],
    settings: RunSettings,
    produce: Callable[[str], StageOutput],
    kind: OutputKind = "artifact",
    also: Sequence[tuple[str, OutputKind]] = (),
    *,
    reads: Sequence[str | Path],
) -> bool:
    """Make the artifact `output` unless it is up to date. Return True if it was. A dry run writes nothing.

    `produce(fingerprint)` does the work. `kind` is "artifact",
    "directory" or "report". `also` are side products (path, kind), such as pictures: they must exist for the cache to count.
    `reads` are files and directories that the command reads beside the inputs, which no output may touch.

    Where several processes share the command, all of them do the work of the stages in `SHARED`, and the main one alone does
    that of all others. It alone writes.
    """
    if distributed.world_size() > 1 and not distributed.is_main():
        return _accompany(stage, code_version, output, parameters, inputs, settings, produce)
    key = fingerprint(stage, code_version, parameters, [entry.identity for entry in inputs])

    def note(*, cached: bool) -> bool:
        settings.log.append(Execution(stage, output, parameters, list(inputs), cached))
        return cached

    def is_cached() -> bool:
        return not settings.force and is_current(output, key) and all(os.path.exists(path) for path, _ in also)

    named = [output, *(path for path, _ in also), *(entry.name for entry in inputs), *reads, *settings.reads]
    if distributed.broadcast(is_cached()):  # needs no lock: several runs may share the artifacts of their first stages
        if not settings.dry_run:
            clear_leftovers(output)
            remember_named(named)
            report.say(f"{stage}: cached {output}")
        return note(cached=True)
    names = [entry.name for entry in inputs]
    check_outputs([(output, kind), *also], [*names, *reads, *settings.reads], overwrite=settings.overwrite)
    if settings.dry_run:
        return note(cached=False)
    with lock(output):
        start = time.perf_counter()
        threads, device = set_up_torch(settings.device)
        distributed.broadcast(key)
        with nullcontext() if stage in SHARED else distributed.solo():
            product = produce(key)
        manifest = Manifest(
            stage=stage,
            fingerprint=key,
            inputs=list(inputs),
            model=product.model,
            pipeline=product.pipeline,
            parameters=unchecked(parameters, ParametersRecord),
            layers=product.layers,
            metrics=unchecked(product.metrics, METRICS.get(stage, MetricsRecord)),
            environment=environment(device, threads, distributed.world_size() if stage in SHARED else 1),
            seconds=round(product.earlier_seconds + time.perf_counter() - start, 3),
        )
        if product.build is not None:
            commit_directory(output, product.build, manifest, overwrite=settings.overwrite)
        elif product.tensors is not None:
            attached = {ATTACHMENT + name: data for name, data in product.attachments.items()}
            tensors = product.tensors if isinstance(product.tensors, DeferredTensors) else dict(product.tensors)
            tensors.update(attached)
            proof = product.proof and partial(_timed, product.proof, manifest, start)
            commit(output, tensors, manifest, proof, overwrite=settings.overwrite)
        else:
            commit_report(output, manifest, overwrite=settings.overwrite)
        remove_pieces(output)
    remember_named(named)
    distributed.barrier()
    report.say(f"{stage}: wrote {output} in {report.format_seconds(manifest.seconds)}")
    return note(cached=False)


def _accompany(
    stage: str,
    code_version: int,
    output: str,
    parameters: JsonObject,
    inputs: Sequence[InputRecord],
    settings: RunSettings,
    produce: Callable[[str], StageOutput],
) -> bool:
    """Take part in `run_unless_cached` as a process that is not the main one. Return True if the output was up to date."""
    cached = distributed.broadcast(False)
    settings.log.append(Execution(stage, output, parameters, list(inputs), cached))
    if cached or settings.dry_run:
        return cached
    key = distributed.broadcast("")  # the main process holds the lock by now
    mine = fingerprint(stage, code_version, parameters, [entry.identity for entry in inputs])
    if key != mine:
        raise EnvironmentFault(
            f"This process reads other inputs than the main one (fingerprint {mine[:12]}, not {key[:12]})",
            where=", ".join(entry.name for entry in inputs),
            fix="Put the files where all machines read them under the same path, and install the same dqtool on each",
        )
    set_up_torch(settings.device)
    if stage in SHARED:
        produce(key)
    distributed.barrier()  # the main process has written
    return False


def _timed(proof: Callable[[Written], JsonObject], manifest: Manifest, start: float, written: Written) -> JsonObject:
    found = proof(written)
    manifest.seconds = round(time.perf_counter() - start, 3)
    return found


def set_up_torch(device: str) -> tuple[int, str]:
    """Choose the device and deterministic algorithms. Return the number of threads and the device's name.

    Raises:
        EnvironmentFault: this machine has no such device.
    """
    from dqtool.core.allocator import keep_freed_memory
    from dqtool.core.device import choose_device

    keep_freed_memory()
    import torch

    chosen = choose_device(device)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # An aid to debugging that writes every new tensor twice.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return torch.get_num_threads(), str(chosen)
