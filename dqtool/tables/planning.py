"""Cells of a table: each is a chain of stages with all options resolved, and a key that names its result.

A key is a hash like a fingerprint: of stage, code version, resolved parameters and the keys of the inputs, the first of which
is the model's sha256. It needs no artifacts, so that a checkout with results alone knows which cells are finished.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from dqtool.artifacts import fingerprint
from dqtool.artifacts.manifest import canonical_json
from dqtool.errors import UsageError
from dqtool.metrics import CLASSIFIERS, METRICS
from dqtool.stages.evaluation.image_metrics import computable_metrics, files_of
from dqtool.stages.registry import make_options
from dqtool.tables.schedules import SCHEDULES
from dqtool.tables.spec import STAGES, Group, Options, Row, Table

if TYPE_CHECKING:
    from dqtool.models.sources.resolve import ModelSource

__all__ = ["Cell", "Step", "Target", "model_digest", "plan_table"]

ENGINE, SIMULATE = "cpu", "simulate"
"""Runtimes of cells: of the embedded models, and of published ones, which a GPU samples."""
ITERATIONS = ("iters", "refine_iters")
SOURCE_OPTIONS = ("config", "components", "lora", "prediction_type", "scheduler", "tokenizer", "pipeline", "variant")
"""Options of `dilate` that identify the model."""
ALWAYS = ("similarity", "cost")
"""Metrics of cells on all models. Those on embedded models have the model's own classifier, too; those on published ones what the
given files allow."""


@dataclass(frozen=True)
class Step:
    """One stage of a chain.

    Attributes:
        stage: name of the stage.
        values: options by field name, without those of files.
        parameters: resolved parameters of the stage.
        key: hash that names the artifact.
        model: model that the chain starts from.
        source: key of the step whose output the stage reads; None for the first one, which reads the model.
        before: stage of that step.
    """

    stage: str
    values: Mapping[str, Any]
    parameters: Mapping[str, Any]
    key: str
    model: str
    source: str | None = None
    before: str | None = None


@dataclass(frozen=True)
class Cell:
    """A row, group and seed of a table. `problem` is the reason why it can't be run."""

    row: str
    group: str
    seed: int
    steps: tuple[Step, ...] = ()
    problem: str | None = None

    @property
    def key(self) -> str:
        """Key that names the result of the cell; "" if it can't be run."""
        return self.steps[-1].key if self.steps else ""


@dataclass(frozen=True)
class Target:
    """A table's model and options on the command line.

    Attributes:
        model: a published model; None stands for the table's embedded model.
        overrides: options that replace those of all rows.
        seeds: seeds in place of the table's.
        schedule: schedule in place of the table's.
    """

    model: str | None = None
    overrides: Options = field(default_factory=dict)
    seeds: tuple[int, ...] | None = None
    schedule: str | None = None


def plan_table(table: Table, target: Target) -> list[Cell]:
    """Return the cells of a table, seed by seed.

    Raises:
        UsageError: options of two stages contradict each other.
    """
    groups = table.groups
    if target.model is not None and any(group.model for group in groups):
        groups = (Group(""),)  # a table over several models becomes one over the given model
    if target.model is None:
        groups = tuple(group for group in groups if not group.published_only)
    cells = []
    seeds = sorted({seed for group in groups for seed in target.seeds or group.seeds or table.seeds})
    for seed in seeds:
        for group in groups:
            if seed not in (target.seeds or group.seeds or table.seeds):
                continue
            for row in table.rows:
                if not row.paper_only and (row.groups is None or group.name in row.groups or not group.name):
                    cells.append(_cell(table, group, row, seed, target))
    return cells


def _cell(table: Table, group: Group, row: Row, seed: int, target: Target) -> Cell:
    layers = [table.options, group.options, row.options]
    if target.model is not None:
        layers = [table.options, group.options, table.published.options, group.published, row.options]
    layers.append(target.overrides)
    schedule = SCHEDULES[target.schedule or table.schedule]
    model = target.model or group.model or table.model
    own = [name for name in CLASSIFIERS if target.model is None and METRICS[name].reads(model)]
    # All cells of a table run in one arithmetic: embedded models on integers, which the processor samples much faster.
    runtime = ENGINE if target.model is None else SIMULATE
    base: Options = {"eval": {"metrics": [*own, *ALWAYS], "runtime": runtime, "floor": bool(own)}}
    base["distill"] = {"protect": 0}  # all rows have the bits that they name
    if target.model is None or target.schedule is not None:
        base = _merged([base, {stage: dict(values) for stage, values in schedule.options.items()}])
    merged = _merged([base, *layers])
    if target.model is not None and "metrics" not in target.overrides.get("eval", {}):
        merged["eval"]["metrics"] = _with_files(merged["eval"])
    missing = [name for name in table.published.needs if not _given(merged, name)] if target.model is not None else []
    if missing:
        options = " ".join(f"--set {name}=FILE" for name in missing)
        return Cell(row.name, group.name, seed, problem=f"{table.name} needs {options}")
    try:
        asked = target.overrides.get("distill", {})
        merged["distill"] = _scaled_iterations(merged.get("distill", {}), row.options.get("distill", {}), asked)
        merged["distill"] = _with_sampler_defaults(model, merged)
        if "distill" in table.stages and (target.model is None or target.schedule is not None):
            merged["distill"] = _shortened(merged.get("distill", {}), schedule.share)
        for stage in ("calibrate", "distill", "eval"):
            merged.setdefault(stage, {})["seed"] = seed
        return Cell(row.name, group.name, seed, tuple(_chain(model, merged, table.stages)))
    except UsageError as error:
        return Cell(row.name, group.name, seed, problem=str(error))


