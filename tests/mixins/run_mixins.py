"""Run diffusers' own test mixins for quantized models and for pipelines on dqtool's exports, and write a table.

    python tests/mixins/run_mixins.py CHECKOUT [-o recipes/results/mixins]

CHECKOUT is a checkout of diffusers' repository. Its tests are copied to a temporary folder, with `suite_models.py` and
`suite_pipelines.py` beside the mixins. Failures are listed with their reason: `REASONS` names diffusers' rules that a
calibrated network can't follow; every other failure makes the exit code 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

KINDS = {"sd": "unet", "pixart": "transformer", "sd3": "transformer", "flux": "transformer"}
"""Pipelines of `tests/families.py`, with the name of their network."""

PLACES = {"models": "models/test_dqtool_models.py", "pipelines": "pipelines/test_dqtool_pipelines.py"}
"""Suites, with their places among diffusers' tests."""

REASONS: dict[str, str] = {
    "dtype_assignment": "diffusers' rule: a quantized model refuses casts. Ones of dqtool take them, since pipelines cast",
    "quantized_layers": "diffusers' rule: quantized layers are subclasses of `nn.Linear`. Ones of dqtool are not",
    "modules_to_not_convert": "diffusers' rule: layers are quantized while loading. An export is quantized already, and says so",
    "test_training": "diffusers' rule: gradients flow through quantized layers. Integer engines have none (`is_trainable`)",
}
"""Reasons of failures, by a pattern of the name and message of the test."""


def prepare(area: Path) -> None:
    """Write float and exported pipelines, and the arguments of their networks."""
    import torch
    from families import NETWORKS, text_pipeline

    from dqtool.models.families import FAMILIES
    from dqtool.stages.calibrate import CalibrateOptions, calibrate
    from dqtool.stages.dilate import DilateOptions, dilate
    from dqtool.stages.distill import DistillOptions, distill
    from dqtool.stages.export import ExportOptions, export
    from dqtool.stages.shared.settings import RunSettings

    quiet = RunSettings(quiet=True)
    (area / "exported").mkdir()
    for kind in KINDS:
        model = text_pipeline("sd3-t5" if kind == "sd3" else kind, area / "float" / kind)
        at = {letter: str(area / f"{kind}-{letter}.safetensors") for letter in "dcq"}
        dilate(DilateOptions(str(model), at["d"]), quiet)
        calibrate(CalibrateOptions(at["d"], at["c"], steps=2, samples=6, batch_size=3), quiet)
        distill(DistillOptions(at["c"], at["q"], bits="4/8", iters=0, refine_iters=0, protect=0.0), quiet)
        export(ExportOptions(at["q"], str(area / "exported" / kind)), quiet)
        config = NETWORKS["unet2d_condition" if kind == "sd" else kind]
        torch.save(FAMILIES[config["_class_name"]].example(config, batch=2), area / f"{kind}.pt")


def run(checkout: Path, area: Path, suites: Collection[str]) -> list[dict[str, str]]:
    """Run the named suites; return suite, class, test, outcome and message of each test.

    Raises:
        SystemExit: diffusers' tests can't be imported.
    """
    suite = area / "suite"
    shutil.copytree(checkout / "tests", suite / "tests")
    found = []
    environment = {**os.environ, "DQTOOL_MIXINS": str(area), "DIFFUSERS_TEST_DEVICE": "cpu"}
    for name in suites:
        place = PLACES[name]
        shutil.copy(HERE / f"suite_{name}.py", suite / "tests" / place)
        report = area / f"{name}.xml"
        command = [sys.executable, "-m", "pytest", f"tests/{place}", "-q", "-p", "no:cacheprovider", "--tb=short"]
        ran = subprocess.run([*command, f"--junitxml={report}"], cwd=suite, env=environment, check=False)
        if ran.returncode not in (0, 1):
            raise SystemExit(f"the tests of {name} can't run: see pytest's message above")
        for case in ElementTree.parse(report).iter("testcase"):
            outcome = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
            message = "" if outcome is None else (outcome.get("message") or "").strip()
            state = "passed" if outcome is None else "skipped" if outcome.tag == "skipped" else "failed"
            owner = str(case.get("classname")).rpartition(".")[2]
            found.append(
                {
                    "suite": name,
                    "class": owner,
                    "test": str(case.get("name")),
                    "outcome": state,
                    "message": re.sub(r"\s+", " ", message)[:300],
                }
            )
    return found


