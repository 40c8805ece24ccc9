"""Image sets: folders of images, and the ADM suite's `.npz` files, read and written in batches.

A sample batch holds `arr_0`, uint8 `[N, H, W, 3]`. Reference statistics hold `mu`, `sigma` (pool_3) and `mu_s`,
`sigma_s` (mixed_6/conv) in addition to the images, from which the suite computes precision and recall. Files written
here have one more entry, `dqtool`, a JSON text about their origin, which the suite ignores.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dqtool.artifacts.files import fsync_path, os_fault, staging, target_of
from dqtool.artifacts.reading import check_archive, open_regular
from dqtool.errors import ArtifactError, EnvironmentFault, UsageError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["IMAGES", "IMAGE_SUFFIXES", "ImageFolder", "NpzImages", "npz_arrays", "npz_names", "write_npz"]

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
IMAGES = "arr_0"
LARGEST = 64 << 20
"""Most bytes of an array that is read as a whole (the covariance of 2,048 features takes 32 MiB), and of one image."""
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    ValueError,
    TypeError,
    EOFError,
    KeyError,
    NotImplementedError,
    RecursionError,
    MemoryError,  # Python's parser on nested brackets in a header
    SyntaxError,
    RuntimeError,  # an encrypted member
)
_NPZ = "Give a file in the ADM suite's layout (arr_0, or mu, sigma, mu_s, sigma_s), or make one with `dqtool stats`"


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
        from PIL import Image, UnidentifiedImageError

        from dqtool.metrics.resize import center_crop

        try:
            with Image.open(path) as image:
                rgb = _in_8_bits(image, path).convert("RGB")
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
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
            raise ArtifactError("This file holds no images: it lacks the array arr_0", where=self.given, fix=_NPZ)
        with self._open() as stream:
            self.shape, self.is_fortran, self.dtype = _header(stream)
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
                fix=_NPZ,
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
            _header(stream)
            for start in range(0, len(self), batch_size):
                count = min(batch_size, len(self) - start)
                data = stream.read(count * one)
                if len(data) != count * one:
                    raise ArtifactError("This file ends in the middle of arr_0", where=self.given)
                yield torch.frombuffer(bytearray(data), dtype=torch.uint8).view(count, *self.shape[1:])

    @contextlib.contextmanager
    def _open(self) -> Iterator[Any]:
        with _opened(self.given) as archive, archive.open(f"{IMAGES}.npy") as stream:
            yield stream


def npz_names(path: str | os.PathLike[str]) -> list[str]:
    """Return the names of the arrays in an npz file.

    Raises:
        EnvironmentFault: the file can't be read.
        ArtifactError: the file is not an npz file, or is damaged.
    """
    with _opened(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def npz_arrays(path: str | os.PathLike[str], names: Sequence[str], limit: int = LARGEST) -> dict[str, np.ndarray]:
    """Return whole arrays of an npz file, each of at most `limit` bytes. Pickled objects are refused.

    Raises:
        EnvironmentFault: the file can't be read.
        ArtifactError: the file lacks an array, is not an npz file, or an array is larger than `limit`.
    """
    found = npz_names(path)
    for name in names:
        if name not in found:
            raise ArtifactError(
                f"This file has no {name}, only {', '.join(found) or 'nothing'}", where=os.fspath(path), fix=_NPZ
            )
    arrays = {}
    with _opened(path) as archive:
        for name in names:
            with archive.open(f"{name}.npy") as stream:
                shape, _, dtype = _header(stream)
            size = math.prod(shape) * dtype.itemsize
            if size > limit:
                raise ArtifactError(
                    f"{name} has {size:,} bytes, and at most {limit:,} are read", where=os.fspath(path), fix=_NPZ
                )
            with archive.open(f"{name}.npy") as stream:
                arrays[name] = np.lib.format.read_array(stream, allow_pickle=False)
    return arrays


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[zipfile.ZipFile]:
    """Open an npz file after a check of its list of members."""
    with _faults(os.fspath(path)), open_regular(path) as stream:
        check_archive(stream, packed=True)
        with zipfile.ZipFile(stream) as archive:
            yield archive


def write_npz(
    path: str | os.PathLike[str],
    images: tuple[int, Iterable[Tensor]] | None,
    arrays: Mapping[str, np.ndarray],
    about: Mapping[str, Any],
) -> None:
    """Write an npz file in the suite's layout, completely or not at all.

    Args:
        images: (N, batches uint8 `[n, H, W, C]`), streamed into `arr_0`; one grey channel becomes three equal ones.
        about: stored as JSON in the entry `dqtool`.

    Raises:
        EnvironmentFault: the file can't be written.
    """
    target = target_of(path)
    try:
        with staging(target) as area:
            new = area / "new.npz"
            with zipfile.ZipFile(new, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                if images is not None:
                    _write_images(archive, *images)
                for name, array in {**arrays, "dqtool": np.array(json.dumps(about, sort_keys=True))}.items():
                    with archive.open(_entry(name), "w", force_zip64=True) as stream:
                        np.lib.format.write_array(stream, np.asarray(array, order="C"), allow_pickle=False)
            fsync_path(new)
            os.replace(new, target)
            fsync_path(target.parent)
    except OSError as error:
        raise os_fault(error, path) from error


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


def _header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return shape, Fortran order and dtype of an npy stream."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(stream)
    if not all(type(side) is int and 0 <= side < 1 << 48 for side in shape) or len(shape) > 8:
        raise ValueError("an invalid shape")
    return shape, is_fortran, dtype


@contextlib.contextmanager
def _faults(given: str) -> Iterator[None]:
    """Turn errors of reading an npz file into the project's errors."""
    try:
        yield
    except OSError as error:
        if error.errno in (None, errno.EINVAL):  # a damaged archive may name an offset before the start of the file
            raise ArtifactError("This is no npz file, or it is damaged", where=given, fix=_NPZ) from error
        raise os_fault(error, given) from error
    except _DAMAGE as error:
        raise ArtifactError("This is no npz file, or it is damaged", where=given, fix=_NPZ) from error
