"""Image sets: folders of images, and the ADM suite's `.npz` files, read and written in batches.

A sample batch holds `arr_0`, uint8 `[N, H, W, 3]`. Reference statistics hold `mu`, `sigma` (pool_3) and `mu_s`,
`sigma_s` (mixed_6/conv) in addition to the images, from which the suite computes precision and recall. Files written
here have one more entry, `dqtool`, a JSON text about their origin, which the suite ignores.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dqtool.artifacts.files import target_of, whole_file
from dqtool.artifacts.jsonvalues import JsonObject
from dqtool.artifacts.npz import LARGEST, NPZ, array_header, npz_names, opened_npz
from dqtool.artifacts.reading import open_regular
from dqtool.errors import ArtifactError, DqtoolError, EnvironmentFault, UsageError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["IMAGES", "IMAGE_SUFFIXES", "ImageFolder", "NpzImages", "write_npz"]

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that are read whatever an image's name is: others, such as EPS, would run programs."""
PIXELS = 40_000_000
"""Most pixels of an image: 160 MB while it is decoded."""
PIXELS_OF_ANY, PIXELS_PER_BYTE = 4_000_000, 1_000
"""Pixels that a file of any size may have, and more by its bytes: deflate, which PNG uses, shrinks a plain area to 1/1000."""
IMAGES = "arr_0"


class ImageFolder:
    """Images of a directory and its subdirectories in the order of their names, as RGB.

    With `size` each is cropped to `size` x `size` by `center_crop`.

    Raises:
        EnvironmentFault: the directory does not exist.
        ArtifactError: the directory holds no images.
    """

    def __init__(self, path: str | os.PathLike[str], size: int | None = None) -> None:
        self.given = os.fspath(path)
        self.size = size
        root = Path(path)
        if not root.is_dir():
            raise EnvironmentFault("There is no such directory of images", where=self.given, fix="Check the path")
        self.paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        if not self.paths:
            known = ", ".join(sorted(IMAGE_SUFFIXES))
            raise ArtifactError("This directory holds no images", where=self.given, fix=f"Known endings are {known}")

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, batch_size: int) -> Iterator[Tensor]:
        """Yield batches uint8 `[n, H, W, 3]`.

        Raises:
            UsageError: the sizes differ, and no `size` was given.
            ArtifactError: an image can't be read.
        """
        first: tuple[int, int] | None = None
        for start in range(0, len(self.paths), batch_size):
            batch = []
            for path in self.paths[start : start + batch_size]:
                array = self._open(path)
                first = first or array.shape[:2]
                if array.shape[:2] != first:
                    raise UsageError(
                        f"The images differ in size: {first[1]}x{first[0]} and {array.shape[1]}x{array.shape[0]}",
                        where=str(path),
                        fix="Crop them to one size with --image-size N (shorter side to N, then the centre)",
                    )
                batch.append(torch.from_numpy(array))
            yield torch.stack(batch)

    def _open(self, path: Path) -> np.ndarray:
        from PIL import Image

        from dqtool.metrics.resize import center_crop

        try:
            with open_regular(path) as stream, Image.open(stream, formats=FORMATS) as image:
                most = min(PIXELS, PIXELS_OF_ANY + PIXELS_PER_BYTE * os.fstat(stream.fileno()).st_size)
                if math.prod(image.size) > most:
                    raise ArtifactError(
                        f"This image has {math.prod(image.size):,} pixels, and at most {most:,} are read from such a file",
                        where=str(path),
                        fix="Scale it down, or remove it",
                    )
                rgb = _in_8_bits(image, path).convert("RGB")
        except (MemoryError, DqtoolError):
            raise
        except Exception as error:  # Pillow's parsers trust what a file says of its own parts
            raise ArtifactError("This image can't be read", where=str(path), fix="Repair or remove it") from error
        return np.array(rgb if self.size is None else center_crop(rgb, self.size), dtype=np.uint8)


