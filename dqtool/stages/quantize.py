"""`dqtool quantize`: the five stages in one go, with one plan before and one summary after."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dqtool import distributed, report
from dqtool.artifacts import manifest_path, open_artifact, read_manifest
from dqtool.artifacts.bench_report import BenchReport
from dqtool.artifacts.jsonvalues import Json
from dqtool.artifacts.reading import MANIFEST_BYTES, load_json
from dqtool.artifacts.schema import record
from dqtool.errors import DqtoolError, UsageError
from dqtool.metrics import value_of
from dqtool.stages.options.calibrate import CalibrateOptions
from dqtool.stages.options.quantize import stage_values
from dqtool.stages.planning.plan import plan_steps
from dqtool.stages.registry import chained_stages, default_output, make_options
from dqtool.stages.run import Step, run_steps, stage_named_in_errors
from dqtool.stages.shared.settings import RunSettings

if TYPE_CHECKING:
    from dqtool.models.sources.resolve import ModelSource

__all__ = ["plan", "quantize", "steps_of", "work_directory"]

LARGE = 200_000_000
"""Weights of a network from which on `fast` leaves out the correction of predictions, which samples both networks."""

SPEED_SECONDS = 1.0
"""Time that the speed measurement takes for each batch, after warm-up."""


def quantize(options: Any, settings: RunSettings) -> str:
    """Run the five stages on a model, report size, speed and quality; return the path of the exported directory.

    `options` are `QuantizeOptions`.

    Raises:
        DqtoolError: what a stage raises, with the stage's name in front.
    """
    steps = steps_of(options, settings.device)
    settings = replace(settings, reads=tuple(filter(None, (options.model, options.apply_to))))
    planned = plan(options, settings)
    distributed.barrier()  # all have looked at what is there
    if not all(stage["cached"] for stage in planned["stages"]):
        _show(planned)
    evaluated = run_steps(steps, settings)
    if distributed.is_main():
        with distributed.solo():
            settings.summary.update(_summary(options, settings, evaluated))
        _print_summary(options.output, settings.summary)
    result: str = options.output
    return result


def plan(options: Any, settings: RunSettings) -> dict[str, Any]:
    """Return the plan: each stage as in a dry run, and estimates of time, memory and disk."""
    steps = steps_of(options, settings.device)
    stages = plan_steps(steps, settings)
    found: dict[str, Any] = {
        "recipe": f"quantize --effort {options.effort}",
        "model": options.apply_to or options.model,
        "output": options.output,
        "work_directory": work_directory(options.output),
        "stages": stages,
    }
    if options.effort == "default" and (shorter := _shorter(options, dict(steps))):
        found["effort"] = f"{shorter}, since the network is too large for more on a CPU (--effort best takes all)"
    if not all(stage["cached"] for stage in stages):
        from dqtool.stages.planning.estimate import estimate

        cached = {stage["stage"] for stage in stages} - {stage["stage"] for stage in stages if not stage["cached"]}
        packed = max(
            stage.get("work", {}).get("bytes", 0) for stage in stages if stage["stage"] in ("distill", "export")
        )
        found["estimate"] = estimate(dict(reversed(steps)), cached, settings.device, packed)
    return found


def _shorter(options: Any, steps: Mapping[str, Mapping[str, Any]]) -> str:
    """Return words on the samples and iterations that `default` lowered; none where it lowered nothing."""
    calibrate, distill = steps.get("calibrate", {}), steps.get("distill", {})
    asked = "samples" in stage_values(options, "calibrate")
    told = [f"{calibrate['samples']:,} calibration samples"] if "samples" in calibrate and not asked else []
    if "iters" in distill:
        told.append(f"{distill['iters']} iterations of {distill['batch_size']} samples")
    return " and ".join(told)


def work_directory(output: str) -> str:
    """Return the directory of the stages' files, `OUTPUT.work` beside the output."""
    return output.rstrip("/") + ".work"


def steps_of(options: Any, device: str) -> list[Step]:
    """Return the stages with their options, inputs and outputs filled in.

    Raises:
        UsageError: a stage refuses an option.
    """
    work = work_directory(options.output)
    steps, statistics = _calibration_of_another(options, device)
    previous = options.apply_to or options.model
    for name in chained_stages():
        values = _effort_values(options, name, device) | stage_values(options, name)
        if name == "calibrate" and statistics is not None:
            values = {key: value for key, value in values.items() if key == "batch_size"} | {"statistics": statistics}
        values["output"] = options.output if name == "export" else os.path.join(work, default_output(name))
        values["model" if name == "dilate" else "artifact"] = previous
        if name == "eval":
            values["grid"] = os.path.join(work, "samples.png")
        with stage_named_in_errors(name):
            make_options(name, values)
        steps.append((name, values))
        previous = values["output"]
    return steps


