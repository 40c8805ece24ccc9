"""Registry of the stages. The command line, recipes, tables and dry runs are derived from its entries.

This module imports nothing heavy, because `dqtool --help` imports it: an entry names functions and classes, which are
imported when they are used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from dqtool.stages.options.declared import build_options, declared_options
from dqtool.stages.shared.settings import Execution, RunSettings

__all__ = [
    "STAGES",
    "Stage",
    "chained_stages",
    "default_output",
    "make_options",
    "option_types",
    "options_class",
    "plan_function",
    "stage_function",
    "work_function",
]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage. `options`, `function` and `work` are given as "MODULE:NAME".

    Attributes:
        options: a dataclass of annotated fields (`options.declared`); its field `output` holds the default output.
        function: called as `function(options, settings)` to run the stage; returns the path of its output.
        work: called as `work(execution, options)` in a dry run; counts the work of a run. None if the stage has a `plan`.
        help: help of the command: a summary, then details.
        examples: command lines that end the help.
        chained: the stage has a place in recipes.
        plan: called as `plan(options, settings)` in place of the stage in a dry run; returns the plan of all stages that it
            runs.
    """

    options: str
    function: str
    work: str | None
    help: str
    examples: tuple[str, ...]
    chained: bool = True
    plan: str | None = None


STAGES: dict[str, Stage] = {
    "quantize": Stage(
        "dqtool.stages.options.quantize:QuantizeOptions",
        "dqtool.stages.quantize:quantize",
        None,
        help="Quantize a model in one go, from a checkpoint to a directory for diffusers.\n\n"
        "Runs dilate, calibrate, distill, export and eval with one plan before and one summary after. Their files stay in "
        "OUTPUT.work beside the output, so that a second run does only what changed.",
        examples=(
            "dqtool quantize zoo:digits-sd --effort fast",
            "dqtool quantize stable-diffusion-v1-4 -o sd-w4a8 --bits 4/8 --steps 50 --prompts prompts.txt",
            "dqtool quantize sd-w4a8 --apply-to my-finetune -o my-finetune-w4a8 --bits 4/8",
        ),
        chained=False,
        plan="dqtool.stages.quantize:plan",
    ),
    "dilate": Stage(
        "dqtool.stages.options.dilate:DilateOptions",
        "dqtool.stages.dilate:dilate",
        "dqtool.stages.planning.work:dilate_work",
        help="Scale weights by Weight Dilation, from the weights alone.\n\n"
        "In-channels of weights are multiplied by factors that keep the range of each out-channel, and quantizers divide "
        "the inputs by the same factors. The output computes the same function as the model.",
        examples=(
            "dqtool dilate model.safetensors -o dilated.safetensors",
            "dqtool dilate zoo:digits-ddpm",
        ),
    ),
    "calibrate": Stage(
        "dqtool.stages.options.calibrate:CalibrateOptions",
        "dqtool.stages.calibrate:calibrate",
        "dqtool.stages.planning.work:calibrate_work",
        help="Sample the full-precision model and record activations.\n\n"
        "Keeps samples for training and statistics of each layer and step, and chooses factors by output error. One "
        "calibration serves every bit width.",
        examples=(
            "dqtool calibrate dilated.safetensors --steps 20 --samples 5120",
            "dqtool calibrate dilated.safetensors --steps 100 --scaling keep",
            "dqtool calibrate finetune.safetensors --statistics calibrated.safetensors -o finetune-calibrated.safetensors",
        ),
    ),
    "distill": Stage(
        "dqtool.stages.options.distill:DistillOptions",
        "dqtool.stages.distill:distill",
        "dqtool.stages.planning.work:distill_work",
        help="Quantize to the given bits and train block by block.\n\n"
        "Quantizers are initialised from the calibration, then trained together with the weights to match the "
        "full-precision model. The output is packed.",
        examples=(
            "dqtool distill calibrated.safetensors --bits 4/4",
            "dqtool distill calibrated.safetensors --bits 4/4 --keep 'mid_block.*=8/8' -o w4a4.safetensors",
        ),
    ),
    "export": Stage(
        "dqtool.stages.options.export:ExportOptions",
        "dqtool.stages.export:export",
        "dqtool.stages.planning.work:export_work",
        help="Write a directory for diffusers or another runtime.\n\n"
        "`import dqtool; DiffusionPipeline.from_pretrained(DIR)` and `dqtool.load(DIR)` read it, unless its format is "
        "for other programs.",
        examples=(
            "dqtool export distilled.safetensors -o exported",
            "dqtool export distilled.safetensors --format onnx -o exported-onnx",
        ),
    ),
    "eval": Stage(
        "dqtool.stages.options.eval:EvalOptions",
        "dqtool.stages.eval:evaluate",
        "dqtool.stages.planning.work:eval_work",
        help="Measure quality against the full-precision model.\n\n"
        "Both models sample with the same seeds. Takes any artifact or exported directory.",
        examples=(
            "dqtool eval exported --samples 4096 --grid samples.png",
            "dqtool eval exported --samples 50000 --inception-weights pt_inception-2015-12-05.pth --ref-stats imagenet.npz",
        ),
    ),
    "sensitivity": Stage(
        "dqtool.stages.options.sensitivity:SensitivityOptions",
        "dqtool.stages.sensitivity:sensitivity",
        "dqtool.stages.planning.work:sensitivity_work",
        help="Measure what quantizing each operand alone costs in the samples.\n\n"
        "Takes a calibrated artifact; a few backward passes give all layers, operands and bit widths. Shows the "
        "`--keep` options to type, and bits per layer for each size beside uniform bits.",
        examples=(
            "dqtool sensitivity calibrated.safetensors --bits 8/8",
            "dqtool sensitivity calibrated.safetensors --bits 4/4 --passes 64 -o sensitivity.json",
        ),
        chained=False,
    ),
    "sample": Stage(
        "dqtool.stages.options.sample:SampleOptions",
        "dqtool.stages.sample:sample",
        "dqtool.stages.planning.work:sample_work",
        help="Sample images from an exported directory.",
        examples=("dqtool sample exported -n 16 -o samples.png",),
        chained=False,
    ),
    "stats": Stage(
        "dqtool.stages.options.stats:StatsOptions",
        "dqtool.stages.stats:stats",
        "dqtool.stages.planning.work:stats_work",
        help="Compute reference statistics of a folder of images.\n\n"
        "The output serves `dqtool eval --ref-stats` and the ADM evaluation suite, whose file format it has.",
        examples=(
            "dqtool stats val2014 --image-size 300 --inception-weights pt_inception-2015-12-05.pth -o coco.npz",
            "dqtool stats imagenet/train --image-size 256 --inception-weights classify_image_graph_def.pb -o imagenet.npz",
        ),
        chained=False,
    ),
}
"""All stages by name, in the order of the data and of `dqtool --help`."""


