"""The command line: what can be typed. Each command parses, calls a stage and prints one line.

Nothing heavy is imported here, so that `dqtool --help` answers at once; the stages import torch when there is work.
"""

from __future__ import annotations

import contextlib
import inspect as introspect
import json as json_format
import re
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from dqtool import report
from dqtool.errors import UsageError
from dqtool.stages.common import Common

__all__ = ["app", "invoke"]

EPILOG = """\b
One model, five stages:
  dqtool zoo get digits-ddpm -o model
  dqtool dilate model | dqtool calibrate | dqtool distill --bits 4/4 | dqtool export | dqtool eval

Standard output carries the path of what was written, everything else goes to standard error. Exit codes: 0 done or
cached, 2 usage, 3 bad artifact, 4 environment, 5 numbers (NaN, divergence), 130 interrupted."""

app = typer.Typer(
    name="dqtool",
    help="Quantize diffusion models to 4-8 bits: smaller files, faster steps, images that hold up (DilateQuant).",
    epilog=EPILOG,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
zoo_app = typer.Typer(help="The embedded models.", rich_markup_mode=None, epilog="Example: dqtool zoo list")
app.add_typer(zoo_app, name="zoo")


def common_options(
    force: Annotated[bool, typer.Option("--force", help="Do the work again, whatever is cached.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, messages or tables; warnings remain.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the path.")] = False,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda[:i]", help="Where to compute.")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and library warnings.")] = False,
) -> Common:
    """The options that every command takes."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise UsageError(f"'{device}' is no device", where="--device", fix="Choose auto, cpu, cuda or cuda:N")
    report.set_quiet(quiet)
    return Common(force=force, quiet=quiet, json=json, device=device, dry_run=dry_run)


COMMON = introspect.signature(common_options, eval_str=True).parameters


def command(*examples: str, group: typer.Typer = app, name: str | None = None) -> Callable[[Callable], Callable]:
    """Register a function (its options, `common`) as a command that takes the common options too."""

    def register(body: Callable[..., None]) -> Callable[..., None]:
        own = introspect.signature(body, eval_str=True).parameters

        def callback(**values: Any) -> None:
            common = common_options(**{key: values.pop(key) for key in COMMON})
            body(**values, common=common)

        parameters = [p for p in own.values() if p.name != "common"] + list(COMMON.values())
        keyword_only = [p.replace(kind=introspect.Parameter.KEYWORD_ONLY) for p in parameters]
        callback.__signature__ = introspect.Signature(keyword_only)  # type: ignore[attr-defined]
        callback.__annotations__ = {p.name: p.annotation for p in parameters}
        callback.__doc__, callback.__name__ = body.__doc__, body.__name__
        epilog = "\b\n" + "\n".join([f"Example{'s' * (len(examples) > 1)}:", *(f"  {each}" for each in examples)])
        group.command(name or body.__name__, epilog=epilog)(callback)
        return body

    return register


Artifact = Annotated[
    str | None,
    typer.Argument(help="The stage before's output. Left out: a line from a pipe, else that stage's default name."),
]
Output = Annotated[str, typer.Option("--output", "-o", metavar="FILE", help="Where to write.")]
Guidance = Annotated[
    float | None,
    typer.Option(
        metavar="F", help="Weight of classifier-free guidance; left out: as calibrated, or as the model's card says."
    ),
]
Prompts = Annotated[
    str | None, typer.Option(metavar="FILE", help="Prompts, one a line; left out: those of the model's card.")
]
Directory = Annotated[str, typer.Option("--output", "-o", metavar="DIR", help="The directory to write.")]
InceptionWeights = Annotated[
    str | None, typer.Option(metavar="FILE", help="For fid, sfid, is, pr: FID's Inception network, .pth, .pt or .pb.")
]
ImageSize = Annotated[
    int | None, typer.Option(metavar="N", help="Measure the centre N x N, the shorter side brought to N (COCO: 300).")
]

CorrectNoise = Annotated[
    bool,
    typer.Option("--correct-noise", help="Take quantization's part out of predicted noise (PTQD), as measured first."),
]


@command("dqtool dilate model.safetensors -o dilated.safetensors", "dqtool dilate zoo:digits-ddpm")
def dilate(
    model: Annotated[
        str,
        typer.Argument(
            help="A .safetensors file with config.json beside it, a diffusers directory, an original checkpoint, "
            "a Hub id, or zoo:NAME."
        ),
    ],
    common: Common,
    output: Output = "dilated.safetensors",
    config: Annotated[str | None, typer.Option(metavar="FILE", help="Its config.json, or the authors' YAML.")] = None,
    scaling: Annotated[
        str, typer.Option(metavar="NAME", help="How channels are scaled; wd is Weight Dilation, exactly.")
    ] = "wd",
    stats: Annotated[
        str | None, typer.Option(metavar="CALIBRATED", help="Activation statistics, for methods that look at them.")
    ] = None,
    cap: Annotated[float, typer.Option(metavar="F", help="The largest factor of a channel.")] = 64.0,
    threshold: Annotated[
        float, typer.Option(metavar="F", help="Of wd: leave channels alone whose factor would be smaller.")
    ] = 1.0,
    family: Annotated[
        str | None, typer.Option(metavar="NAME", help="generic: take a network of a class that has no adapter.")
    ] = None,
    example: Annotated[
        str | None, typer.Option(metavar="FILE", help="For generic: a tensor for each further argument, safetensors.")
    ] = None,
    components: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Which network of a pipeline, one at a time; left out: its denoiser."),
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option(metavar="FILE[:WEIGHT]", help="A LoRA to add first; may be repeated.")
    ] = None,
    bits: Annotated[
        str, typer.Option(metavar="W/A", help="The bits that osplus and auto, which compare outputs, choose for.")
    ] = "4/4",
    fold: Annotated[
        bool, typer.Option("--fold", help="Divide in what makes the input (norms, v, adaLN) where the algebra allows.")
    ] = False,
) -> None:
    """Widen the unsaturated in-channels (Weight Dilation).

    The inputs they read are divided by the same factors, so that activations need a smaller range. Reads weights only.
    """
    run_stage("dilate", **locals())


@command("dqtool calibrate dilated.safetensors --steps 20 --samples 5120")
def calibrate(
    common: Common,
    artifact: Artifact = None,
    output: Output = "calibrated.safetensors",
    steps: Annotated[int, typer.Option(metavar="N", help="Sampling steps the quantized model will take.")] = 20,
    sampler: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="ddim, ddpm, plms, dpmsolver or euler; left out: the pipeline's own."),
    ] = None,
    samples: Annotated[int, typer.Option(metavar="N", help="Pairs (x_t, t) to keep for training.")] = 5120,
    draw: Annotated[
        str,
        typer.Option(metavar="NAME", help="Of which steps: stratified (all alike), uniform, normal or density."),
    ] = "stratified",
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the images that are sampled.")] = 0,
    eta: Annotated[float, typer.Option(metavar="F", help="Noise added at each step of ddim.")] = 0.0,
    guidance: Guidance = None,
    prompts: Prompts = None,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Images sampled together.")] = 64,
) -> None:
    """Sample the full-precision model, keep statistics.

    One calibration, with its trajectory, serves every bit width.
    """
    run_stage("calibrate", **locals())


@command(
    "dqtool distill calibrated.safetensors --bits 4/4",
    "dqtool distill calibrated.safetensors --bits 4/4 --keep 'mid_block.*=8/8' -o w4a4.safetensors",
)
def distill(
    common: Common,
    artifact: Artifact = None,
    output: Output = "distilled.safetensors",
    bits: Annotated[str, typer.Option(metavar="W/A", help="Weights/activations, 2 to 8 or 16 for float.")] = "4/4",
    steps: Annotated[
        int | None, typer.Option(metavar="N", help="To check: the steps the input was calibrated for.")
    ] = None,
    iters: Annotated[
        int | None,
        typer.Option(metavar="N", help="Iterations per block, or of the network where a method trains it whole."),
    ] = None,
    refine_iters: Annotated[
        int | None, typer.Option(metavar="N", help="For bkd: iterations of the pass over all blocks.")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="How weights are learned: bkd, bkd-blockwise, ptq, adaround, lsq, lora-qat, qat-partial or per-step.",
        ),
    ] = "bkd",
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the training.")] = 0,
    keep: Annotated[
        list[str] | None, typer.Option(metavar="REGEX=W/A", help="Other bits for some layers; may be repeated.")
    ] = None,
    softmax_bits: Annotated[int, typer.Option(metavar="N", help="Bits of the attention's softmax output.")] = 8,
    static: Annotated[bool, typer.Option("--static", help="One activation range for all steps.")] = False,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Samples per iteration.")] = 32,
    blocks: Annotated[
        str | None, typer.Option(metavar="REGEX", help="Train these blocks only; the others stay as initialised.")
    ] = None,
    preset: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="standard: every layer; nonstandard: upsampled and skip convolutions and attention products stay float.",
        ),
    ] = "standard",
    train_samples: Annotated[
        int | None, typer.Option(metavar="N", help="Points of the trajectory to train on; left out: all.")
    ] = None,
    cache_memory: Annotated[
        int, typer.Option(metavar="MIB", help="Cached activations beyond this go to disk (TMPDIR).")
    ] = 6144,
) -> None:
    """Choose the bits, train block by block, and pack.

    The quantizers are set from the calibration, then trained with the weights against the full-precision model.
    """
    run_stage("distill", **locals())


@command("dqtool export distilled.safetensors -o exported")
def export(
    common: Common,
    artifact: Artifact = None,
    output: Directory = "exported",
    format: Annotated[
        str, typer.Option(metavar="NAME", help="dq: packed bits; dense: float weights on the quantized grid.")
    ] = "dq",
) -> None:
    """Write a diffusers directory.

    `import dqtool; DiffusionPipeline.from_pretrained(DIR)` and `dqtool.load(DIR)` read it.
    """
    run_stage("export", **locals())


@command(
    "dqtool eval exported --samples 4096 --grid samples.png",
    "dqtool eval exported --samples 50000 --inception-weights pt_inception-2015-12-05.pth --ref-stats imagenet.npz",
    name="eval",
)
def evaluate(
    common: Common,
    artifact: Annotated[
        str | None,
        typer.Argument(
            metavar="[ARTIFACT_OR_DIR]", help="Any artifact or exported directory; left out: from a pipe, or exported/."
        ),
    ] = None,
    output: Output = "eval.json",
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The full-precision model (left out: where it was), or an exported directory in the simulate runtime.",
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(metavar="A,B,...", help="Which figures; left out: all that the model and the files allow."),
    ] = None,
    samples: Annotated[int, typer.Option(metavar="N", help="Images to sample.")] = 1024,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the images, the same for both models.")] = 0,
    steps: Annotated[int | None, typer.Option(metavar="N", help="Sampling steps; left out: as calibrated.")] = None,
    sampler: Annotated[str | None, typer.Option(metavar="NAME", help="Left out: as calibrated.")] = None,
    guidance: Guidance = None,
    prompts: Prompts = None,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Images sampled together.")] = 128,
    runtime: Annotated[str, typer.Option(metavar="NAME", help="What runs an exported directory.")] = "simulate",
    grid: Annotated[str | None, typer.Option(metavar="FILE.png", help="A picture of samples, both models.")] = None,
    inception_weights: InceptionWeights = None,
    ref_stats: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.npz", help="For fid, sfid, pr: from `dqtool stats`, or of the ADM evaluation suite."
        ),
    ] = None,
    clip: Annotated[
        str | None, typer.Option(metavar="DIR", help="For clip and aesthetic: a CLIPModel with its tokenizer.")
    ] = None,
    aesthetic_weights: Annotated[
        str | None, typer.Option(metavar="FILE", help="For aesthetic: LAION's head over CLIP embeddings.")
    ] = None,
    image_size: ImageSize = None,
    save_samples: Annotated[
        str | None, typer.Option(metavar="FILE.npz", help="Keep the samples as a batch of the ADM evaluation suite.")
    ] = None,
    correct_noise: CorrectNoise = False,
) -> None:
    """Measure against the full-precision reference.

    Takes any artifact or exported directory; samples both models with the same seeds.
    """
    run_stage("eval", **locals())


@command("dqtool sample exported -n 16 -o samples.png")
def sample(
    directory: Annotated[str, typer.Argument(help="An exported directory.")],
    common: Common,
    number: Annotated[int, typer.Option("--number", "-n", metavar="N", help="Images to sample.")] = 16,
    output: Annotated[str, typer.Option("--output", "-o", metavar="FILE.png", help="Where to write.")] = "samples.png",
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the images.")] = 0,
    steps: Annotated[int | None, typer.Option(metavar="N", help="Sampling steps; left out: as calibrated.")] = None,
    guidance: Guidance = None,
    prompts: Prompts = None,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Images sampled together.")] = 64,
    runtime: Annotated[str, typer.Option(metavar="NAME", help="What runs the network.")] = "simulate",
    correct_noise: CorrectNoise = False,
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="For it: the full-precision model; left out: where it was.")
    ] = None,
) -> None:
    """Draw images from an exported directory."""
    run_stage("sample", **locals())


@command(
    "dqtool stats val2014 --image-size 300 --inception-weights pt_inception-2015-12-05.pth -o coco.npz",
    "dqtool stats imagenet/train --image-size 256 --inception-weights classify_image_graph_def.pb -o imagenet.npz",
)
def stats(
    directory: Annotated[
        str, typer.Argument(metavar="DIR_OR_NPZ", help="Images: a directory, or an npz file with arr_0.")
    ],
    common: Common,
    output: Annotated[str, typer.Option("--output", "-o", metavar="FILE.npz", help="Where to write.")] = "stats.npz",
    inception_weights: InceptionWeights = None,
    image_size: ImageSize = None,
    keep_images: Annotated[
        int, typer.Option(metavar="N", help="Images to keep in the file, for precision and recall.")
    ] = 10_000,
) -> None:
    """Compute reference statistics of a folder of images.

    For `dqtool eval --ref-stats`, and for the ADM evaluation suite, whose layout they have.
    """
    run_stage("stats", **locals())


@command(
    "dqtool run recipes/digits-ddpm-w4a4.yaml",
    "dqtool run recipes/digits-ddpm-w4a4.yaml --set distill.iters=0 --set distill.output=ptq.safetensors",
)
def run(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE.yaml", help="Names a model and, stage by stage, options.")],
    common: Common,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="STAGE.OPTION=VALUE", help="Override the recipe; may be repeated."),
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="DIR", help="Left out: results/NAME of the recipe.")
    ] = None,
) -> None:
    """Run the stages that a recipe describes.

    Each works on the output of the one before; what is cached is not done again.
    """
    from dqtool.stages.plan import plan_recipe, render
    from dqtool.stages.run import run as run_recipe

    if common.dry_run:
        plan = plan_recipe(recipe, overrides or [], common, output)
        print_report(plan, render(plan), common)
        return
    with on_standard_error():
        path = run_recipe(recipe, overrides or [], common, output)
    print_result(path, common)


@command("dqtool inspect distilled.safetensors", "dqtool inspect zoo:digits-ddpm --json")
def inspect(
    anything: Annotated[
        str, typer.Argument(metavar="ANY", help="An artifact, an exported directory, a model or zoo:NAME.")
    ],
    common: Common,
) -> None:
    """Say what an artifact or a model is.

    Stage, inputs, parameters, size, layers with their bits, metrics.
    """
    from dqtool.stages.inspect import describe, render

    description = describe(anything)
    print_report(description, render(description), common)


@command(
    "dqtool bench exported --runtime all --against fp32,bf16,nncf-int8",
    "dqtool bench --arch ddpm-cifar10 --bits 4/4 --batch 1,4,16",
)
def bench(
    common: Common,
    artifact: Annotated[
        str | None,
        typer.Argument(metavar="[DIR]", help="An exported directory; left out: from a pipe, or exported/."),
    ] = None,
    arch: Annotated[
        str | None, typer.Option(metavar="NAME", help="Instead: a published architecture with random weights.")
    ] = None,
    bits: Annotated[str, typer.Option(metavar="W/A", help="Bits of --arch.")] = "4/4",
    runtime: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A runtime, auto, all or none; may be repeated. Left out: auto."),
    ] = None,
    against: Annotated[
        str,
        typer.Option(
            metavar="A,B,...",
            help="fp32, bf16, fp32-compile, bf16-compile, openvino-fp32, openvino-bf16, nncf-int8, or none.",
        ),
    ] = "fp32,bf16",
    batch: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Batch sizes; left out: 1,4,16, or those of --arch.")
    ] = None,
    threads: Annotated[int | None, typer.Option(metavar="N", help="Left out: PyTorch's choice.")] = None,
    seconds: Annotated[float, typer.Option(metavar="F", help="Time to measure each batch size for.")] = 10.0,
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The float model; left out: the exported weights as float32.")
    ] = None,
    memory: Annotated[bool, typer.Option(help="Measure load time and peak memory too, in fresh processes.")] = True,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE.json", help="Write the report as JSON as well.")
    ] = None,
) -> None:
    """Time the network, next to what one would use instead.

    All contenders run in one process, turn by turn; ratios are to the faster memory format of eager float32.
    """
    from dqtool.stages.bench import BenchOptions, render
    from dqtool.stages.bench import bench as measure

    options = BenchOptions(
        artifact,
        arch,
        bits,
        tuple(runtime or ()),
        split_list(against),
        split_numbers(batch, "--batch"),
        threads,
        seconds,
        reference,
        memory,
        output,
    )
    with on_standard_error():
        result = measure(options, common)
    print_report(result, render(result), common)


@command("dqtool report results", "dqtool report results/w4a4 results/w8a8/eval.json -o report.md", name="report")
def report_page(
    common: Common,
    places: Annotated[
        list[str] | None,
        typer.Argument(metavar="[DIR]...", help="Directories of eval results, or their JSONs; left out: eval.json."),
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="Left out: report.html or report.md.")
    ] = None,
    format: Annotated[
        str | None, typer.Option(metavar="html|md", help="Left out: by the file's name, else html.")
    ] = None,
) -> None:
    """Make one page of eval results.

    Tables, quality against cost, errors by layer and step, activations, samples. Artifacts found beside add to it.
    """
    from dqtool.stages.report_page import ReportOptions, plan_report, render_plan, write_report

    options = ReportOptions(tuple(places or ()), output, format)
    if common.dry_run:
        plan = plan_report(options, common)
        print_report(plan, render_plan(plan), common)
        return
    with on_standard_error():
        path = write_report(options, common)
    print_result(path, common)


@command("dqtool zoo list", group=zoo_app, name="list")
def zoo_list(common: Common) -> None:
    """List the embedded models and their sizes."""
    from dqtool.stages.zoo import list_models, render

    models = list_models()
    print_report({"models": models}, render(models), common)


@command("dqtool zoo get digits-ddpm -o model", group=zoo_app, name="get")
def zoo_get(
    name: Annotated[str, typer.Argument(help="A name from `dqtool zoo list`.")],
    common: Common,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="DIR", help="The directory to write; left out: NAME.")
    ] = None,
) -> None:
    """Write one as a diffusers pipeline directory.

    Its weights become float32.
    """
    from dqtool.stages.zoo import ZooGetOptions, get_model, plan_get

    options = ZooGetOptions(name, output or name.removeprefix("zoo:"))
    if common.dry_run:
        plan = plan_get(options)
        print_report(plan, [f"{key:<10}{value}" for key, value in plan.items()], common)
        return
    with on_standard_error():
        path = get_model(options, common)
    print_result(path, common)


@app.callback(invoke_without_command=True)
def main_options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from dqtool import __version__

        print(f"dqtool {__version__}")
        raise typer.Exit


def invoke(arguments: Sequence[str]) -> int:
    """Run one command line (without the program's name); returns the exit code.

    Raises:
        DqtoolError: whatever a stage raises.
        UsageError: the command line can't be understood.
    """
    root = typer.main.get_command(app)
    if not arguments:
        with root.make_context("dqtool", [], resilient_parsing=True) as context:
            print(root.get_help(context), file=sys.stderr)
        return 2
    try:
        with root.make_context("dqtool", list(arguments)) as context:
            root.invoke(context)
    except typer.Exit as finished:
        return finished.exit_code
    except USAGE_ERRORS as error:
        raise UsageError(error.format_message(), fix=_help_hint(error)) from error
    return 0


USAGE_ERRORS: Any = typer.BadParameter.__mro__[1]
"""click's UsageError: newer typers carry a copy of click of their own, so it is not where click is."""


def _help_hint(error: Any) -> str:
    path = error.ctx.command_path if error.ctx is not None else "dqtool"
    return f"`{path} --help` lists what there is"


def run_stage(name: str, common: Common, **values: Any) -> None:
    """Run a stage with options by field name (a command's arguments are just that), or print what it would do."""
    from dqtool.stages.registry import make_options, stage_function

    options = make_options(name, values)
    with on_standard_error():
        path = stage_function(name)(options, common)
    if common.dry_run:
        from dqtool.stages.plan import plan_stage, render

        with on_standard_error():
            plan = plan_stage(common.log[-1], options)
        print_report(plan, render(plan), common)
    else:
        print_result(path, common)


def split_list(text: str) -> tuple[str, ...]:
    """`"a,b"` as ("a", "b"); "none" and nothing are ()."""
    return tuple(part.strip() for part in text.split(",") if part.strip() not in ("", "none"))


def split_numbers(text: str | None, where: str) -> tuple[int, ...]:
    """`"1,4"` as (1, 4); None is ().

    Raises:
        UsageError: something else than whole numbers.
    """
    parts = split_list(text or "")
    if not all(part.isdecimal() for part in parts):
        raise UsageError(f"'{text}' is no list of whole numbers", where=where, fix="Example: 1,4,16")
    return tuple(map(int, parts))


@contextlib.contextmanager
def on_standard_error() -> Any:
    """Whatever a library prints in here goes to standard error: standard output is the result's alone."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def print_result(path: str, common: Common) -> None:
    """The path, or with --json the manifest, where it is and which stages were cached."""
    if not common.json:
        print(path)
        return
    from dqtool.artifacts import manifest_path

    last = common.log[-1] if common.log else None
    found: dict[str, Any] = {}
    if last is not None and manifest_path(path).is_file():
        found = json_format.loads(manifest_path(path).read_text(encoding="utf-8"))
    if len(common.log) > 1:
        found["stages"] = [{"stage": e.stage, "path": e.output, "cached": e.cached} for e in common.log]
    print(json_format.dumps(found | {"path": path, "cached": last is not None and last.cached}, sort_keys=True))


def print_report(content: Any, lines: Sequence[str], common: Common) -> None:
    """A report: its lines, or with --json its content."""
    if common.json:
        print(json_format.dumps(content, sort_keys=True))
    else:
        print("\n".join(lines))