def reason_of(row: dict[str, str]) -> str | None:
    """Return diffusers' rule that a test needs, or None."""
    text = f"{row['test']}: {row['message']}"
    return next((why for pattern, why in REASONS.items() if re.search(pattern, text)), None)


def write(rows: list[dict[str, str]], version: str, path: Path) -> int:
    """Write PATH.json and PATH.md; return the number of failures without a reason."""
    for row in rows:
        row["why"] = reason_of(row) or "" if row["outcome"] == "failed" else ""
    path.with_suffix(".json").write_text(
        json.dumps({"command": "make mixins DIFFUSERS=path/to/checkout", "diffusers": version, "tests": rows}, indent=1)
        + "\n"
    )
    groups = sorted({(row["suite"], row["class"]) for row in rows})
    lines = [
        "# diffusers' own test mixins on dqtool's networks",
        "",
        f"`make mixins DIFFUSERS=path/to/checkout`, tests of {version}: the mixin for quantized models, and the one for pipelines "
        "with a quantized network, on tiny networks of four families at 4/8, on the fastest engine of the CPU.",
        "",
        *([] if any(suite == "pipelines" for suite, _ in groups) else ["The mixin for pipelines was not run.", ""]),
        "| mixin | tests of | run | passed | skipped | failed |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for suite, owner in groups:
        mine = Counter(row["outcome"] for row in rows if (row["suite"], row["class"]) == (suite, owner))
        counts = [sum(mine.values()) - mine["skipped"], mine["passed"], mine["skipped"], mine["failed"]]
        lines.append(f"| {suite} | {owner} | {' | '.join(map(str, counts))} |")
    total: Any = Counter(row["outcome"] for row in rows)
    counts = [len(rows) - total["skipped"], total["passed"], total["skipped"], total["failed"]]
    lines += [f"| all | | {' | '.join(map(str, counts))} |", "", "| failed | in | why |", "| --- | --- | --- |"]
    failed = [row for row in rows if row["outcome"] == "failed"]
    for test in dict.fromkeys(row["test"] for row in failed):
        of = [row for row in failed if row["test"] == test]
        why = of[0]["why"] or f"dqtool's fault: {of[0]['message'][:150]}"
        lines.append(f"| {test} | {', '.join(row['class'] for row in of)} | {why.replace('|', chr(92) + '|')} |")
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return sum(not row["why"] for row in failed)


def main() -> int:
    """Prepare, run both suites and write the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkout", type=Path, help="checkout of diffusers' repository")
    parser.add_argument(
        "-o", "--output", type=Path, default=HERE.parents[1] / "recipes" / "results" / "mixins", metavar="PATH"
    )
    parser.add_argument("--suites", nargs="+", choices=[*PLACES], default=[*PLACES], help="the other's results stay")
    options = parser.parse_args()
    path = options.output.with_suffix(".json")
    stored = json.loads(path.read_text(encoding="utf-8"))["tests"] if path.is_file() else []
    setup = (options.checkout / "setup.py").read_text(encoding="utf-8")
    version = re.search(r'version="([^"]+)"', setup)
    with tempfile.TemporaryDirectory(prefix="dqtool-mixins-") as area:
        prepare(Path(area))
        rows = run(options.checkout, Path(area), options.suites)
        rows = [row for row in stored if row["suite"] not in options.suites] + rows
    return 1 if write(rows, f"diffusers {version[1] if version else 'unknown'}", options.output) else 0


if __name__ == "__main__":
    sys.exit(main())