def chained_stages() -> tuple[str, ...]:
    """Return the names of the stages that follow one another, in their order."""
    return tuple(name for name, stage in STAGES.items() if stage.chained)


def options_class(name: str) -> type:
    """Return the options class of a stage."""
    result: type = _named(STAGES[name].options)
    return result


def stage_function(name: str) -> Callable[[Any, RunSettings], str]:
    """Return the function that runs a stage; it returns the path of what was written, as given."""
    result: Callable[[Any, RunSettings], str] = _named(STAGES[name].function)
    return result


def work_function(name: str) -> Callable[[Execution, Any], dict[str, Any]]:
    """Return the function that counts the work of a run of the stage. A stage with a plan has none."""
    work = STAGES[name].work
    assert work is not None, name
    result: Callable[[Execution, Any], dict[str, Any]] = _named(work)
    return result


def plan_function(name: str) -> Callable[[Any, RunSettings], dict[str, Any]] | None:
    """Return the function that plans a run of several stages; None for a stage that does its work itself."""
    plan = STAGES[name].plan
    return None if plan is None else _named(plan)


def default_output(name: str) -> str:
    """Return the path that a stage writes to by default."""
    result: str = next(each.default for each in declared_options(options_class(name)) if each.name == "output")
    return result


def make_options(name: str, values: Mapping[str, Any]) -> Any:
    """Build the options of a stage from values by field name. None stands for the default.

    Raises:
        UsageError: a value is out of bounds, or there is no such choice.
    """
    return build_options(options_class(name), values)


def option_types(name: str) -> dict[str, type]:
    """Return the type of each long option (without dashes in front) as recipes take it: str, int, float, bool or list."""
    return {
        each.long.removeprefix("--"): each.kind
        for each in declared_options(options_class(name))
        if not each.option.positional
    }


def _named(path: str) -> Any:
    """Import what "MODULE:NAME" names."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)