def _calibration_of_another(options: Any, device: str) -> tuple[list[Step], str | None]:
    """Return the stages that calibrate MODEL for `--apply-to`, and the calibrated artifact; none without that option.

    Raises:
        UsageError: MODEL is calibrated already, and an option asks for another calibration.
    """
    if options.apply_to is None:
        return [], None
    earlier = os.path.join(work_directory(options.model), default_output("calibrate"))
    asked = stage_values(options, "calibrate")
    if os.path.isfile(os.path.join(options.model, "dqtool.json")):
        others = ", ".join(
            f"--{name.replace('_', '-')}" for name in asked if name not in ("batch_size", "bits", "seed")
        )
        if others:
            raise UsageError(
                "MODEL is calibrated already",
                where=f"{others} beside --apply-to",
                fix="Leave these options out, or give the full-precision MODEL",
            )
        return [], earlier
    steps: list[Step] = []
    previous = ""
    for name in ("dilate", "calibrate"):
        output = os.path.join(work_directory(options.output), f"base-{default_output(name)}")
        values = _effort_values(options, name, device) | stage_values(options, name)
        values |= {"output": output, "model" if name == "dilate" else "artifact": previous or options.model}
        values.pop("lora", None)
        with stage_named_in_errors(name):
            make_options(name, values)
        steps.append((name, values))
        previous = output
    return steps, previous


def _effort_values(options: Any, stage: str, device: str) -> dict[str, Any]:
    """Return the options of a stage that the effort decides, by field name."""
    if stage == "export":
        return {}
    if options.effort == "fast":
        if stage == "calibrate":
            return {"samples": _least_samples(options)}
        if stage == "distill":
            return {"method": "ptq", "correct_noise": _correction_is_cheap(options)}
        return {"samples": 64, "metrics": ("similarity", "cost")} if stage == "eval" else {}
    if options.effort == "best":
        from dqtool.training.options import BkdOptions

        usual = BkdOptions()
        longer = {"iters": 2 * usual.iters}
        if stage == "distill" and not _extrapolates(options):
            longer["refine_iters"] = 2 * usual.refine_iters
        return {
            "dilate": {},
            "calibrate": {"samples": 10240},
            "distill": longer,
            "eval": {"samples": 256},
        }[stage]
    if stage in ("calibrate", "distill"):
        return _fitting_values(options, stage, device)
    return {"samples": 256} if stage == "eval" else {}


def _fitting_values(options: Any, stage: str, device: str) -> dict[str, Any]:
    """Return fewer samples and iterations than usual for a network that is too large for them on a CPU; nothing for others."""
    from dqtool.core.device import resolve_device
    from dqtool.stages.planning.estimate import network_size
    from dqtool.stages.planning.network import PlannedNetwork
    from dqtool.stages.planning.training import Training, samples_that_fit, training_that_fits
    from dqtool.training.options import BkdOptions

    if resolve_device(device).type != "cpu":
        return {}
    size = network_size(PlannedNetwork.of(_dilate_options(options)))
    if size is None:
        return {}
    macs, _layers = size
    if stage == "calibrate":
        usual_samples = CalibrateOptions.samples
        fitting_samples = samples_that_fit(macs, usual_samples, _least_samples(options))
        return {} if fitting_samples == usual_samples else {"samples": fitting_samples}
    usual = Training(BkdOptions().iters, BkdOptions().batch_size)
    fitting = training_that_fits(macs, usual)
    if fitting == usual:
        return {}
    values = {"iters": fitting.iters, "batch_size": fitting.batch_size}
    return values if _extrapolates(options) else values | {"refine_iters": fitting.iters}


def _least_samples(options: Any) -> int:
    """Return the number of samples that calibration takes at least."""
    return max(256, 8 * _steps(options))


def _extrapolates(options: Any) -> bool:
    """Return True if the sampler extrapolates from several predictions."""
    from dqtool.models.sampling.schedulers import scheduler_class
    from dqtool.training.options import EXTRAPOLATING

    return scheduler_class(_source(options).scheduler, options.sampler) in EXTRAPOLATING


