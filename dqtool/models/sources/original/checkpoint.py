"""Readers of other projects' checkpoints: safetensors files, and pickles, whose code is never run."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqtool.artifacts import read_header
from dqtool.artifacts.files import os_fault
from dqtool.artifacts.header import TORCH_DTYPES, TensorEntry
from dqtool.artifacts.reading import CountedReader, open_regular
from dqtool.artifacts.torch_files import check_torch_file
from dqtool.errors import ArtifactError
from dqtool.models.sources.original.normal_form import plain_entries, plain_tensors

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PICKLES", "is_pickle", "read_checkpoint", "read_entries"]

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".th")
"""File endings of `torch.save`."""

# Objects that training frameworks store next to the tensors. They are read as inert records: no package is imported.
_BYSTANDERS = (
    "argparse.Namespace",
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.lr_monitor.LearningRateMonitor",
    "pytorch_lightning.utilities.parsing.AttributeDict",
)
_WRAPPERS = (
    *("ema", "ema_state_dict", "model_ema", "ema_model", "params_ema"),
    *("state_dict", "model", "model_state_dict", "module", "unet", "transformer", "network", "params", "weights"),
)
"""Keys of a checkpoint that hold the tensors, in order of preference: averaged weights first, since samples use them."""


class _Inert:
    """Inert substitute for an object of a training framework."""

    def __new__(cls, *_: object, **__: object) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


def is_pickle(path: Path) -> bool:
    """Return whether the file's name ends as those of `torch.save` do."""
    return path.suffix.lower() in PICKLES


def read_entries(path: Path) -> dict[str, TensorEntry]:
    """Return {name: {dtype, shape}} of every tensor, without wrappers around the state.

    The tensors of safetensors and zip files are not read.

    Raises:
        ArtifactError: the file is no checkpoint, or a pickle that would run code.
    """
    if not is_pickle(path):
        return plain_entries(read_header(path), str(path))
    known = {f"torch.{ours}": theirs for ours, theirs in TORCH_DTYPES.items()}
    entries: dict[str, TensorEntry] = {
        name: {"dtype": known.get(str(tensor.dtype), "?"), "shape": list(tensor.shape)}
        for name, tensor in _load(path, "meta").items()
    }
    return plain_entries(entries, str(path))


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Return {name: tensor}, views of the mapped file where the format allows. Raises the errors of `read_entries`."""
    if is_pickle(path):
        return plain_tensors(_load(path, "cpu"))
    from dqtool.artifacts.tensorfile import load_tensors

    read_header(path)
    return plain_tensors(load_tensors(path))


def _check_pickle(path: Path) -> None:
    """Refuse an archive whose members overlap or are compressed, and a pickle that is too large or too long."""
    try:
        check_torch_file(path)
    except ValueError as error:
        raise ArtifactError(
            f"This is no checkpoint that torch can read: {error}",
            where=str(path),
            fix="Save its weights alone, as .safetensors, where you trust the file",
        ) from error


def _load(path: Path, device: str) -> dict[str, Tensor]:
    import torch

    _check_pickle(path)
    allowed: list[Any] = [(_Inert, name) for name in _BYSTANDERS]
    try:
        with torch.serialization.safe_globals(allowed):
            try:
                content = torch.load(path, map_location=device, weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap can only be used" not in str(error):
                    raise
                with open_regular(path) as stream:  # the format before torch 1.6
                    content = torch.load(CountedReader(stream), map_location=device, weights_only=True)  # type: ignore[arg-type]
    except pickle.UnpicklingError as error:
        raise ArtifactError(
            f"This checkpoint holds objects whose code would have to run: {_offender(str(error))}",
            where=str(path),
            fix="Save its weights alone (a state_dict, better still as .safetensors) where you trust the file",
        ) from error
    except OSError as error:
        raise os_fault(error, path) from error
    except MemoryError:
        raise
    except Exception as error:  # an untrusted pickle can raise any exception
        raise ArtifactError(f"This is no checkpoint that torch can read: {error}", where=str(path)) from error
    return _tensors(content, path)


def _offender(text: str) -> str:
    """Return the line of torch's error message that names the offending object."""
    lines = [line.strip() for line in text.splitlines() if "GLOBAL" in line or "Unsupported" in line]
    return (lines or text.strip().splitlines() or ["an unknown object"])[0]


def _tensors(content: Any, path: Path) -> dict[str, Tensor]:
    import torch

    if isinstance(content, list | tuple):  # ermongroup/ddim: [model, optimizer, epoch, step, averaged model]
        candidates = [part for part in content if _is_state(part)]
        if candidates:
            content = candidates[-1]
    if isinstance(content, Mapping) and not any(isinstance(value, torch.Tensor) for value in content.values()):
        content = next((content[key] for key in _WRAPPERS if _is_state(content.get(key))), content)
    if not _is_state(content):
        raise ArtifactError(
            "This checkpoint holds no table of named tensors", where=str(path), fix="Give a file with a state_dict"
        )
    tensors = {name: v for name, v in content.items() if isinstance(name, str) and isinstance(v, torch.Tensor)}
    held = sum({(s := t.untyped_storage())._cdata: s.nbytes() for t in tensors.values()}.values())
    if sum(t.numel() * t.element_size() for t in tensors.values()) > 4 * held:
        raise ArtifactError("The tensors of this checkpoint are larger than what it holds", where=str(path))
    return tensors


def _is_state(value: Any) -> bool:
    import torch

    return isinstance(value, Mapping) and any(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in value.items()
    )
