"""Checks of network and scheduler configs, made before anything is built from them.

Types come from the signature of the class's `__init__`, and valid names of schedules and prediction types from the
comparisons in its source, so every class of diffusers is covered. dqtool adds bounds: sizes are positive, numbers finite,
and a network has at most as many parameters as its file has tensors.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, Union

from dqtool.artifacts.jsonvalues import ForeignConfig
from dqtool.artifacts.schema import Bounds, Mismatch, find_mismatch
from dqtool.errors import ArtifactError, DqtoolError, EnvironmentFault

__all__ = ["bounded_parameters", "built", "check_network_config", "check_scheduler_config", "diffusers_class"]

MOST = 1 << 20
"""Largest integer in a network's config; vocabularies have tens of thousands of entries."""
WIDEST = 1 << 17
"""Largest number of channels, heads or groups."""
LARGEST_SAMPLE = 8192
"""Longest side of a sample."""
STEPS = 100_000
"""Largest number of training steps of a schedule; published ones have 1,000."""
PARAMETERS = 4_000
"""Largest number of parameter tensors of a network without a file; Stable Diffusion XL has 1,680."""

_POSITIVE = re.compile(r"(.*_)?(channels|size|heads|groups|head_dim)")
_BOUNDS: dict[str, Any] = {
    "num_train_timesteps": Annotated[int, Bounds(1, STEPS)],
    "original_inference_steps": Annotated[int, Bounds(1, STEPS)],
    "beta_start": Annotated[float, Bounds(0, 1)],
    "beta_end": Annotated[float, Bounds(0, 1)],
    "solver_order": Annotated[int, Bounds(1, 10)],
    "shift": Annotated[float, Bounds(1e-6, 1e6)],
    "clip_sample_range": Annotated[float, Bounds(0, 1e9)],
    "sample_max_value": Annotated[float, Bounds(0, 1e9)],
    "dynamic_thresholding_ratio": Annotated[float, Bounds(0, 1)],
}
_Side = Annotated[int, Bounds(1, LARGEST_SAMPLE)]
_OURS: dict[str, Any] = {
    "_context_tokens": Annotated[int, Bounds(1, 1 << 14)],
    "_sample_size": _Side | list[_Side],
}
_NAMED = ("beta_schedule", "prediction_type")
"""Parameters whose values a scheduler's source lists."""


def check_network_config(cls: type, config: ForeignConfig, where: str) -> None:
    """Check a network's config against the parameters of its diffusers class.

    Raises:
        ArtifactError: a value is invalid; the message names its key and what it must be.
    """
    _check(cls, config, where)
    for key, value in config.items():
        kind = _OURS.get(key)
        found = None if kind is None else find_mismatch(value, kind, key)
        if found is None and key in _kinds(cls) and value != _kinds(cls)[key][1] and not key.endswith("theta"):
            found = _sizes(value, key, _kinds(cls)[key][1])
        if found is not None:
            raise _fault(found, where)


def check_scheduler_config(cls: type, config: ForeignConfig, where: str) -> None:
    """Check a scheduler's config against the parameters of its diffusers class.

    Raises:
        ArtifactError: a value is invalid; the message names its key and what it must be.
    """
    _check(cls, config, where)
    for key, kind in _BOUNDS.items():
        if config.get(key) is not None and key in _kinds(cls):
            found = find_mismatch(config[key], kind, key)
            if found is not None:
                raise _fault(found, where)
    betas = config.get("trained_betas")
    if betas is not None:
        found = find_mismatch(betas, Annotated[list[Annotated[float, Bounds(0, 1)]], Bounds(1, STEPS)], "trained_betas")
        if found is not None:
            raise _fault(found, where)
    for key in _NAMED:
        known = _compared(cls, key)
        if key in config and known and config[key] not in known:
            raise _fault(Mismatch(key, f"one of {', '.join(sorted(known))}"), where)


def diffusers_class(name: object, base: str, where: str) -> Any:
    """Return the diffusers class called `name`, a value from a file; it must be a subclass of diffusers' class `base`.

    Raises:
        ArtifactError: diffusers has no such class, or it is no subclass of `base`.
        EnvironmentFault: the class needs a package that is not installed.
    """
    import diffusers

    try:
        cls = getattr(diffusers, name, None) if isinstance(name, str) and name.isidentifier() else None
    except Exception as error:  # diffusers imports the class's module now
        raise EnvironmentFault(f"diffusers can't import {name}: {error}", where=where) from error
    if isinstance(cls, type) and type(cls).__name__ == "DummyObject":
        needed = ", ".join(getattr(cls, "_backends", ())) or "a package"
        raise EnvironmentFault(f"{name} needs {needed}, which is not installed", where=where, fix="Install it with pip")
    if not isinstance(cls, type) or not issubclass(cls, getattr(diffusers, base)):
        kind = {"SchedulerMixin": "scheduler", "ModelMixin": "network"}[base]
        raise ArtifactError(
            f"diffusers has no {kind} '{name}'", where=where, fix="Correct the name, or upgrade diffusers"
        )
    return cls


