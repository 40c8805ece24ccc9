"""`dqtool distill`: choose the bits, initialise the quantizers, train them with the weights, pack the result."""

from __future__ import annotations

import re
import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from dqtool import report
from dqtool.artifacts import Artifact, Workspace
from dqtool.core.bits import FLOAT_BITS, parse_bits, parse_keep
from dqtool.errors import UsageError
from dqtool.stages.running import Common, Product, check_steps, execute, input_artifact

if TYPE_CHECKING:
    from dqtool.nn.trace import Trace
    from dqtool.training.options import BkdOptions

__all__ = ["DistillOptions", "distill"]

CODE_VERSION = 2
METHODS = ("bkd", "ptq")


@dataclass(frozen=True)
class DistillOptions:
    """Options of `dqtool distill`. `iters` per block, `refine_iters` for the pass over all blocks; None: the defaults."""

    artifact: str | None = None
    output: str = "distilled.safetensors"
    bits: str = "4/4"
    steps: int | None = None
    iters: int | None = None
    refine_iters: int | None = None
    method: str = "bkd"
    seed: int = 0
    keep: tuple[str, ...] = ()
    softmax_bits: int = 8
    static: bool = False
    batch_size: int = 32
    blocks: str | None = None

    def __post_init__(self) -> None:
        """Refuse, before anything runs, what no artifact could make right.

        Raises:
            UsageError: bits, `--keep` patterns or a method that don't exist, or options that contradict each other.
        """
        parse_bits(self.bits)
        for text in self.keep:
            parse_keep(text)
        if self.softmax_bits not in (*range(2, 9), FLOAT_BITS):
            raise UsageError(
                f"{self.softmax_bits} bits are not offered", where="--softmax-bits", fix="Give 2 to 8, or 16"
            )
        if self.method not in METHODS:
            raise UsageError(
                f"unknown method '{self.method}'", where="--method", fix=f"Choose from {', '.join(METHODS)}"
            )
        try:
            re.compile(self.blocks or "")
        except re.error as e:
            raise UsageError(f"'{self.blocks}' is no regular expression: {e}", where="--blocks") from e
        if self.method == "ptq" and (self.iters or self.refine_iters):
            raise UsageError("--method ptq trains nothing", where="--iters, --refine-iters", fix="Leave them out")


def distill(options: DistillOptions, common: Common) -> str:
    """Make the quantized artifact; returns its path as given.

    Raises:
        UsageError: a `--keep` pattern that matches no layer.
        ArtifactError: the input is not calibrated, or was for another number of steps.
        NumericError: training diverged.
    """
    calibrated = input_artifact(options.artifact, ["calibrate"], "calibrate")
    check_steps(calibrated, options.steps)
    parameters = resolved(options)
    inputs = [{"name": calibrated.given, "sha256": calibrated.sha256, "stage": calibrated.stage}]

    def work(key: str) -> Product:
        workspace = Workspace(options.output, key)
        if common.force:
            workspace.clear()
        return produce(calibrated, options, parameters, workspace)

    def tidy(key: str) -> None:
        Workspace(options.output, key).clear()

    execute("distill", CODE_VERSION, options.output, parameters, inputs, common, work, after=tidy)
    return options.output


def resolved(options: DistillOptions) -> dict[str, Any]:
    """All parameters that decide the result, with defaults filled in."""
    from dqtool.training.options import BkdOptions

    recipe = BkdOptions(batch_size=options.batch_size)
    iters = recipe.iters if options.iters is None else options.iters
    refine = recipe.refine_iters if options.refine_iters is None else options.refine_iters
    if options.method == "ptq":
        iters = refine = 0
    if iters == 0 and options.refine_iters is None:
        refine = 0  # `--iters 0` is plain PTQ
    chosen = {} if options.blocks is None else {"blocks": options.blocks}
    return chosen | {
        "bits": options.bits,
        "method": options.method,
        "seed": options.seed,
        "keep": list(options.keep),
        "softmax_bits": options.softmax_bits,
        "static": options.static,
        "recipe": asdict(replace(recipe, iters=iters, refine_iters=refine)),
    }


def produce(calibrated: Artifact, options: DistillOptions, parameters: dict[str, Any], workspace: Workspace) -> Product:
    """Initialise, train, pack."""
    from dqtool.models.loading import network_of
    from dqtool.models.sampling import Sampler, make_sampler
    from dqtool.nn.learned_scaling import bake
    from dqtool.nn.surgery import packed_state
    from dqtool.stages.artifact_models import student_of, teacher_of, trace_of, trajectory_of
    from dqtool.stages.scale_moves import fold_packed, learn_scaling, mark_folded
    from dqtool.training.bkd import distill_blocks, refine
    from dqtool.training.data import Problem

    manifest, tensors = calibrated.manifest, calibrated.tensors()
    family, config = network_of(manifest.model)
    start = time.perf_counter()
    student, plans = student_of(manifest, tensors, options)
    shifts = learn_scaling(manifest, student)
    report.say(
        f"distill: quantizers of {len(plans)} layers set in {report.format_seconds(time.perf_counter() - start)}"
    )
    assert manifest.pipeline is not None
    sampling = manifest.pipeline["sampling"]
    problem = Problem(
        family=family,
        teacher=teacher_of(manifest, tensors),
        student=student,
        trace=trace_of(manifest),
        trajectory=trajectory_of(tensors),
        sampler=Sampler(
            family,
            make_sampler(sampling["scheduler"]),
            sampling["steps"],
            sampling["eta"],
            sampling.get("guidance", 1.0),
            family.tokens(config),
        ),
        seed=options.seed,
        store=workspace,
    )
    recipe = recipe_of(parameters)
    metrics: dict[str, Any] = {}
    chosen = chosen_blocks(problem.trace, options.blocks)
    if recipe.iters:
        with report.progress("distill: blocks", recipe.iters * len(chosen), "iteration") as progress:
            metrics |= distill_blocks(problem, recipe, progress, chosen)
    bake(student, shifts)
    if recipe.refine_iters:
        with report.progress("distill: all blocks", recipe.refine_iters, "iteration") as progress:
            metrics |= refine(problem, recipe, progress)
    state = packed_state(student)
    folded = fold_packed(manifest, state)
    layers = [
        record | {"bits": [plan.bits.weight, plan.bits.input], "dilated": plan.dilated and plan.info.name not in folded}
        for record, plan in zip(manifest.layers, plans, strict=True)
    ]
    mark_folded(layers, folded)
    metrics = {**manifest.metrics, **metrics}
    return Product(state, manifest.model, manifest.pipeline, layers, metrics, attachments=calibrated.attachments())


def chosen_blocks(trace: Trace, pattern: str | None) -> list[str]:
    """Names of the blocks that are trained: all, or those which `--blocks` matches as a whole.

    Raises:
        UsageError: it matches none.
    """
    names = [block.name for block in trace.blocks]
    if pattern is None:
        return names
    found = [name for name in names if re.fullmatch(pattern, name)]
    if not found:
        raise UsageError(
            f"'{pattern}' matches no block", where="--blocks", fix=f"Blocks are named like {', '.join(names[:3])}"
        )
    return found


def recipe_of(parameters: dict[str, Any]) -> BkdOptions:
    """The training options among a manifest's parameters."""
    from dqtool.training.options import BkdOptions, Rates

    fields = dict(parameters["recipe"])
    for key in ("rates", "refine_rates"):
        fields[key] = Rates(**fields[key])
    return BkdOptions(**fields)
