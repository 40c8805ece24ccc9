"""Bounds of files that `torch.save` writes, and the reader of small weight files in any of the usual formats.

Torch's own unpickler runs in Python, some microseconds an instruction, so that a few megabytes of instructions keep it
busy for many seconds. They are counted here first, without being followed.
"""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any

from dqtool.artifacts.reading import CountedReader, check_archive, open_regular
from dqtool.artifacts.torch_archive import archive_content, is_archive

__all__ = ["check_torch_file", "count_instructions", "weights_content"]

MAX_PICKLE = 4 << 20
"""Most bytes of a pickle; that of Stable Diffusion v1.4 has some 300 kB."""
INSTRUCTIONS = 150_000
"""Instructions of a pickle that any file may have: about 6,000 tensors."""
BYTES_EACH = 4096
"""Bytes of the file that allow one instruction more: checkpoints of trainers hold large tensors of many kinds."""
MAX_WEIGHTS = 2 << 30
"""Most bytes of a weight file of a metric; Inception has 95 MB, a CLIP tower with its aesthetic head 1.7 GB."""
_LEGACY = 5
"""Pickles at the start of the format before torch 1.6: magic number, version, machine, content, names of storages."""


def check_torch_file(path: str | os.PathLike[str]) -> None:
    """Check that a file of `torch.save`, of either format, holds as much as its size allows; nothing of it is run.

    Raises:
        ValueError: its members are compressed or overlap, or its pickle is damaged or too long.
        DqtoolError: it can't be opened.
    """
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        limit = INSTRUCTIONS + size // BYTES_EACH
        packed = stream.read(2) == b"PK"
        stream.seek(0)
        if not packed:
            start = io.BytesIO(stream.read(MAX_PICKLE))
            for _ in range(_LEGACY):
                limit -= count_instructions(start, limit)
            return
        pickles = [m for m in check_archive(stream) if m.filename.endswith((".pkl", ".json"))]
        for member in pickles:
            if member.file_size > MAX_PICKLE:
                raise ValueError(
                    f"the list of this checkpoint's objects takes {member.file_size:,} bytes, and at most "
                    f"{MAX_PICKLE:,} are read"
                )
        try:
            with zipfile.ZipFile(stream) as archive:
                for member in pickles:
                    if member.filename.endswith(".pkl"):
                        limit -= count_instructions(io.BytesIO(archive.read(member)), limit)
        except (zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError, OSError) as error:
            raise ValueError(f"it is a damaged zip archive: {error}") from error


def count_instructions(pickled: io.BytesIO, limit: int) -> int:
    """Return the number of instructions of one pickle; the stream is left behind it.

    Raises:
        ValueError: there are more than `limit`, or the pickle has no end.
    """
    count = 0
    try:
        for count, _ in enumerate(pickletools.genops(pickled), start=1):
            if count > limit:
                raise ValueError(f"its list of objects has more than {limit:,} instructions")
    except (IndexError, KeyError, OverflowError, UnicodeError) as error:
        raise ValueError("its list of objects is damaged") from error
    return count


def weights_content(path: Path) -> Any:
    """Return what a weight file holds: safetensors, or what `torch.save` and `torch.jit.save` write; no code is run.

    Raises:
        ValueError: it is damaged, larger than such files are, or would have to run code.
        DqtoolError: it can't be opened, or is no ordinary file.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from dqtool.artifacts.tensorfile import read_header

    with open_regular(path, MAX_WEIGHTS) as stream:
        start = stream.read(16)
    if start[8:9] == b"{":
        read_header(path)
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(str(error)) from error
    if start[:2] == b"PK" and is_archive(path):
        with open_regular(path) as stream:
            check_archive(stream, packed=True)
        return archive_content(path)
    check_torch_file(path)
    try:
        with open_regular(path) as stream:  # the format before torch 1.6
            return torch.load(CountedReader(stream), map_location="cpu", weights_only=True)  # type: ignore[arg-type]
    except MemoryError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(f"it holds objects whose code would have to run: {str(error)[:200]}") from error
    except Exception as error:  # the unpickler raises whatever Python does on a program that a stranger wrote
        raise ValueError(f"it is damaged: {error}") from error
