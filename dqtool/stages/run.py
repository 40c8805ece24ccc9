"""`dqtool run`: the stages a recipe names, each on the output of the one before."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from dqtool import report
from dqtool.artifacts import check_outside
from dqtool.artifacts.files import os_fault
from dqtool.errors import DqtoolError, UsageError
from dqtool.recipe import Recipe, load_recipe
from dqtool.stages.registry import chained_stages, default_output, make_options, option_types, stage_function
from dqtool.stages.shared.paths import WRITTEN
from dqtool.stages.shared.settings import RunSettings

__all__ = ["Step", "run", "run_steps", "stage_named_in_errors", "steps_of_recipe"]

Step = tuple[str, dict[str, Any]]
"""A stage and its options by field name."""


def run(path: str, overrides: Sequence[str], settings: RunSettings, directory: str | None = None) -> str:
    """Run a recipe in `directory` (`results/NAME` when None), which is made; returns the last artifact's path.

    Raises:
        UsageError: the recipe or an override asks for something that does not exist; nothing has been run then.
        DqtoolError: what a stage raises, with the stage's name in front.
    """
    recipe, steps = steps_of_recipe(path, overrides, directory)
    return run_steps(steps, replace(settings, reads=(path, recipe.model)))  # the log stays the caller's


def run_steps(steps: Sequence[Step], settings: RunSettings) -> str:
    """Run stages one after another and make the directories that they write to; return the last output's path.

    Raises:
        DqtoolError: what a stage raises, with the stage's name in front.
    """
    written = [values[key] for _, values in steps for key in sorted(WRITTEN) if values.get(key)]
    for output in written:
        check_outside(Path(output), settings.reads, output)
    for output in written:
        parent = os.path.dirname(output.rstrip("/"))
        if parent:
            try:
                os.makedirs(parent, exist_ok=True)
            except OSError as error:
                raise os_fault(error, parent) from error
    output = ""
    for number, (name, values) in enumerate(steps, start=1):
        report.say(f"[{number}/{len(steps)}] {name}")
        with stage_named_in_errors(name):
            output = stage_function(name)(make_options(name, values), settings)
    return output


@contextmanager
def stage_named_in_errors(stage: str) -> Iterator[None]:
    """Put the stage's name in front of what it raises."""
    try:
        yield
    except DqtoolError as error:
        error.what = f"{stage}: {error.what}"
        raise


PRESET_OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {"dilate": {"scaling": "wd"}, "calibrate": {"scaling": "keep"}, "distill": {"preset": "paper"}},
}
"""Options that the preset of a recipe sets, by stage; an option of the recipe itself wins."""


def _preset_options(recipe: Recipe, path: str) -> dict[str, dict[str, Any]]:
    """Return the options that the recipe's preset, or the preset of its distill stage, sets in each stage.

    Raises:
        UsageError: there is no such preset.
    """
    of_distill = dict(recipe.stages).get("distill", {}).get("preset")
    if recipe.preset is None:
        return PRESET_OPTIONS.get(str(of_distill), {})
    if recipe.preset not in PRESET_OPTIONS:
        raise UsageError(
            f"unknown preset '{recipe.preset}'",
            where=f"{path}, key preset",
            fix=f"Choose from {', '.join(PRESET_OPTIONS)}",
        )
    return PRESET_OPTIONS[recipe.preset]


def steps_of_recipe(path: str, overrides: Sequence[str], directory: str | None = None) -> tuple[Recipe, list[Step]]:
    """Return the recipe and its stages as (name, values of its options by field name), inputs and outputs filled in."""
    recipe = load_recipe(path, overrides, {name: option_types(name) for name in chained_stages()})
    work = directory or os.path.join("results", recipe.name)
    steps: list[Step] = []
    previous = recipe.model
    preset = _preset_options(recipe, path)
    for name, given in recipe.stages:
        values = preset.get(name, {}) | {option.replace("-", "_"): value for option, value in given.items()}
        values.setdefault("output", default_output(name))
        for key in WRITTEN & values.keys():  # a bare name is in the run's directory; other paths are taken as they are
            if not os.path.dirname(values[key].rstrip("/")):
                values[key] = os.path.join(work, values[key])
        values["model" if name == "dilate" else "artifact"] = previous
        if name == "eval" and recipe.stages[0][0] == "dilate":
            values.setdefault("reference", recipe.model)
        with stage_named_in_errors(name):
            make_options(name, values)
        steps.append((name, values))
        previous = values["output"]
    return recipe, steps