@contextlib.contextmanager
def built(what: str, where: str) -> Iterator[None]:
    """Convert errors that diffusers raises while it builds something from a config into `ArtifactError`."""
    try:
        yield
    except (DqtoolError, MemoryError, OSError, ImportError):
        raise
    except Exception as error:  # constructors trust their arguments and raise whatever arithmetic and indexing do
        text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise ArtifactError(f"The config does not describe a {what}: {text}", where=where) from error


@contextlib.contextmanager
def bounded_parameters(most: int = PARAMETERS) -> Iterator[None]:
    """Limit networks that are built in this context to `most` parameter tensors.

    Raises:
        ArtifactError: a network has more.
    """
    from torch.nn.modules.module import register_module_parameter_registration_hook

    count = 0

    def seen(_module: object, _name: str, _parameter: object) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise ArtifactError(
                f"The config describes a network of more than {most:,} tensors, and its weights are fewer",
                where="model config",
                fix="Check that config and weights belong together",
            )

    handle = register_module_parameter_registration_hook(seen)
    try:
        yield
    finally:
        handle.remove()


def _check(cls: type, config: ForeignConfig, where: str) -> None:
    for key, (kind, default) in _kinds(cls).items():
        value = config.get(key)
        # Published configs set unused keys to null, whatever the annotation says.
        if value is None or value == default or (isinstance(default, list | tuple) and value == list(default)):
            continue
        if isinstance(value, str) and len(value) > 1000:
            raise _fault(Mismatch(key, "a text of 1000 characters or less"), where)
        found = None if kind is None else find_mismatch(value, kind, key)
        if found is not None:
            raise _fault(found, where)


def _fault(found: Mismatch, where: str) -> ArtifactError:
    return ArtifactError(
        f"{found.key} must be {found.what}", where=where, fix="Correct the config, or download it again"
    )


def _sizes(value: Any, key: str, default: Any) -> Mismatch | None:
    """Return the first problem with an integer under this key, at any depth; None where all are valid."""
    if isinstance(value, list | tuple):
        if len(value) > 10_000:
            return Mismatch(key, "a list of 10,000 items or less")
        if key.endswith("heads"):  # a block without attention has 0
            value = [item for item in value if item != 0]
        return next((found for item in value if (found := _sizes(item, key, default)) is not None), None)
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    positive = _POSITIVE.fullmatch(key) and default != 0
    least = 1 if positive else -1
    most = LARGEST_SAMPLE if key.endswith("sample_size") else WIDEST if positive else MOST
    return None if least <= value <= most else Mismatch(key, f"a whole number from {least} to {most:,}")


@cache
def _kinds(cls: type) -> dict[str, tuple[Any, Any]]:
    """Return type and default of each constructor parameter of a class; the type None accepts any JSON value."""
    parameters = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    try:
        hints = typing.get_type_hints(inspect.unwrap(cls.__init__), include_extras=True)  # type: ignore[misc]
    except Exception:  # annotations may use names that are not imported
        hints = {}
    kinds = {}
    for name, parameter in parameters.items():
        if name == "self" or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        default = None if parameter.default is parameter.empty else parameter.default
        kinds[name] = (_lenient(hints[name]) if name in hints else None, default)
    return kinds


def _lenient(kind: Any) -> Any:
    """Return an annotation as diffusers uses it.

    `Tuple[int]` has any length, and an entry for each block, or each layer of a block, which may be null. An int is a float,
    and 0 and 1 are flags.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Union or type(kind).__name__ == "UnionType":
        kinds = [_lenient(each) for each in arguments]
        return None if None in kinds else Union[tuple(kinds)]  # noqa: UP007
    if kind is bool:
        return Union[bool, typing.Literal[0, 1]]  # noqa: UP007
    if kind in (int, float, str, type(None)) or origin is typing.Literal:
        return kind
    if kind in (tuple, list) or origin in (tuple, list):
        inner = [_lenient(each) for each in arguments if each is not ...]
        if not inner or None in inner:
            return list[Any]
        entry: Any = Union[(*inner, type(None))]
        return list[Union[entry, list[entry]]]  # noqa: UP007
    if isinstance(kind, type) and kind.__module__.split(".")[0] in ("numpy", "torch"):
        return type(None)  # no JSON value has this type
    return None


@cache
def _compared(cls: type, key: str) -> frozenset[str]:
    """Return the strings that a class's source compares this parameter with, and its default."""
    found: set[str] = set()
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):
        return frozenset()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Compare):
            continue
        left = node.left
        name = left.id if isinstance(left, ast.Name) else left.attr if isinstance(left, ast.Attribute) else None
        if name == key:
            for part in (each for right in node.comparators for each in ast.walk(right)):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    found.add(part.value)
    default = _kinds(cls).get(key, (None, None))[1]
    return frozenset(found | {default}) if found and isinstance(default, str) else frozenset()
