"""`dqtool stats`: reference statistics of a set of images, in the ADM suite's layout, for `dqtool eval --ref-stats`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from dqtool import report
from dqtool.artifacts import check_writable, clear_leftovers, lock, sha256_file
from dqtool.artifacts.files import digest_of_files
from dqtool.artifacts.jsonvalues import Json, JsonObject
from dqtool.artifacts.reading import parse_json
from dqtool.artifacts.records import InputRecord
from dqtool.errors import DqtoolError, EnvironmentFault, UsageError
from dqtool.stages.options.stats import StatsOptions
from dqtool.stages.shared.paths import read_paths
from dqtool.stages.shared.running import set_up_torch
from dqtool.stages.shared.settings import Execution, RunSettings

if TYPE_CHECKING:
    from dqtool.metrics.batches import ImageFolder, NpzImages

__all__ = ["StatsOptions", "stats"]


def stats(options: StatsOptions, settings: RunSettings) -> str:
    """Read every image, write the statistics; returns the file's path as given.

    Raises:
        EnvironmentFault: no `inception_weights`, or a path that does not exist.
        ArtifactError: no images, a damaged one, or weights of another network.
        UsageError: images of several sizes and no `image_size`.
    """
    if options.inception_weights is None:
        raise EnvironmentFault(
            "Statistics need the weights of FID's Inception network, and dqtool downloads nothing",
            where="--inception-weights",
            fix="Give --inception-weights FILE",
        )
    source = image_source(options)
    check_writable(options.output, "images", inputs=read_paths(options), overwrite=settings.overwrite)
    parameters: dict[str, Json] = {"image_size": options.image_size, "keep_images": options.keep_images}
    inputs = [
        InputRecord(options.directory, images_digest(options.directory, source)),
        InputRecord(options.inception_weights, sha256_file(options.inception_weights)),
    ]
    about: dict[str, Json] = {
        **parameters,
        "images_sha256": inputs[0].sha256,
        "weights_file_sha256": inputs[1].sha256,
    }
    cached = not settings.force and is_current(options.output, about)
    settings.log.append(Execution("stats", options.output, parameters, inputs, cached))
    if settings.dry_run:
        return options.output
    if cached:
        clear_leftovers(options.output)
        report.say(f"stats: cached {options.output}")
        return options.output
    with lock(options.output):
        set_up_torch(settings.device)
        from dqtool.metrics.extractors import InceptionExtractor
        from dqtool.metrics.reference import save_statistics

        extractor = InceptionExtractor(options.inception_weights)
        about |= {"inception_sha256": extractor.weights_sha256}
        save_statistics(source, options.output, extractor, options.keep_images, about)
    report.say(f"stats: wrote {options.output} from {len(source)} images")
    return options.output


def image_source(options: StatsOptions) -> ImageFolder | NpzImages:
    """Return the images of a directory or of an npz file; raise `UsageError` for a size with the latter."""
    from dqtool.metrics.batches import ImageFolder, NpzImages

    if os.path.isfile(options.directory):
        if options.image_size is not None:
            raise UsageError(
                "The images of an npz file are taken as they are",
                where="--image-size",
                fix="Leave it out, or give a directory",
            )
        return NpzImages(options.directory)
    return ImageFolder(options.directory, options.image_size)


def images_digest(given: str, source: ImageFolder | NpzImages) -> str:
    """Return the SHA-256 of a file, or of the names and digests of a folder's images."""
    from dqtool.metrics.batches import ImageFolder

    if os.path.isfile(given):
        return sha256_file(given)
    assert isinstance(source, ImageFolder)
    return digest_of_files((os.path.relpath(path, given), path) for path in source.paths)


def is_current(output: str, about: JsonObject) -> bool:
    """Return whether the existing file was made from the same images with the same options."""
    from dqtool.artifacts.npz import npz_arrays

    if not os.path.isfile(output):
        return False
    try:
        note = parse_json(str(npz_arrays(output, ["dqtool"])["dqtool"]))
    except (DqtoolError, ValueError):
        return False
    return isinstance(note, dict) and all(note.get(key) == value for key, value in about.items())
