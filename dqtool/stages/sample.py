"""`dqtool sample`: images from an exported directory, as one PNG."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from dqtool import report
from dqtool.artifacts import check_writable, open_artifact
from dqtool.errors import UsageError
from dqtool.stages.common import Common, Execution
from dqtool.stages.running import check_steps, set_up_torch

__all__ = ["SampleOptions", "sample"]


@dataclass(frozen=True)
class SampleOptions:
    """Options of `dqtool sample`."""

    directory: str
    number: int = 16
    output: str = "samples.png"
    seed: int = 0
    steps: int | None = None
    batch_size: int = 64
    runtime: str = "simulate"


def sample(options: SampleOptions, common: Common) -> str:
    """Draw images and write the picture; returns its path as given.

    Raises:
        UsageError: no images asked for, or a runtime that doesn't exist.
        ArtifactError: not an exported directory, or it was calibrated for another number of steps.
    """
    if options.number < 1:
        raise UsageError("At least one image is needed", where="-n")
    artifact = open_artifact(options.directory, ["export"])
    check_steps(artifact, options.steps)
    check_writable(options.output)
    source = {"name": artifact.given, "sha256": artifact.sha256, "stage": artifact.stage}
    common.log.append(Execution("sample", options.output, asdict(options), [source], cached=False))
    if common.dry_run:
        return options.output
    set_up_torch(common.device)
    import torch

    from dqtool.metrics.grid import save_grid
    from dqtool.models.families import family_of
    from dqtool.models.sampling import Sampler, make_sampler
    from dqtool.runtimes import load
    from dqtool.stages.eval import bits_label

    manifest = artifact.manifest
    assert manifest.pipeline is not None
    sampling = manifest.pipeline["sampling"]
    family = family_of(manifest.model["class"], artifact.given)
    sampler = Sampler(family, make_sampler(sampling["scheduler"]), options.steps or sampling["steps"], sampling["eta"])
    network = load(options.directory, options.runtime)
    config = manifest.model["config"]
    conditions = family.conditions(config, options.number, torch.Generator().manual_seed(options.seed))
    images = []
    with report.progress("sample", options.number, "image") as progress:
        for batch in sampler.batches(
            network,
            family.sample_shape(config),
            options.number,
            options.seed,
            options.batch_size,
            lambda start, stop: {k: v[start:stop] for k, v in conditions.items()},
        ):
            images.append(batch)
            progress.advance(len(batch))
    side = max(1, round(options.number**0.5))
    save_grid([(bits_label(manifest.layers), torch.cat(images))], options.output, -(-options.number // side), side)
    return options.output
