"""The safetensors file itself: its header without torch, and saving and loading with plain messages.

The library writes a file from tensors that are all in memory. `save_tensors` writes the same bytes one tensor at a time
where some are computed as they are written.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqtool.artifacts.deferred import DeferredTensors
from dqtool.artifacts.files import os_fault
from dqtool.artifacts.hashed_file import HashedFile
from dqtool.artifacts.header import METADATA, TORCH_DTYPES, TensorEntry, file_header
from dqtool.artifacts.reading import open_regular, parse_json
from dqtool.errors import ArtifactError, NumericError

if TYPE_CHECKING:
    import torch

__all__ = [
    "check_finite",
    "file_tensor",
    "library_faults",
    "load_tensors",
    "read_bytes",
    "read_header",
    "read_metadata",
    "save_tensors",
]

_MAX_HEADER = 16 << 20  # bytes: a hundred thousand tensors, and the published networks have a few thousand
_MAX_TENSORS = 100_000
_MAX_RANK = 16
_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
_LOADED = frozenset(TORCH_DTYPES.values()) | {"C64"}


def read_header(path: str | os.PathLike[str]) -> dict[str, TensorEntry]:
    """Return name -> {dtype, shape, data_offsets} of every tensor in a safetensors file, without torch.

    The offsets (bytes, from the end of the header) are checked to tile the file exactly.

    Raises:
        ArtifactError: the file is truncated, no safetensors file, or has a header beyond what is honest: over 16 MiB,
            100,000 tensors, 16 dimensions or numbers of 64 bits.
        EnvironmentFault: it can't be read.
    """
    return _header(path)[0]


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the texts that a safetensors file holds beside its tensors; raises as `read_header`."""
    found = _header(path)[1]
    return {key: value for key, value in found.items() if isinstance(value, str)} if isinstance(found, dict) else {}


