"""`dqtool report`: eval results, with the artifacts beside them, as one HTML or Markdown page."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dqtool import report
from dqtool.artifacts import check_writable, dqtool_version
from dqtool.artifacts.files import target_of, write_text
from dqtool.artifacts.records import InputRecord
from dqtool.errors import DqtoolError
from dqtool.stages.options.report import ReportOptions
from dqtool.stages.shared.running import input_artifact, set_up_torch
from dqtool.stages.shared.settings import Execution, RunSettings

if TYPE_CHECKING:
    from torch import nn

    from dqtool.artifacts import Artifact
    from dqtool.page.dilated_inputs import DilatedInput
    from dqtool.page.document import Page, Section
    from dqtool.page.quantization_errors import Errors
    from dqtool.page.results import Bench, Result

__all__ = ["plan_report", "render_plan", "write_report"]

CALIBRATED = 2
"""Calibrated artifacts of one model whose activations are drawn."""


def write_report(options: ReportOptions, settings: RunSettings) -> str:
    """Find the results, measure what they did not record, write the page; returns its path as given.

    Raises:
        ArtifactError: a place holds no eval result, or a damaged one.
        EnvironmentFault: nothing is at a place, or the page can't be written.
    """
    results, benches, tables = _find(options, settings)
    set_up_torch(settings.device)
    page = _page(results, benches, tables)
    if options.kind == "md":
        from dqtool.page.markdown import render_markdown as render
    else:
        from dqtool.page.html import render_html as render
    write_text(target_of(options.path), render(page))
    report.say(f"report: {len(results)} result{'s' * (len(results) != 1)}, wrote {options.path}")
    return options.path


def plan_report(options: ReportOptions, settings: RunSettings) -> dict[str, Any]:
    """Return the files that `write_report` would read and write, for a dry run."""
    results, benches, tables = _find(options, settings)
    return {
        "output": options.path,
        "format": options.kind,
        "results": [{"name": r.name, "path": str(r.path), "artifacts": sorted(r.chain)} for r in results],
        "benches": [str(bench.path) for bench in benches],
        "tables": [table["name"] for table in tables],
    }


def render_plan(plan: Mapping[str, Any]) -> list[str]:
    """Return the plan as lines of text."""
    rows = [(r["name"], r["path"], ", ".join(r["artifacts"]) or "none") for r in plan["results"]]
    lines = [f"would write {plan['output']} ({plan['format']})"]
    lines += [f"timings     {path}" for path in plan["benches"]]
    lines += [f"comparison  {name}" for name in plan["tables"]]
    return [*lines, *report.table_lines(["result", "report", "artifacts found"], rows)]


def _find(options: ReportOptions, settings: RunSettings) -> tuple[list[Result], list[Bench], list[dict[str, Any]]]:
    from dqtool.core.bits import bits_label
    from dqtool.page.results import find_results, find_tables

    places: Sequence[str] = options.places or [input_artifact(None, ["eval"], "eval").given]
    results, benches = find_results(places)
    # A place is looked through, and a page may lie in it; what was found there is not written over.
    reads = [place for place in places if os.path.isfile(place)]
    reads += [str(path) for each in results for path in (each.path, each.picture, *each.chain.values()) if path]
    reads += [str(bench.path) for bench in benches]
    check_writable(options.path, "page", inputs=reads, overwrite=settings.overwrite)
    for result in results:
        result.bits = bits_label(result.manifest.layers)
    inputs = [InputRecord(str(r.path), r.measured_sha256, "eval") for r in results]
    settings.log.append(Execution("report", options.path, asdict(options), inputs, cached=False))
    return results, benches, find_tables(places)


def _page(results: Sequence[Result], benches: Sequence[Bench], tables: Sequence[dict[str, Any]]) -> Page:
    from dqtool.page.comparison import comparison_section
    from dqtool.page.document import Page, Paragraph, Section, gather_omissions
    from dqtool.page.results import chain_key
    from dqtool.page.tables import bench_tables, making_tables

    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(chain_key(result), []).append(result)
    sections: list[Section] = []
    models = [group[0].source_sha256 for group in groups.values()]
    for group, model in zip(groups.values(), models, strict=True):
        heads = [each[0] for each in groups.values() if each is not group]
        others = [head for head in heads if head.source_sha256 == model]
        sections += _group_sections(group, benches, others)
    sections += [comparison_section(table) for table in tables]
    if benches:
        speed = Section("Speed", level=2, chapter="About")
        for bench in benches:
            timed, machine = bench.report.model, bench.report.machine
            speed.blocks.append(
                Paragraph(
                    f"{bench.path.name}: {timed.class_name} at {timed.bits} ({timed.origin}) on "
                    f"{machine.processor}, {machine.threads} threads."
                )
            )
            speed.blocks += bench_tables(bench)
        sections.append(speed)
    if results:
        sections.append(Section("How these results were made", list(making_tables(results)), 2, "About"))
    counts = [
        f"{len(results)} result{'s' * (len(results) != 1)} of {len(set(models))} model{'s' * (len(set(models)) != 1)}"
    ]
    if benches:
        counts.append(f"{len(benches)} timing report{'s' * (len(benches) != 1)}")
    if tables:
        counts.append(f"{len(tables)} table{'s' * (len(tables) != 1)} of comparisons")
    return Page(
        "Quantization report",
        f"{', '.join(counts)}; page made by dqtool {dqtool_version()}.",
        gather_omissions(sections),
    )


def _group_sections(group: Sequence[Result], benches: Sequence[Bench], others: Sequence[Result]) -> list[Section]:
    """Return the sections on results that may be compared; `others` are results of the same model that may not."""
    from dqtool.page import sections

    errors, missing = _errors(group)
    return [
        sections.results_section(group, others),
        sections.quality_section(group, benches),
        sections.samples_section(group),
        *sections.error_sections(group, errors, missing),
        sections.activations_section(*_activations(group)),
    ]


def _errors(group: Sequence[Result]) -> tuple[dict[str, Errors], dict[str, str]]:
    """Return the errors by result name, and the reason why other results have none."""
    from dqtool.page.quantization_errors import quantization_errors

    errors: dict[str, Errors] = {}
    missing: dict[str, str] = {}
    with report.progress("report: errors of weights and activations", len(group), "result") as progress:
        for result in group:
            try:
                errors[result.name] = quantization_errors(result)
            except DqtoolError as error:
                missing[result.name] = str(error)
            progress.advance()
    return errors, missing


def _activations(group: Sequence[Result]) -> tuple[list[tuple[str, list[DilatedInput]]], list[str]]:
    """Return the inputs before and after dilation of every calibrated artifact among the results, and what is missing."""
    from dqtool.models.networks.checked_artifacts import checked_tensors
    from dqtool.page.dilated_inputs import dilated_inputs
    from dqtool.stages.calibration.trajectory import STATISTICS_SAMPLES
    from dqtool.stages.shared.artifact_models import teacher_of

    calibrated: dict[str, tuple[str, Result]] = {}
    for result in group:
        if "calibrate" in result.chain:
            calibrated.setdefault(str(result.chain["calibrate"].resolve()), (result.name, result))
    if not calibrated:
        return [], ["no calibrated artifact was found beside these results"]
    found, missing = [], []
    for name, result in list(calibrated.values())[:CALIBRATED]:
        try:
            artifact: Artifact = result.open("calibrate")

            def teacher(artifact: Artifact = artifact) -> nn.Module:
                return teacher_of(artifact.manifest, checked_tensors(artifact))

            inputs = dilated_inputs(artifact, teacher, STATISTICS_SAMPLES)
        except DqtoolError as error:
            missing.append(f"activations of {name}: {str(error).rstrip('.')}")
            continue
        if inputs:
            found.append((name if len(calibrated) > 1 else "As calibrated", inputs))
        else:
            missing.append(f"no layer of {name} divides its input (it was not dilated, or the factors are folded)")
    if len(calibrated) > CALIBRATED:
        missing.append(f"only {CALIBRATED} of {len(calibrated)} calibrated artifacts are drawn")
    return found, missing