def _merged(layers: Sequence[Mapping[str, Mapping[str, Any]]]) -> Options:
    return {stage: {k: v for layer in layers for k, v in layer.get(stage, {}).items()} for stage in STAGES}


def _given(options: Options, name: str) -> bool:
    stage, _, option = name.partition(".")
    return option.replace("-", "_") in options.get(stage, {})


def _with_files(values: Mapping[str, Any]) -> list[str]:
    """Return the metrics of a published model: those that are named, and those that the given files allow."""
    files = files_of(make_options("eval", values))
    return [*values["metrics"], *computable_metrics(files, prompts=files.clip is not None)]


def _scaled_iterations(
    values: Mapping[str, Any], of_row: Mapping[str, Any], asked: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the options of `distill` with a table's iterations converted to the method's.

    A table gives iterations for each block. A method that trains the network as a whole gets its own default times the same
    ratio, and a method that trains nothing gets none. Iterations that the row gives, or that are `asked` for on the command
    line, stay.
    """
    has, of_block = _recipe(values.get("method"), values.get("preset")), _recipe("bkd")
    found = dict(values)
    for key in ITERATIONS:
        if key in values and key not in of_row:
            if not has.get(key):
                del found[key]
            elif key not in asked:
                found[key] = max(min(1, values[key]), round(values[key] * has[key] / of_block[key]))
    return found


def _with_sampler_defaults(model: str, options: Options) -> dict[str, Any]:
    """Return the options of `distill` with the defaults for the sampler, before a schedule shortens them."""
    from dqtool.models.sampling.sampler import scheduler_class
    from dqtool.stages.options.distill import with_sampler_defaults

    values, dilate = dict(options["distill"]), options.get("dilate", {})
    source = _source(model, _of_source(dilate))
    given = make_options("distill", values)
    found = with_sampler_defaults(given, scheduler_class(source.scheduler, options.get("calibrate", {}).get("sampler")))
    changed = {name: getattr(found, name) for name in ("refine_iters", "correct_noise")}
    return values | {name: value for name, value in changed.items() if value != getattr(given, name)}


def _shortened(values: Mapping[str, Any], share: float) -> dict[str, Any]:
    """Return the options of `distill` with iterations that nobody chose set to a share of the method's default."""
    if share == 1:
        return dict(values)
    defaults = _recipe(values.get("method"), values.get("preset"))
    given = dict(values)
    untrained = given.get("iters") == 0
    for key in ITERATIONS:
        if defaults.get(key) and key not in given and not untrained:
            given[key] = max(1, round(defaults[key] * share))
    return given


def _chain(model: str, options: Options, stages: Sequence[str]) -> Iterator[Step]:
    """Yield the steps of one cell. Scaling methods that compare outputs do so at the bits of the cell."""
    from dqtool.scaling.methods import scaling_method
    from dqtool.stages.options.calibrate import AUTO, KEEP

    options = {stage: dict(values) for stage, values in options.items()}
    scaling = options["calibrate"].get("scaling", AUTO)
    if scaling != KEEP and scaling_method(scaling).needs_samples:
        options["calibrate"].setdefault("bits", options["distill"].get("bits", "4/4"))
    dilate = options.get("dilate", {})
    digest = model_digest(model, dilate)
    if "eval" in stages and options["eval"].get("runtime") != SIMULATE:
        stages = [*stages[:-1], "export", "eval"]  # engines run exports; exporting changes no figure
    step = _step("dilate", dilate, model, [digest])
    yield step
    for stage in stages[1:]:
        extra = [digest] if stage == "eval" else []  # eval compares with the model itself
        step = _step(stage, options.get(stage, {}), model, [step.key, *extra], step)
        yield step


def _step(stage: str, values: Mapping[str, Any], model: str, inputs: list[str], source: Step | None = None) -> Step:
    options = make_options(stage, {**values, "model": model} if stage == "dilate" else values)
    parameters = _parameters(stage, options)
    version = import_module(f"dqtool.stages.{stage}").CODE_VERSION
    key = fingerprint(stage, version, parameters, inputs)
    before = (None, None) if source is None else (source.key, source.stage)
    return Step(stage, dict(values), parameters, key, model, *before)


def _recipe(method: str | None, preset: str | None = None) -> dict[str, Any]:
    """Return the default options of a training method."""
    options = make_options("distill", {"method": method, "preset": preset})
    recipe: dict[str, Any] = _parameters("distill", options)["recipe"]
    return recipe


def _parameters(stage: str, options: Any) -> dict[str, Any]:
    """Return the parameters that determine a stage's result, as the stage itself defines them.

    Versions of figures that were added later are left out: a cell without them counts as finished (`--refresh` runs it again).
    """
    if stage == "export":
        return {"format": options.format}
    of_stage = import_module(f"dqtool.stages.{stage}").fingerprint_parameters
    if stage != "eval":
        result: dict[str, Any] = of_stage(options)
        return result
    parameters = of_stage(options, options.metrics or ())
    return {name: value for name, value in parameters.items() if name != "figures_added"}


@lru_cache
def _source(model: str, dilate: str) -> ModelSource:
    result: ModelSource = make_options("dilate", {"model": model, **json.loads(dilate)}).source()
    return result


def model_digest(model: str, dilate: Mapping[str, Any]) -> str:
    """Return the sha256 of the model's weights, as `dilate` records it with these options.

    Raises:
        EnvironmentFault: there is no such model.
    """
    return _source(model, _of_source(dilate)).sha256()


def _of_source(dilate: Mapping[str, Any]) -> str:
    """Return the options that identify the model, as JSON."""
    return canonical_json({key: dilate[key] for key in SOURCE_OPTIONS if dilate.get(key) is not None})