def _header(path: str | os.PathLike[str]) -> tuple[dict[str, TensorEntry], Any]:
    where = os.fspath(path)
    try:
        with open_regular(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > 1 << 48:
                raise _foreign(where, "it does not start with the length of a header")
            if length > _MAX_HEADER:
                raise _foreign(where, f"its header would take {length:,} bytes, and at most {_MAX_HEADER:,} are read")
            if 8 + length > size:
                raise _truncated(where, 8 + length, size)
            text = stream.read(length)
    except OSError as error:
        raise os_fault(error, path) from error
    if (count := text.count(b'"data_offsets"')) > _MAX_TENSORS:
        raise _foreign(where, f"it lists {count:,} tensors, and at most {_MAX_TENSORS:,} are read")
    try:
        header = parse_json(text, values=12 * _MAX_TENSORS)
    except ValueError as error:
        raise _foreign(where, f"its header is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise _foreign(where, "its header is no JSON object")
    metadata = header.pop("__metadata__", None)
    if len(header) > _MAX_TENSORS:
        raise _foreign(where, f"it lists {len(header):,} tensors, and at most {_MAX_TENSORS:,} are read")
    end = 0
    for name, begin, stop in sorted(_spans(header, where), key=lambda span: span[1:]):
        if begin != end:
            raise _foreign(where, f"the bytes of tensor {name} overlap others or leave a gap")
        end = stop
    if 8 + length + end > size:
        raise _truncated(where, 8 + length + end, size)
    if 8 + length + end < size:
        raise _foreign(where, f"{size - 8 - length - end} bytes follow the last tensor")
    return header, metadata


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Save tensors so that equal ones give byte-identical files. Not atomic: write into a staging directory.

    Deferred tensors are made one after another while those before are written, and then the file's SHA-256 is returned,
    which comes along. Raises `EnvironmentFault` for a full or unwritable disk.
    """
    if isinstance(tensors, DeferredTensors):
        return _save_one_by_one(path, tensors)
    from safetensors.torch import save_file

    plain: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        # safetensors refuses tensors that share memory (tied weights, views of one buffer).
        plain[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    with library_faults(path):
        save_file(plain, path, metadata=METADATA)
    return None


def _save_one_by_one(path: Path, tensors: DeferredTensors) -> str:
    """Write the same file as the library does, byte for byte."""
    import torch

    like = {name: tensors.like(name) for name in tensors}
    header, order, _ = file_header({name: (str(t.dtype), tuple(t.shape)) for name, t in like.items()})
    with library_faults(path), HashedFile(path) as file:
        file.write(header)
        for name in order:
            rows = 0
            for piece in tensors.pieces(name, HashedFile.PIECE):
                tensor = piece.detach().cpu().contiguous()
                if (tensor.dtype, tensor.shape[1:]) != (like[name].dtype, like[name].shape[1:]):
                    raise ValueError(f"deferred tensor {name} is not what was announced")
                rows += len(tensor) if tensor.dim() else 1
                file.write(tensor.flatten().view(torch.uint8).numpy().data)
            if rows != (len(like[name]) if like[name].dim() else 1):
                raise ValueError(f"deferred tensor {name} is not what was announced")
        return file.finish()


def load_tensors(path: Path, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Return all tensors of a safetensors file on `device`.

    On the CPU they are views of the mapped file, so the file may be renamed over or removed but never written into.

    Raises:
        ArtifactError: the file is damaged, or holds tensors of a type that torch does not have.
        EnvironmentFault: it can't be read.
    """
    from safetensors.torch import load_file

    for name, entry in read_header(path).items():
        if entry["dtype"] not in _LOADED:
            raise ArtifactError(
                f"Tensor {name} is of type {entry['dtype']}, which dqtool does not read",
                where=os.fspath(path),
                fix="Store the weights as F32, F16 or BF16",
            )
    with library_faults(path):
        return load_file(path, device=device)


def read_bytes(path: Path, name: str) -> bytes:
    """Return the bytes of one tensor, read without torch."""
    begin, stop = read_header(path)[name]["data_offsets"]
    with open_regular(path) as stream:
        offset = 8 + int.from_bytes(stream.read(8), "little")
        stream.seek(offset + begin)
        return stream.read(stop - begin)


def file_tensor(path: Path) -> torch.Tensor:
    """Return a file's bytes as a uint8 tensor, mapped and not read."""
    import torch

    size = path.stat().st_size
    if size == 0:
        return torch.empty(0, dtype=torch.uint8)
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)


@contextlib.contextmanager
def library_faults(path: str | os.PathLike[str]) -> Iterator[None]:
    """Say what the safetensors library and the system raise about `path` as `ArtifactError` or `EnvironmentFault`."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        # The library wraps system errors in its own type and keeps their number in the text only.
        number = re.search(r"os error (\d+)", str(error))
        if number:
            raise os_fault(OSError(int(number[1]), os.strerror(int(number[1]))), path) from error
        raise ArtifactError(
            f"The safetensors file can not be used: {error}", where=os.fspath(path), fix="Make or download it again"
        ) from error
    except OSError as error:
        raise os_fault(error, path) from error


def check_finite(tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Raise `NumericError` that names the first tensor which holds a NaN or an infinity, and how many."""
    import torch

    for name, tensor in tensors.items():
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        # The 8-bit floats have no isfinite of their own.
        values = tensor.float() if tensor.element_size() == 1 else tensor
        if values.numel() and not values.is_complex():
            low, high = values.amin(), values.amax()  # both show a NaN, and are fast
            if bool(torch.isfinite(low) & torch.isfinite(high)):
                continue
        bad = int((~torch.isfinite(values)).sum())
        if bad:
            raise NumericError(
                f"Tensor {name} holds NaN or infinite values ({bad} of {tensor.numel()})",
                where=where,
                fix="Use a model whose weights are all finite; such values usually come from a diverged training or a "
                "conversion to half precision",
            )


def _spans(header: Mapping[str, TensorEntry], where: str) -> list[tuple[str, int, int]]:
    spans = []
    for name, entry in header.items():
        try:
            dtype, shape = entry["dtype"], entry["shape"]
            begin, stop = entry["data_offsets"]
            bits = _BITS[dtype]
            if len(shape) > _MAX_RANK:
                raise ValueError(len(shape))
            for number in (begin, stop, *shape):
                if type(number) is not int or number < 0:
                    raise ValueError(number)
            for length in shape:
                bits *= length
        except (KeyError, TypeError, ValueError) as error:
            raise _foreign(where, f"its header entry {name} is malformed") from error
        if (stop - begin) * 8 != bits:
            raise _foreign(where, f"the shape and the bytes of tensor {name} disagree")
        spans.append((name, begin, stop))
    return spans


def _foreign(where: str, why: str) -> ArtifactError:
    return ArtifactError(f"This is no valid safetensors file: {why}", where=where, fix="Give a .safetensors file")


def _truncated(where: str, expected: int, size: int) -> ArtifactError:
    return ArtifactError(
        f"The safetensors file is truncated: {size} bytes of {expected}", where=where, fix="Make or download it again"
    )
