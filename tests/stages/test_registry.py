"""A stage is one entry, and an option one annotated field: the command, recipes, bounds and dry runs follow from them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

from dqtool.cli.stages import add_stage
from dqtool.errors import UsageError
from dqtool.recipe import load_recipe
from dqtool.stages.options.declared import Option, declared_options
from dqtool.stages.options.shared import ARTIFACT, OUTPUT
from dqtool.stages.registry import (
    STAGES,
    Stage,
    chained_stages,
    default_output,
    make_options,
    option_types,
    options_class,
    plan_function,
    stage_function,
    work_function,
)
from dqtool.stages.shared.settings import Execution, RunSettings


@dataclasses.dataclass(frozen=True)
class ToyOptions:
    """Options of the toy stage."""

    artifact: Annotated[str | None, ARTIFACT] = None
    output: Annotated[str, OUTPUT] = "toy.safetensors"
    copies: Annotated[int, Option("Copies to make.", "N", least=1, most=9)] = 2
    rate: Annotated[float | None, Option("Rate of copying; left out: as fast as can be.", "F", least=0)] = None
    names: Annotated[tuple[str, ...], Option("A name; may be repeated.", "NAME")] = ()
    kinds: Annotated[tuple[str, ...] | None, Option("Kinds, all in one.", "A,B", separated=True)] = None
    loud: Annotated[bool, Option("Say so.")] = False
    checked: Annotated[bool | None, Option("Check the copies.")] = None


SEEN: list[ToyOptions] = []


def toy(options: ToyOptions, settings: RunSettings) -> str:
    SEEN.append(options)
    settings.log.append(Execution("toy", options.output, dataclasses.asdict(options), [], cached=False))
    return options.output


def toy_work(_: Execution, options: ToyOptions) -> dict[str, Any]:
    return {"copies": options.copies}


@pytest.fixture(autouse=True)
def toy_stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    stage = Stage(
        f"{__name__}:ToyOptions", f"{__name__}:toy", f"{__name__}:toy_work", "Copy.\n\nIt copies.", ("dqtool toy a",)
    )
    monkeypatch.setitem(STAGES, "toy", stage)
    SEEN.clear()
    return stage


def invoke(stage: Stage, *arguments: str) -> None:
    group = typer.Typer()
    add_stage("toy", stage, group)
    typer.main.get_command(group).main(list(arguments), standalone_mode=False)


def test_the_command_passes_what_was_typed(toy_stage: Stage, capsys: pytest.CaptureFixture) -> None:
    invoke(
        toy_stage, "a", "-o", "b", "--copies", "3", "--names", "x", "--names", "y", "--kinds", "p, q", "--no-checked"
    )
    assert [ToyOptions("a", "b", copies=3, names=("x", "y"), kinds=("p", "q"), checked=False)] == SEEN
    assert capsys.readouterr().out == "b\n"


def test_what_is_not_typed_is_at_its_default(toy_stage: Stage) -> None:
    invoke(toy_stage)
    assert [ToyOptions()] == SEEN


def test_a_dry_run_prints_the_work(toy_stage: Stage, capsys: pytest.CaptureFixture) -> None:
    invoke(toy_stage, "--copies", "4", "--dry-run", "--json")
    assert json.loads(capsys.readouterr().out)["work"] == {"copies": 4}


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("copies", 0, "too small"),
        ("copies", 10, "too large"),
        ("rate", -1.0, "too small"),
        ("rate", float("nan"), "finite"),
    ],
)
def test_numbers_are_bounded_wherever_they_come_from(
    toy_stage: Stage, tmp_path: Path, option: str, value: float, message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        make_options("toy", {option: value})
    assert caught.value.where == f"--{option}"
    with pytest.raises(UsageError, match=message):
        invoke(toy_stage, f"--{option}", str(value))


def test_recipes_know_the_stage_its_options_and_its_place(tmp_path: Path) -> None:
    assert chained_stages()[-1] == "toy"
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: m\nstages:\n  dilate: {}\n  toy: {copies: 3, names: [x], kinds: [p], loud: true}\n")
    types = {name: option_types(name) for name in chained_stages()}
    assert types["toy"] == {
        "output": str, "copies": int, "rate": float, "names": list, "kinds": list, "loud": bool, "checked": bool
    }  # fmt: skip
    found = load_recipe(recipe, ["toy.copies=4"], types)
    assert found.stages[-1] == ("toy", {"copies": 4, "names": ["x"], "kinds": ["p"], "loud": True})
    recipe.write_text("model: m\nstages:\n  toy: {}\n  dilate: {}\n")
    with pytest.raises(UsageError, match="can not follow toy"):
        load_recipe(recipe, [], types)


def test_a_field_without_an_option_is_refused() -> None:
    @dataclasses.dataclass
    class Bare:
        steps: int = 1

    with pytest.raises(TypeError, match="steps declares no option"):
        declared_options(Bare)


@pytest.mark.parametrize("name", [name for name in STAGES if name != "toy"])
def test_every_entry_names_what_exists(name: str) -> None:
    assert dataclasses.is_dataclass(options_class(name))
    assert callable(stage_function(name))
    assert callable(plan_function(name) or work_function(name))
    assert default_output(name)
    assert all(each.option.help for each in declared_options(options_class(name)))
