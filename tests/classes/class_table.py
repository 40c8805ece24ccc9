"""Run every stage on a tiny network of each denoiser class, and write recipes/results/classes.md and .json.

    python tests/classes/class_table.py [CLASS ...] [-o recipes/results/classes]

Without names all classes run. A class that runs again replaces its row. The exit code is 1 if a row got worse.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from denoisers import DENOISERS, build_denoiser, example_tensors
from safetensors.torch import save_file
from torch import Tensor, nn

import dqtool
from dqtool.artifacts import open_artifact
from dqtool.errors import DqtoolError, UsageError
from dqtool.models.families import FAMILIES, family_of
from dqtool.nn.packed_layer import PackedLayer
from dqtool.nn.prediction import prediction_of
from dqtool.stages.calibrate import CalibrateOptions, calibrate
from dqtool.stages.dilate import DilateOptions, dilate
from dqtool.stages.distill import DistillOptions, distill
from dqtool.stages.export import ExportOptions, export
from dqtool.stages.shared.settings import RunSettings
from dqtool.training.data import Trajectory

__all__ = ["STAGES", "measure", "write_table"]

QUIET = RunSettings(quiet=True)
STAGES = ("dilate", "calibrate", "distill", "export", "simulate", "cpu", "openvino", "from_pretrained", "train")
BITS = ("8/8", "4/8")
"""Bits of the two exports; the first runs on every engine."""
HINTS = {"_sample_size": 8, "_context_tokens": 6}
"""Config entries for what the adapters' classes leave open."""
ROUNDING, CHAOS = 1e-6, 2.0
"""Relative change of a layer's input that is as small as the rounding of floats, and how much more an engine may differ
than `simulate` does from itself at that change."""
CLOSE = 0.02
"""Largest relative difference of two engines: a code that rounding moves to its neighbour changes more than rounding."""