def _in_8_bits(image: Image.Image, path: Path) -> Image.Image:
    """Return an image with 8 bits per channel. 16-bit grey is scaled here, since Pillow's own conversion clips it.

    Raises:
        ArtifactError: the image has 32 bits per pixel.
    """
    from PIL import Image

    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() >= 1 << 16:
        raise ArtifactError(
            f"This image has 32-bit pixels (mode {image.mode}), whose value of white is unknown",
            where=str(path),
            fix="Store it with 8 or 16 bits",
        )
    return Image.fromarray(((values.astype(np.int64) * 255 + 32767) // 65535).astype(np.uint8))


class NpzImages:
    """Array `arr_0` of an npz file, uint8 `[N, H, W, 3]`, read in batches from the archive.

    Raises:
        EnvironmentFault: the file is missing.
        ArtifactError: the file has no such array of images.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.given = os.fspath(path)
        if IMAGES not in npz_names(path):
            raise ArtifactError("This file holds no images: it lacks the array arr_0", where=self.given, fix=NPZ)
        with self._open() as stream:
            self.shape, self.is_fortran, self.dtype = array_header(stream)
        if math.prod(self.shape[1:]) > LARGEST:
            raise ArtifactError(
                f"An image of {list(self.shape[1:])} is larger than the {LARGEST:,} values that are read at once",
                where=self.given,
            )
        images = len(self.shape) == 4 and self.shape[3] in (1, 3) and self.dtype == np.uint8
        if not images or self.is_fortran or min(self.shape) < 1:
            raise ArtifactError(
                f"arr_0 should be uint8 [N, H, W, 3] in C order, and is {self.dtype} {list(self.shape)}",
                where=self.given,
                fix=NPZ,
            )

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, batch_size: int) -> Iterator[Tensor]:
        """Yield batches uint8 `[n, H, W, C]`.

        Raises:
            ArtifactError: the file is truncated.
        """
        one = math.prod(self.shape[1:])
        with self._open() as stream:
            array_header(stream)
            for start in range(0, len(self), batch_size):
                count = min(batch_size, len(self) - start)
                data = stream.read(count * one)
                if len(data) != count * one:
                    raise ArtifactError("This file ends in the middle of arr_0", where=self.given)
                yield torch.frombuffer(bytearray(data), dtype=torch.uint8).view(count, *self.shape[1:])

    @contextlib.contextmanager
    def _open(self) -> Iterator[Any]:
        with opened_npz(self.given) as archive, archive.open(f"{IMAGES}.npy") as stream:
            yield stream


def write_npz(
    path: str | os.PathLike[str],
    images: tuple[int, Iterable[Tensor]] | None,
    arrays: Mapping[str, np.ndarray],
    about: JsonObject,
) -> None:
    """Write an npz file in the suite's layout, completely or not at all.

    Args:
        images: (N, batches uint8 `[n, H, W, C]`), streamed into `arr_0`; one grey channel becomes three equal ones.
        about: stored as JSON in the entry `dqtool`.

    Raises:
        EnvironmentFault: the file can't be written.
    """
    with whole_file(target_of(path)) as new, zipfile.ZipFile(new, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        if images is not None:
            _write_images(archive, *images)
        for name, array in {**arrays, "dqtool": np.array(json.dumps(about, sort_keys=True))}.items():
            with archive.open(_entry(name), "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, np.asarray(array, order="C"), allow_pickle=False)


def _entry(name: str) -> zipfile.ZipInfo:
    """Return an archive member without the time of day, so that equal content gives equal files."""
    return zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))


def _write_images(archive: zipfile.ZipFile, count: int, batches: Iterable[Tensor]) -> None:
    """Stream batches of images into `arr_0`."""
    written = 0
    with archive.open(_entry(IMAGES), "w", force_zip64=True) as stream:
        for batch in batches:
            rgb = batch.expand(*batch.shape[:3], 3).contiguous()
            if written == 0:
                header = {"descr": "|u1", "fortran_order": False, "shape": (count, *rgb.shape[1:])}
                np.lib.format.write_array_header_1_0(stream, header)
            stream.write(rgb.numpy().tobytes())
            written += len(rgb)
    assert written == count, (written, count)
