"""Example arguments of a network without an adapter: their file, their record in the config, and how a call is made of them.

`--example FILE.safetensors` holds one tensor `[1, ...]` for each further argument of the forward. Arguments of another kind
stand in `FILE.json` beside it, by name. A value there is a number, a text, a list or a dict, and in any place one of:

| value | stands for |
| --- | --- |
| `{"$tensor": NAME}` | the tensor of the file, a row for each sample of the batch |
| `{"$tensor": NAME, "dim": D}` | the same with the batch in dimension D |
| `{"$tensor": NAME, "repeat": R}` | the same with R equal rows for each sample, as for the frames of a video |
| `{"$shared": NAME}` | the tensor of the file without its first dimension, the same for every batch |
| `{"$each": VALUE}` | a list with VALUE for each sample, whose tensors have no batch dimension |
| `{"$concat": [VALUE, ...], "dim": D}` | several tensors side by side |

The config keeps shapes under `_example` and the JSON under `_arguments`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dqtool.artifacts import read_header
from dqtool.artifacts.tensorfile import load_tensors
from dqtool.errors import ArtifactError
from dqtool.models.sources.example_files import example_files
from dqtool.models.sources.reading import read_json

__all__ = ["ARGUMENTS", "EXAMPLE", "call_arguments", "draw_example", "read_example"]

EXAMPLE = "_example"
"""Config key of the tensors: shape and dtype of one sample, by name, and the values where they matter."""

ARGUMENTS = "_arguments"
"""Config key of the arguments that are not one tensor with the batch in front."""

MOST_VALUES = 1 << 16
"""Largest number of values of one tensor that a config keeps."""

FEW = 16
"""Integers in a float tensor of at most this many values are sizes or coordinates, which random numbers don't replace."""

KINDS = {
    "$tensor": {"dim", "repeat"},
    "$shared": set[str](),
    "$each": set[str](),
    "$concat": {"dim"},
}
"""Keys that make a mapping of the JSON file stand for a tensor, with the keys that may stand beside them."""


def read_example(path: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config entries of an example, for a network whose forward has these `parameters`.

    `path` is the .safetensors file, with or without a .json file beside it, or the .json file.

    Raises:
        EnvironmentFault: a file can't be read.
        ArtifactError: a file is damaged, a tensor has no batch dimension, or the JSON file names what does not exist.
    """
    tensors: dict[str, Tensor] = {}
    structure: dict[str, Any] = {}
    for file in example_files(path):
        if file.suffix != ".json":
            read_header(file)
            tensors = load_tensors(file)
            continue
        structure = dict(read_json(file))
        for argument, value in structure.items():
            if argument not in parameters:
                raise ArtifactError(f"The network takes no argument '{argument}'", where=str(file))
            _check(value, tensors, f"{file}, key {argument}")
    shared = set(_names(structure, "$shared"))
    entries = {}
    for name, tensor in sorted(tensors.items()):
        if tensor.dim() == 0:
            raise ArtifactError(f"'{name}' has no batch dimension", where=path, fix="Give tensors [1, ...]")
        entries[name] = _record(name, tensor, name in shared)
    return {EXAMPLE: entries} | ({ARGUMENTS: structure} if structure else {})


def draw_example(entries: Mapping[str, Any], batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Return tensors `[batch, ...]` for the record of an example: its values where it has them, else random numbers."""
    given = {}
    for name, entry in entries.items():
        shape, dtype = (batch, *entry["shape"]), getattr(torch, entry["dtype"])
        if "values" in entry:
            row = torch.tensor(entry["values"], dtype=torch.float64 if dtype.is_floating_point else torch.int64)
            given[name] = row.to(dtype).view(shape[1:]).expand(shape).clone()
        elif dtype.is_floating_point:
            given[name] = torch.randn(shape, generator=generator).to(dtype)
        else:
            given[name] = torch.randint(0, int(entry.get("largest", 0)) + 1, shape, generator=generator).to(dtype)
    return given


def call_arguments(structure: Mapping[str, Any], tensors: Mapping[str, Tensor], batch: int) -> dict[str, Any]:
    """Return the arguments of one call: the tensors `[batch, ...]` by name, and what `structure` makes of them."""
    used = set(_names(structure))
    plain = {name: value for name, value in tensors.items() if name not in used}
    return plain | {name: _made(value, tensors, batch, None) for name, value in structure.items()}


def _made(value: Any, tensors: Mapping[str, Tensor], batch: int, sample: int | None) -> Any:
    """Return the value of one place; `sample` is the sample of the surrounding `$each`."""
    if isinstance(value, list):
        return [_made(each, tensors, batch, sample) for each in value]
    if not isinstance(value, Mapping):
        return value
    kind = _kind(value)
    if kind == "$each":
        return [_made(value["$each"], tensors, batch, index) for index in range(batch)]
    if kind == "$concat":
        parts = [_made(each, tensors, batch, sample) for each in value["$concat"]]
        return torch.cat(parts, int(value.get("dim", 1)))
    if kind == "$shared":
        return tensors[value["$shared"]][0]
    if kind == "$tensor":
        tensor = tensors[value["$tensor"]]
        if sample is not None:
            return tensor[sample]
        tensor = tensor.repeat_interleave(int(value["repeat"]), 0) if "repeat" in value else tensor
        return tensor.movedim(0, int(value.get("dim", 0)))
    return {key: _made(each, tensors, batch, sample) for key, each in value.items()}


def _record(name: str, tensor: Tensor, shared: bool) -> dict[str, Any]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    entry: dict[str, Any] = {"shape": list(tensor.shape[1:]), "dtype": dtype}
    row = tensor[0] if len(tensor) else tensor
    whole = not tensor.is_floating_point() or bool((row == row.round()).all())
    matters = shared or name.endswith("mask") or (tensor.dim() > 1 and not tensor.is_floating_point())
    if (matters or (whole and tensor.is_floating_point() and row.numel() <= FEW)) and row.numel() <= MOST_VALUES:
        entry["values"] = row.flatten().tolist() if tensor.dtype != torch.bool else row.flatten().int().tolist()
    elif not tensor.is_floating_point():
        entry["largest"] = int(tensor.max())
    return entry


def _kind(value: Mapping[str, Any]) -> str | None:
    return next((key for key in value if key in KINDS), None)


def _check(value: Any, tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise `ArtifactError` for a key or a tensor that does not exist."""
    if isinstance(value, list):
        for each in value:
            _check(each, tensors, where)
    if not isinstance(value, Mapping):
        return
    kind = _kind(value)
    strange = [key for key in value if (key.startswith("$") if kind is None else key not in {kind} | KINDS[kind])]
    if strange:
        raise ArtifactError(
            f"'{strange[0]}' has no meaning here", where=where, fix=f"Known: {', '.join(KINDS)}, and dim and repeat"
        )
    if kind in ("$tensor", "$shared") and value[kind] not in tensors:
        raise ArtifactError(
            f"The example holds no tensor '{value[kind]}'",
            where=where,
            fix=f"It holds {', '.join(sorted(tensors)) or 'none'}",
        )
    for each in value.values():
        _check(each, tensors, where)


def _names(value: Any, *kinds: str) -> Iterator[str]:
    """Yield the names of the tensors that a structure refers to."""
    if isinstance(value, list):
        for each in value:
            yield from _names(each, *kinds)
    elif isinstance(value, Mapping):
        kind = _kind(value)
        if kind in (kinds or ("$tensor", "$shared")):
            yield str(value[kind])
        else:
            for each in value.values():
                yield from _names(each, *kinds)