def measure(
    name: str,
    directory: Path,
    bits: Sequence[str] = BITS,
    engines: Sequence[str] = ("cpu", "openvino"),
    train: bool = True,
) -> dict[str, Any]:
    """Return the row of one class: each stage's "yes" or the message of its error, errors of the output, attentions."""
    row: dict[str, Any] = {"class": name, "family": "generic" if name not in FAMILIES else FAMILIES[name].name}
    row |= {"stages": {}, "errors": {}, "attention": [0, 0], "notes": []}
    stages = row["stages"]

    def attempt(stage: str, work: Callable[[], Any]) -> Any:
        """Run one stage; what a failed stage leaves out fails the stages that need it."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = work()
        except Exception as e:
            if os.environ.get("DEBUG"):
                traceback.print_exc()
            first = next(iter(str(e).strip().splitlines()), "")
            stages.setdefault(stage, f"{type(e).__name__}: {first:.120}")
            return None
        stages.setdefault(stage, "yes")
        return result

    network = build_denoiser(name)
    options = dilate_options(name, network, directory)
    at = {letter: str(directory / f"{letter}.safetensors") for letter in "dc"}
    if attempt("dilate", lambda: dilate(options, QUIET)) is None:
        return row
    request = CalibrateOptions(at["d"], at["c"], steps=2, samples=6, batch_size=3, random_conditions=True)
    if attempt("calibrate", lambda: calibrate(request, QUIET)) is None:
        return row
    for each in bits:
        quantized, exported = str(directory / f"q{each[0]}.safetensors"), str(directory / f"export{each[0]}")
        plan = DistillOptions(at["c"], quantized, bits=each, iters=0, refine_iters=0, protect=0.0)
        if attempt("distill", lambda plan=plan: distill(plan, QUIET)) is None:
            return row
        if attempt("export", lambda q=quantized, x=exported: export(ExportOptions(q, x), QUIET)) is None:
            return row
        try:
            call = Call(at["c"])
            expected = call(network)
        except DqtoolError as e:
            row["notes"].append(str(e)[:200])
            return row
        simulated = attempt("simulate", lambda call=call, x=exported: call(dqtool.load(x, "simulate")))
        if simulated is not None:
            row["errors"][each] = round(difference(simulated, expected), 4)
        if each != bits[0]:
            continue
        for engine in engines:
            attempt(engine, lambda e=engine, c=call, x=exported, s=simulated: follows(e, x, c, s, row["notes"]) or True)
        attempt("from_pretrained", lambda call=call, x=exported, s=simulated: same(call(hub_network(name, x)), s, 1e-6))
    if train:
        attempt("train", lambda: trained(at["c"], directory, call, row["notes"]))
    manifest = open_artifact(exported).manifest
    kept = [
        why
        for why in open_artifact(at["d"]).manifest.metrics.as_read.get("kept_float", {}).values()
        if "products" in why
    ]
    integers = sum(layer.kind == "attention" and max(layer.bits) <= 8 for layer in manifest.layers)
    row["attention"] = [integers, integers + len(kept)]
    row["layers"] = sum(layer.kind != "attention" for layer in manifest.layers)
    row["notes"] += sorted(set(kept))
    return row


def dilate_options(name: str, network: Any, directory: Path) -> DilateOptions:
    """Write the model, its example and its scheduler; return the options of `dilate`."""
    import diffusers

    denoiser, model = DENOISERS[name], directory / "model"
    network.save_pretrained(model)
    given: dict[str, Any] = {}
    if name in FAMILIES:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | HINTS))
    else:
        given["family"] = "generic"
        tensors = example_tensors(name)
        save_file({key: value.contiguous() for key, value in tensors.items()}, directory / "example.safetensors")
        if denoiser.structure:
            (directory / "example.json").write_text(json.dumps(denoiser.structure))
        if tensors or denoiser.structure:
            given["example"] = str(directory / "example.safetensors")
        given["time_scale"] = denoiser.time_scale
    scheduler = getattr(diffusers, denoiser.scheduler)()
    scheduler.save_pretrained(directory / "scheduler")
    return DilateOptions(str(model), str(directory / "d.safetensors"), scheduler=str(directory / "scheduler"), **given)


class Call:
    """The same two calibration samples of every step, for any network of one class."""

    def __init__(self, calibrated: str) -> None:
        artifact = open_artifact(calibrated)
        self.config = dict(artifact.manifest.network.config)
        self.family = family_of(artifact.manifest.network.class_name, calibrated, self.config)
        self.points = Trajectory.from_tensors(artifact.tensors())

    @torch.no_grad()
    def __call__(self, network: nn.Module) -> Tensor:
        """Return the predictions, `[T, 2, ...]`."""
        outputs = []
        for step, timestep in enumerate(self.points.timesteps):
            chosen = (self.points.rows == step).nonzero()[:2, 0]
            arguments = self.family.arguments(self.points.x[chosen], timestep, self.points.conditions_of(chosen))
            outputs.append(prediction_of(network(**arguments, return_dict=False)))
        return torch.stack(outputs)


def trained(calibrated: str, directory: Path, call: Call, notes: list[str]) -> bool:
    """Train every block, and the network, for one iteration; raise `ValueError` where the export computes nothing finite.

    A loss that is not finite ends `distill --strict` with an error. Networks whose blocks can't be trained separately are
    trained as a whole, as the error says.
    """
    quantized, exported = str(directory / "trained.safetensors"), str(directory / "trained")
    plan = DistillOptions(
        calibrated, quantized, bits="4/8", iters=1, refine_iters=1, batch_size=3, protect=0.0, strict=True
    )
    try:
        distill(plan, QUIET)
    except UsageError as e:
        notes.append(f"train: as a whole. {e.what}")
        distill(replace(plan, method="on-policy", refine_iters=None), QUIET)
    export(ExportOptions(quantized, exported), QUIET)
    if not bool(torch.isfinite(call(dqtool.load(exported, "simulate"))).all()):
        raise ValueError("the trained network's output is not finite")
    return True


def hub_network(name: str, exported: str) -> nn.Module:
    """Return the network as diffusers loads it."""
    import diffusers

    config = dqtool.DqtoolConfig(runtime="simulate")
    return getattr(diffusers, name).from_pretrained(exported, quantization_config=config)


def difference(found: Tensor, expected: Tensor) -> float:
    """Return the relative error of an output."""
    return float((found - expected).norm() / expected.norm())


def same(found: Tensor, expected: Tensor | None, tolerance: float = CLOSE) -> float:
    """Return the difference of an engine from the reference; raise `ValueError` where it computes something else."""
    if expected is None:
        raise ValueError("there is no reference")
    error = difference(found, expected)
    if not error <= tolerance:
        raise ValueError(f"its output differs from simulate's by {error:.2g}")
    return error


def follows(engine: str, exported: str, call: Call, expected: Tensor | None, notes: list[str]) -> float:
    """Return the difference of an engine from `simulate`; raise `ValueError` where it is no rounding.

    A network that rounds codes at every layer can carry the last bit of a float to its output. Where an engine differs
    by more than `CLOSE`, `simulate` is compared with itself with inputs of all layers that differ by `ROUNDING`.
    """
    found = call(dqtool.load(exported, engine))
    if expected is None or difference(found, expected) <= CLOSE:
        return same(found, expected)
    own = difference(call(shaken(dqtool.load(exported, "simulate"))), expected)
    error = same(found, expected, CHAOS * own)
    notes.append(
        f"{engine} differs by {error:.2g}; simulate by {own:.2g} where inputs of layers change by {ROUNDING:g}"
    )
    return error


def shaken(network: nn.Module) -> nn.Module:
    """Multiply the inputs of all quantized layers by about 1 + `ROUNDING`, in place, as other orders of summation would."""
    generator = torch.Generator().manual_seed(0)

    def shake(_layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *rest = args
        return (x * (1 + ROUNDING * torch.randn(x.shape, generator=generator)), *rest)

    for module in network.modules():
        if isinstance(module, PackedLayer):
            module.register_forward_pre_hook(shake)
    return network


def merged(old: Mapping[str, Any], new: Mapping[str, Any], stages: Sequence[str]) -> dict[str, Any]:
    """Return the old row with what the new one found about `stages`."""
    found = {stage: new["stages"].get(stage, "not reached") for stage in stages}
    told = {stage: old["stages"].get(stage) for stage in STAGES} | found
    notes = [note for note in old["notes"] if not note.startswith(tuple(stages))]
    notes += [note for note in new["notes"] if note not in notes]
    return {**old, "stages": {stage: how for stage, how in told.items() if how is not None}, "notes": notes}


def worse(
    old: Mapping[str, Any], new: Mapping[str, Any], without: Sequence[str] = (), bits: Sequence[str] = BITS
) -> list[str]:
    """Return what a new row lost against an old one, but for the stages in `without`, which did not run."""
    lost = [
        f"{new['class']}: {stage}: {new['stages'].get(stage, 'not reached')}"
        for stage, found in old["stages"].items()
        if found == "yes" and new["stages"].get(stage) != "yes" and stage not in without
    ]
    if new["attention"][0] < old["attention"][0]:
        lost.append(f"{new['class']}: {new['attention'][0]} attentions in integers, {old['attention'][0]} before")
    for each in bits:
        error = old["errors"].get(each)
        if error is not None and new["errors"].get(each, 1e9) > 1.5 * error + 0.005:
            lost.append(f"{new['class']}: the error at {each} is {new['errors'].get(each)}, {error} before")
    return lost


def write_table(rows: list[Mapping[str, Any]], path: Path) -> None:
    """Write the rows to PATH.json and, as a table, to PATH.md."""
    path.with_suffix(".json").write_text(json.dumps({"command": "make classes", "rows": rows}, indent=1) + "\n")
    counts = {stage: sum(row["stages"].get(stage) == "yes" for row in rows) for stage in STAGES}
    whole = sum(row["attention"][1] > 0 and row["attention"][0] == row["attention"][1] for row in rows)
    lines = [
        "# Denoisers of diffusers, tiny, with random weights",
        "",
        f"`make classes`: {len(rows)} classes through every stage and engine. Classes without an adapter run with "
        "`--family generic` and an `--example`. The error is that of the output, relative to the float network, for "
        "two calibration samples of every step, without training. An engine passes if its output is "
        f"within {CLOSE:.0%} of `simulate`'s, or no farther than twice what `simulate` itself changes by where the inputs of its "
        f"layers change by {ROUNDING:g} (a note says so). Random weights show that a class runs, not how good its images are. *train* is one "
        "iteration of `distill` for each block and for the network, with finite losses, and an export that loads. A dash "
        "stands for what was not run.",
        "",
        f"| class | {' | '.join(STAGES)} | error at 8/8 | error at 4/8 | attention in integers | notes |",
        f"| {' | '.join(['---'] * (len(STAGES) + 5))} |",
    ]
    for row in rows:
        marks = [{"yes": "yes", None: "-"}.get(row["stages"].get(stage), "no") for stage in STAGES]
        reasons = [f"{stage}: {found}" for stage, found in row["stages"].items() if found != "yes"]
        done, there = row["attention"]
        errors = [f"{row['errors'][bits]:.4f}" if bits in row["errors"] else "-" for bits in BITS]
        cells = [
            row["class"],
            *marks,
            *errors,
            f"{done} of {there}" if there else "none",
            "; ".join([*reasons, *row["notes"]]),
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    totals = [str(counts[stage]) for stage in STAGES]
    lines.append(f"| of {len(rows)} | {' | '.join(totals)} | | | {whole} classes wholly | |")
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> int:
    """Run the named classes and write the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("classes", nargs="*", help="classes to run; all where none is named")
    parser.add_argument(
        "-o", "--output", default=str(Path(__file__).parents[2] / "recipes" / "results" / "classes"), metavar="PATH"
    )
    parser.add_argument("--engines", default="cpu,openvino", help="engines to compare with simulate")
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES[5:], help="run these alone, at 8/8; the rest of a row stays"
    )
    options = parser.parse_args()
    path = Path(options.output)
    stored = json.loads(path.with_suffix(".json").read_text())["rows"] if path.with_suffix(".json").exists() else []
    rows = {row["class"]: row for row in stored}
    lost: list[str] = []
    with tempfile.TemporaryDirectory(prefix="dqtool-classes-") as area:
        os.environ.setdefault("DQTOOL_CACHE", str(Path(area) / "cache"))
        for name in options.classes or DENOISERS:
            if options.stages and name in rows:
                engines = [stage for stage in options.stages if stage in ("cpu", "openvino")]
                row = measure(name, Path(area) / name, BITS[:1], engines, "train" in options.stages)
                row = merged(rows[name], row, options.stages)
            else:
                row = measure(name, Path(area) / name, engines=options.engines.split(","))
            failed = {stage: found for stage, found in row["stages"].items() if found != "yes"}
            print(name, row["errors"], row["attention"], failed or "all stages", flush=True)
            lost += worse(rows.get(name, row), row)
            rows[name] = row
            write_table([rows[each] for each in DENOISERS if each in rows], path)
    print("\n".join(lost))
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
