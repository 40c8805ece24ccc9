from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from dqtool.artifacts import STAGES
from dqtool.errors import EnvironmentFault, UsageError
from dqtool.recipe import Recipe, load_recipe
from dqtool.stages.registry import chained_stages

OPTIONS: dict[str, dict[str, type]] = {
    "dilate": {"scaling": str, "fold": bool},
    "calibrate": {"steps": int, "seed": int, "eta": float, "batch-size": int, "prompts": Path},
    "distill": {"bits": str, "iters": int, "keep": list},
    "export": {"format": str},
    "eval": {"samples": int, "metrics": str},
}
GOOD = """\
# a comment
title: Digits at 4/4
model: zoo:digits-ddpm
stages:
  dilate:
  calibrate:
    steps: 20
    eta: 1e-4
    prompts: prompts.txt
  distill:
    bits: 4/4
    keep: ["conv_in=8/8", time=16/16]
  eval: {samples: 1024}
"""

Load = Callable[..., Recipe]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    monkeypatch.chdir(tmp_path)

    def loader(text: str, overrides: Sequence[str] = ()) -> Recipe:
        Path("r.yaml").write_text(text)
        return load_recipe("r.yaml", list(overrides), OPTIONS)

    return loader


def fault(load: Load, text: str, *overrides: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        load(text, overrides)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    return caught.value


def with_option(stage: str, line: str) -> str:
    """A recipe whose fourth line is `line`."""
    return f"model: m\nstages:\n  {stage}:\n    {line}\n"


def test_a_good_recipe(load: Load):
    recipe = load(GOOD)
    assert (recipe.model, recipe.name, recipe.path, recipe.title) == (
        *("zoo:digits-ddpm", "r", Path("r.yaml"), "Digits at 4/4"),
    )
    assert recipe.stages == [
        ("dilate", {}),
        ("calibrate", {"steps": 20, "eta": 1e-4, "prompts": "prompts.txt"}),
        ("distill", {"bits": "4/4", "keep": ["conv_in=8/8", "time=16/16"]}),
        ("eval", {"samples": 1024}),
    ]


def test_overrides(load: Load):
    overrides = [
        *("model=other/dir", "distill.bits=8/8", "distill.keep=a=4/4", "calibrate.batch-size=8"),
        *("dilate.fold=true", "calibrate.eta=1", "calibrate.eta=0"),
    ]
    recipe = load(GOOD, overrides)
    stages = dict(recipe.stages)
    assert recipe.model == "other/dir" and stages["distill"] == {"bits": "8/8", "keep": ["a=4/4"]}
    assert stages["calibrate"]["batch-size"] == 8 and stages["dilate"] == {"fold": True}
    assert stages["calibrate"]["eta"] == 0.0 and type(stages["calibrate"]["eta"]) is float
    assert load("stages: {dilate: }", ["model=m"]).model == "m"


@pytest.mark.parametrize(
    ("text", "what", "where", "fix"),
    [
        ("modle: m\nstages:\n  dilate:\n", "Unknown key: modle", "r.yaml:1", "Did you mean model?"),
        ("model: m\nstages:\n  dilate:\n  callibrate:\n", "Unknown stage: callibrate", "r.yaml:4", "mean calibrate?"),
        (with_option("calibrate", "step: 20"), "Unknown option of calibrate: step", "r.yaml:4", "mean steps?"),
        (with_option("calibrate", "batch_size: 2"), "Unknown option of calibrate", "r.yaml:4", "mean batch-size?"),
        (with_option("calibrate", "--seed: 2"), "Unknown option of calibrate", "r.yaml:4", "mean seed?"),
        (with_option("calibrate", "zzz: 2"), "Unknown option of calibrate", "r.yaml:4", "Valid: steps, seed"),
        (with_option("distill", "steps: 2"), "Unknown option of distill: steps", "r.yaml:4", "Valid: bits"),
        (with_option("distill", "[a]: 2"), "Unknown option", "r.yaml:4", "Valid: bits"),
    ],
)
def test_unknown_names_have_a_line_and_a_suggestion(load: Load, text: str, what: str, where: str, fix: str):
    error = fault(load, text)
    assert what in error.what and error.where == where and fix in (error.fix or "")


@pytest.mark.parametrize(
    ("text", "what", "where"),
    [
        ("model: m\nmodel: n\nstages:\n", "model is given twice, first on line 1", "r.yaml:2"),
        ("model: m\nstages:\n  dilate:\n  dilate:\n", "dilate is given twice, first on line 3", "r.yaml:4"),
        (with_option("export", "format: a\n    format: b"), "format is given twice, first on line 4", "r.yaml:5"),
        ("model: m\nstages:\n  distill:\n  dilate:\n", "dilate can not follow distill", "r.yaml:4"),
        ("model: m\nstages:\n  - dilate\n", "A mapping", "r.yaml:3"),
        ("model: m\nstages:\n  dilate: wd\n", "A mapping", "r.yaml:3"),
        ("- model\n", "A mapping", "r.yaml:1"),
        ("model: [a]\nstages:\n  dilate:\n", "model needs a text", "r.yaml:1"),
        ("stages:\n  dilate:\n", "names no model", "r.yaml"),
        ("model: m\n", "names no stages", "r.yaml"),
        ("", "names no model", "r.yaml"),
        ("model: m\nstages:\n  dilate: {\n", "no valid YAML", "r.yaml:4"),
        ("model: m\n\tstages:\n", "no valid YAML", "r.yaml:2"),
        ("model: m\nstages: \x07\n", "no valid YAML", "r.yaml:2"),
        ("model: m\nstages: *base\n", "no valid YAML", "r.yaml:2"),
        ("model: m\n---\nmodel: n\n", "no valid YAML", "r.yaml:2"),
    ],
)
def test_faults_have_a_line(load: Load, text: str, what: str, where: str):
    error = fault(load, text)
    assert what in error.what and error.where == where


@pytest.mark.parametrize(
    ("stage", "line", "wanted"),
    [
        ("calibrate", "steps: many", "steps needs a whole number, and 'many' is given"),
        ("calibrate", "steps: 2.5", "a whole number"),
        ("calibrate", "steps: true", "a whole number"),
        ("calibrate", "steps:", "a whole number, and nothing is given"),
        ("calibrate", "steps: [1]", "a whole number, and a list"),
        ("calibrate", "steps: !!int x", "a whole number"),
        ("calibrate", "steps: !mine 3", "a whole number"),
        ("calibrate", "steps: !!int [1]", "a whole number"),
        ("calibrate", "eta: high", "a number"),
        ("calibrate", "eta: false", "a number"),
        ("dilate", "fold: 1", "true or false"),
        ("dilate", "scaling: true", "a text"),
        ("dilate", "scaling: null", "a text, and 'null' is given"),
        ("dilate", "scaling: ~", "a text, and '~' is given"),
        ("dilate", "scaling:", "a text, and nothing is given"),
        ("calibrate", "steps: 1e3", "a whole number, and '1e3' is given"),
        ("calibrate", "eta: 1:30", "a number, and '1:30' is given"),
        ("distill", "bits: [4, 4]", "a text"),
        ("distill", "keep: {a: 4/4}", "a list of texts"),
        ("distill", "keep: [[a]]", "a list of texts"),
    ],
)
def test_values_of_another_type_have_a_line(load: Load, stage: str, line: str, wanted: str):
    error = fault(load, with_option(stage, line))
    assert wanted in error.what and error.where == "r.yaml:4"


@pytest.mark.parametrize(
    ("stage", "line", "value"),
    [
        ("distill", "bits: 8", "8"),
        ("dilate", "scaling: none", "none"),
        ("dilate", "fold: off", False),
        ("calibrate", "eta: 1", 1.0),
        ("calibrate", "seed: -3", -3),
        ("dilate", "scaling: off", "off"),
        ("dilate", "scaling: On", "On"),
        ("dilate", "scaling: 'null'", "null"),
        ("dilate", "scaling: 'true'", "true"),
        ("dilate", "scaling: 010", "010"),
        ("eval", "metrics: no", "no"),
        ("distill", "keep: [yes, 'no']", ["yes", "no"]),
        ("dilate", "fold: yes", True),
        ("calibrate", "seed: 010", 10),
        ("calibrate", "eta: 1e3", 1000.0),
        ("calibrate", "eta: 010", 10.0),
        ("calibrate", "eta: .inf", float("inf")),
        ("calibrate", "seed: 0x10", 16),
        ("distill", "keep: a=4/4", ["a=4/4"]),
        ("eval", "metrics: fd,is", "fd,is"),
    ],
)
def test_values_are_read_as_the_command_line_would(load: Load, stage: str, line: str, value: Any):
    ((_, options),) = load(with_option(stage, line)).stages
    assert list(options.values()) == [value]
    key, _, written = line.partition(": ")
    ((_, options),) = load(f"model: m\nstages: {{{stage}: {{}}}}\n", [f"{stage}.{key}={written}"]).stages
    assert list(options.values()) == [value]


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("distill.bits", "needs a value"),
        ("distill.bits=", "needs a value"),
        ("steps=3", "Unknown key: steps"),
        ("distil.bits=4/4", "Unknown stage: distil"),
        ("export.format=dq", "The recipe has no stage export"),
        ("distill.bit=4/4", "Unknown option of distill: bit"),
        ("calibrate.steps=many", "steps needs a whole number"),
        ("model=[", "no valid YAML"),
        ("model={a: b}", "model needs a text"),
    ],
)
def test_bad_overrides(load: Load, override: str, what: str):
    error = fault(load, GOOD, override)
    assert what in error.what and (error.where or "").startswith(f"--set {override}")


def test_missing_file_is_the_environment_and_no_text_is_no_recipe(tmp_path: Path):
    with pytest.raises(EnvironmentFault, match=r"no such recipe.*gone\.yaml"):
        load_recipe(tmp_path / "gone.yaml", [], OPTIONS)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, tmp_path / "binary.yaml"):
        with pytest.raises(UsageError, match="no recipe"):
            load_recipe(path, [], OPTIONS)


def test_the_order_is_that_of_the_commands():
    assert chained_stages() == ("dilate", "calibrate", "distill", "export", "eval") == STAGES[:5]
