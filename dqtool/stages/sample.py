"""`dqtool sample`: images from an exported directory, as one PNG."""

from __future__ import annotations

from dataclasses import asdict

from dqtool import distributed
from dqtool.artifacts import check_writable, open_artifact
from dqtool.core.cost import samples_together
from dqtool.core.device import chosen_device
from dqtool.errors import UsageError
from dqtool.metrics.prompts import read_prompts
from dqtool.models.conditions.external import ConditionSource
from dqtool.stages.evaluation.correction import switch_correction
from dqtool.stages.evaluation.engines import run_exported
from dqtool.stages.evaluation.noise import fit_correction, needs_reference, with_correction
from dqtool.stages.evaluation.reference import find_reference, reference_network
from dqtool.stages.options.sample import SampleOptions
from dqtool.stages.shared.paths import model_places, read_paths
from dqtool.stages.shared.running import check_steps, set_up_torch
from dqtool.stages.shared.settings import Execution, RunSettings

__all__ = ["SampleOptions", "sample"]


def sample(options: SampleOptions, settings: RunSettings) -> str:
    """Draw images, write the picture and return its path as given.

    Raises:
        UsageError: fewer than one image is asked for, or the runtime is unknown.
        ArtifactError: the directory is no export, or was calibrated for another number of steps.
        EnvironmentFault: --correct-noise is given and the full-precision model is missing.
    """
    if options.number < 1:
        raise UsageError("At least one image is needed", where="-n")
    artifact = open_artifact(options.directory, ["export"])
    check_steps(artifact, options.steps)
    reference = None
    if options.correct_noise:
        reference = find_reference(options.reference, artifact)
        needs_reference(reference, artifact)
    if distributed.is_main():
        check_writable(
            options.output,
            "picture",
            inputs=[*read_paths(options), *model_places(reference)],
            overwrite=settings.overwrite,
        )
    source = artifact.as_input()
    settings.log.append(Execution("sample", options.output, asdict(options), [source], cached=False))
    if settings.dry_run:
        return options.output
    set_up_torch(settings.device)
    from dqtool.core.bits import bits_label
    from dqtool.metrics.grid import save_grid
    from dqtool.stages.evaluation.images import first_channels, maker_of_artifact

    together = samples_together(artifact.manifest.layers, options.batch_size, chosen_device().type)
    prompts = None if options.prompts is None else read_prompts(options.prompts)
    maker = maker_of_artifact(
        artifact,
        options.number,
        options.seed,
        options.steps,
        guidance=options.guidance,
        prompts=prompts,
        source=ConditionSource.of(options, artifact.manifest.sampling, artifact.given),
    )
    network = run_exported(options.directory, options.runtime, together)
    switch_correction(network, artifact, maker, options.correction, "sample")
    if reference is not None:
        exact = reference_network(reference, artifact.manifest.network)
        correction = fit_correction(network, exact, maker, options.seed, together)
        maker = with_correction(maker, correction)
    images = maker.draw(network, options.number, options.seed, together, "sample")
    if not distributed.is_main():
        return options.output
    panels = [(bits_label(artifact.manifest.layers), images)]
    side = max(1, round(options.number**0.5))
    save_grid(first_channels(panels) if maker.latents else panels, options.output, -(-options.number // side), side)
    return options.output