def _correction_is_cheap(options: Any) -> bool | None:
    """Return True for a network of less than `LARGE` weights whose sampler does not extrapolate, else None."""
    from math import prod

    if _extrapolates(options):
        return None
    weights = sum(prod(entry["shape"]) for entry in _source(options).tensor_entries().values())
    return True if weights < LARGE else None


def _steps(options: Any) -> int:
    """Return the number of sampling steps, that of the model's own sampler where none was given."""
    from dqtool.stages.options.calibrate import with_steps

    calibrate = make_options("calibrate", stage_values(options, "calibrate"))
    given = calibrate.steps is not None or calibrate.timesteps is not None
    return with_steps(calibrate, None if given else _source(options).scheduler).steps or 1


def _source(options: Any) -> ModelSource:
    source: ModelSource = _dilate_options(options).source()
    return source


def _dilate_options(options: Any) -> Any:
    """Return the options of `dilate` for the model that is quantized."""
    model = options.apply_to or options.model
    return make_options("dilate", stage_values(options, "dilate") | {"model": model})


def _show(planned: Mapping[str, Any]) -> None:
    """Print the plan as one table on standard error."""
    rows = [(s["stage"], "cached" if s["cached"] else "to do", s["output"]) for s in planned["stages"]]
    report.table(f"{planned['recipe']}: {planned['model']}", ["stage", "state", "writes"], rows)
    if "effort" in planned:
        report.say(f"effort: {planned['effort']}")
    for key, value in planned.get("estimate", {}).items():
        report.say(f"{key}: {value}")


def _summary(options: Any, settings: RunSettings, evaluated: str) -> dict[str, Any]:
    """Return sizes in bytes, milliseconds of a step, PSNR in dB and the picture's path."""
    figures = read_manifest(evaluated).evaluation
    found: dict[str, Any] = {"path": options.output, "work_directory": work_directory(options.output)}
    if figures.cost is not None:
        found |= {"bytes": figures.cost.bytes, "bytes_float32": figures.cost.bytes_float32}
    if (quality := value_of(figures.as_read, "psnr")) is not None:
        found["psnr"] = quality
    found |= _speed(options.output, settings)
    found["picture"] = os.path.join(work_directory(options.output), "samples.png")
    found["seconds"] = {
        stage.stage: read_manifest(stage.output).seconds
        for stage in settings.log
        if manifest_path(stage.output).is_file()
    }
    return found


def _speed(exported: str, settings: RunSettings) -> dict[str, Json]:
    """Return milliseconds of one step of batch 1: float32 and the fastest runtime. Measured once for an export."""
    from dqtool.stages.bench import BenchPlan, bench
    from dqtool.stages.options.bench import BenchOptions

    kept = os.path.join(work_directory(exported), "speed.json")
    result: BenchReport | BenchPlan | None = None
    if os.path.isfile(kept):
        with contextlib.suppress(ValueError):
            result = record(load_json(kept, MANIFEST_BYTES), BenchReport)
    if not isinstance(result, BenchReport) or result.model.sha256 != open_artifact(exported, ["export"]).sha256:
        options = BenchOptions(
            exported, against=("fp32",), batch=(1,), seconds=SPEED_SECONDS, memory=False, output=kept
        )
        try:
            result = bench(options, replace(settings, log=[]))
        except DqtoolError as error:
            report.warn(f"the speed could not be measured: {error}")
            return {}
    assert isinstance(result, BenchReport)
    rows = {row.contender: row for row in result.speed["1"]}
    runtime, floating = rows["auto"], next(row for row in rows.values() if row.baseline)
    return {
        "step_ms": 1000 * runtime.median,
        "step_ms_float32": 1000 * floating.median,
        "processor": result.machine.processor,
    }


def _print_summary(output: str, found: Mapping[str, Any]) -> None:
    """Print the summary as a table on standard error."""
    rows: list[tuple[str, str]] = []
    if "bytes" in found:
        ratio = found["bytes_float32"] / found["bytes"]
        rows.append(("size", f"{found['bytes']:,} bytes, {ratio:.2f}x smaller than float32"))
    if "step_ms" in found:
        ratio = found["step_ms_float32"] / found["step_ms"]
        rows.append(("speed", f"{found['step_ms']:.1f} ms a step, {ratio:.2f}x float32's, on {found['processor']}"))
    if "psnr" in found:
        rows.append(("PSNR", f"{found['psnr']:.1f} dB to full precision, same seeds"))
    rows += [("picture", found["picture"]), ("work files", found["work_directory"])]
    report.table(f"{output}: quantized", ["", ""], rows)
    report.say(f"load it: import dqtool; DiffusionPipeline.from_pretrained({output!r})")
