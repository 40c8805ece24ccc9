"""Tensors of the zip archives that `torch.save` and `torch.jit.save` write, read without running anything of theirs.

`data.pkl` in such an archive is a pickle: a program for Python's unpickler, which may call any function, and of a
TorchScript module one that calls the module's own `__setstate__`. Here its instructions are followed by hand. They can make
plain values and containers, records of tensors, and modules that are nothing but their attributes; whatever else they
name is refused. The numbers lie in the archive uncompressed, one member a storage.
"""

from __future__ import annotations

import errno
import pickletools
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqtool.artifacts.reading import check_archive, open_regular

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["archive_content", "flat_tensors", "is_archive"]

MAX_PROGRAM = 16 << 20
"""Bytes of `data.pkl`."""
MAX_STEPS = 300_000
"""Instructions of the program, and values that are walked through; an Inception network has about 20,000."""

_SCRIPTED = "__torch__"
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_TENSORS = ("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor")
_FIRST_ARGUMENT = (
    "torch._utils _rebuild_parameter",
    "torch.jit._pickle restore_type_tag",
    "torch.jit._pickle build_intlist",
    "torch.jit._pickle build_doublelist",
    "torch.jit._pickle build_boollist",
    "torch.jit._pickle build_tensorlist",
    "torch device",
)
_EMPTY = ("collections OrderedDict",)


@dataclass(frozen=True)
class _Global:
    """A name that the program mentions; it is never looked up."""

    name: str


@dataclass(frozen=True)
class _Storage:
    """A member of the archive with `count` numbers."""

    key: str
    dtype: str
    count: int


@dataclass(frozen=True)
class _View:
    """A tensor before its numbers are read."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(eq=False)
class _Module:
    """A TorchScript object: its attributes, and none of its methods."""

    attributes: dict[Any, Any] = field(default_factory=dict)


def is_archive(path: Path) -> bool:
    """Return whether this is a zip archive with a `data.pkl`, as torch writes them since 1.6."""
    with open_regular(path) as stream:
        try:
            members = check_archive(stream, packed=True)
        except ValueError:
            return False
    return any(member.filename.endswith("/data.pkl") for member in members)


def archive_content(path: Path) -> Any:
    """Return what an archive holds: tensors, plain values and containers; a TorchScript module as a dict of its attributes.

    The tensors are copies, on the CPU.

    Raises:
        ValueError: the archive is damaged, too large for what it is, or would have to run code.
        OSError: it can't be read.
    """
    try:
        return _content(path)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # RuntimeError: an encrypted member
        raise ValueError(f"this archive is damaged: {error}") from error
    except OSError as error:
        if error.errno in (None, errno.EINVAL):  # a member that begins before the file
            raise ValueError(f"this archive is damaged: {error}") from error
        raise


def _content(path: Path) -> Any:
    with open_regular(path) as stream, zipfile.ZipFile(stream) as archive:
        members = {member.filename: member for member in archive.infolist()}
        programs = [name for name in members if name.endswith("/data.pkl")]
        if len(programs) != 1:
            raise ValueError("no archive of torch: it has not one data.pkl")
        root = programs[0].removesuffix("data.pkl")
        if members[programs[0]].file_size > MAX_PROGRAM:
            raise ValueError("the program of this archive is too long")
        with archive.open(programs[0]) as program:
            content = _follow(program.read(MAX_PROGRAM + 1)[:MAX_PROGRAM])
        reader = _Reader(archive, members, f"{root}data/", path.stat().st_size)
        return _finished(content, reader)


def flat_tensors(content: Any) -> dict[str, Tensor]:
    """Return the tensors in nested dicts by their dotted names, as a module's `state_dict` has them.

    Raises:
        ValueError: there are more values than any network has.
    """
    import torch

    found: dict[str, Tensor] = {}
    waiting: list[tuple[str, Any]] = [("", content)]
    steps = 0
    while waiting:
        prefix, value = waiting.pop()
        steps += 1
        if steps > MAX_STEPS:
            raise ValueError("this archive holds too many values")
        if isinstance(value, torch.Tensor):
            found[prefix] = value
        elif isinstance(value, Mapping):
            waiting += [(f"{prefix}.{key}" if prefix else str(key), inner) for key, inner in value.items()]
    return found


def _follow(program: bytes) -> Any:
    """Return the value that a pickle's instructions make; raise `ValueError` for any but the few that data needs."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    steps = 0

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    try:
        for code, given, _ in pickletools.genops(program):
            argument: Any = given
            steps += 1
            if steps > MAX_STEPS:
                raise ValueError("the program of this archive is too long")
            name = code.name
            if name in ("PROTO", "FRAME"):
                continue
            if name == "STOP":
                return stack.pop()
            if name in _VALUES:
                stack.append(_VALUES[name])
            elif name in _NUMBERS or name in _TEXTS:
                stack.append(argument)
            elif name == "MARK":
                marks.append(len(stack))
            elif name in _NEW:
                stack.append(_NEW[name]())
            elif name == "TUPLE":
                stack.append(tuple(since_mark()))
            elif name in _TUPLES:
                size = _TUPLES[name]
                stack[-size:] = [tuple(stack[-size:])]
            elif name in ("APPEND", "APPENDS"):
                items = [stack.pop()] if name == "APPEND" else since_mark()
                _expect(stack[-1], list).extend(items)
            elif name in ("SETITEM", "SETITEMS"):
                items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else since_mark()
                _set(_expect(stack[-1], dict), items)
            elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
                memo[argument] = stack[-1]
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET", "GET"):
                stack.append(memo[argument])
            elif name == "GLOBAL":
                stack.append(_known(argument))
            elif name == "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(_known(f"{module} {attribute}"))
            elif name == "BINPERSID":
                stack.append(_storage(stack.pop()))
            elif name == "REDUCE":
                arguments, callee = stack.pop(), stack.pop()
                stack.append(_call(callee, arguments))
            elif name == "NEWOBJ":
                arguments, callee = stack.pop(), stack.pop()
                stack.append(_object(callee, arguments))
            elif name == "BUILD":
                state = stack.pop()
                _build(stack[-1], state)
            elif name == "POP":
                stack.pop()
            elif name == "POP_MARK":
                since_mark()
            else:
                raise ValueError(f"the instruction {name} is not for data")
    except (IndexError, KeyError, TypeError, AttributeError, OverflowError, UnicodeError) as error:
        raise ValueError("the program of this archive is damaged") from error
    raise ValueError("the program of this archive has no end")


_VALUES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NUMBERS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT")
_TEXTS = ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINSTRING", "SHORT_BINSTRING")
_NEW: dict[str, type] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _expect(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError("the program of this archive is damaged")
    return value


def _set(target: dict[Any, Any], items: list[Any]) -> None:
    """Put key, value, key, value into a dict; only text is a key, as numbers can be chosen to collide."""
    for key, value in zip(items[::2], items[1::2], strict=True):
        if isinstance(key, str):
            target[key] = value


def _known(name: str) -> _Global:
    module, _, attribute = name.partition(" ")
    scripted = module == _SCRIPTED or module.startswith(f"{_SCRIPTED}.")
    stored = module == "torch" and attribute in _STORAGES
    if scripted or stored or name in (*_TENSORS, *_FIRST_ARGUMENT, *_EMPTY):
        return _Global(name)
    raise ValueError(f"this archive would have to run code: {name!a:.100}")


def _storage(identity: Any) -> _Storage:
    """Return the storage that `("storage", torch FloatStorage, key, device, count)`, the only kind of reference, names."""
    kind, dtype, key, _, count = _expect(identity, tuple)
    names = _expect(dtype, _Global).name.partition(" ")
    if kind != "storage" or names[2] not in _STORAGES or type(count) is not int or count < 0:
        raise ValueError("a storage of this archive is damaged")
    return _Storage(_expect(key, str), _STORAGES[names[2]], count)


def _call(callee: Any, arguments: Any) -> Any:
    name, given = _expect(callee, _Global).name, _expect(arguments, tuple)
    if name in _EMPTY and not given:
        return {}
    if name in _FIRST_ARGUMENT:
        return given[0]
    if name in _TENSORS:
        return _view(*given[:4])
    raise ValueError(f"this archive would have to run code: {name!a:.100}")


def _object(callee: Any, arguments: Any) -> _Module:
    name = _expect(callee, _Global).name
    if not name.startswith(_SCRIPTED) or arguments != ():
        raise ValueError(f"this archive would have to run code: {name!a:.100}")
    return _Module()


def _build(target: Any, state: Any) -> None:
    """Give a module its attributes. What an `OrderedDict` has beside its items, and what a module's own `__setstate__`
    would take, is passed over."""
    if isinstance(target, _Module) and isinstance(state, dict):
        target.attributes.update(state)
    elif not isinstance(target, (_Module, dict)):
        raise ValueError("the program of this archive is damaged")


def _view(storage: Any, offset: Any, shape: Any, stride: Any) -> _View:
    """Return the view of a tensor; raise `ValueError` if it leaves its storage or has more numbers than that."""
    held = _expect(storage, _Storage)
    numbers = (offset, *_expect(shape, tuple), *_expect(stride, tuple))
    if len(shape) != len(stride) or len(shape) > 16 or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError("a tensor of this archive is damaged")
    last = offset + sum((length - 1) * step for length, step in zip(shape, stride, strict=True))
    if prod(shape) > held.count or (prod(shape) and last >= held.count):
        raise ValueError("a tensor of this archive leaves its storage")
    return _View(held, offset, shape, stride)


class _Reader:
    """Reads storages, each once, and never more bytes than the archive has."""

    def __init__(
        self, archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], folder: str, limit: int
    ) -> None:
        self._archive, self._members, self._folder, self._left = archive, members, folder, limit
        self._read: dict[tuple[str, str], Tensor] = {}

    def tensor(self, view: _View) -> Tensor:
        """Return the tensor of a view."""
        whole = self._numbers(view.storage)
        return whole.as_strided(view.shape, view.stride, view.offset)

    def _numbers(self, storage: _Storage) -> Tensor:
        import torch

        key = (storage.key, storage.dtype)
        if key in self._read and len(self._read[key]) == storage.count:
            return self._read[key]
        dtype: torch.dtype = getattr(torch, storage.dtype)
        member = self._members.get(self._folder + storage.key)
        size = storage.count * dtype.itemsize
        if member is None or member.compress_type != zipfile.ZIP_STORED or member.file_size != size:
            raise ValueError(f"the storage {storage.key!a:.40} of this archive is missing or damaged")
        self._left -= size
        if self._left < 0:
            raise ValueError("this archive says that it holds more than its size")
        data = bytearray(self._archive.read(member))
        if len(data) != size:
            raise ValueError(f"the storage {storage.key!a:.40} of this archive is damaged")
        self._read[key] = torch.frombuffer(data, dtype=dtype) if size else torch.empty(0, dtype=dtype)
        return self._read[key]


def _finished(content: Any, reader: _Reader) -> Any:
    """Return the content with its tensors read and its modules as dicts; what is shared stays shared."""
    done: dict[int, Any] = {}

    def finish(value: Any, depth: int) -> Any:
        if isinstance(value, _View):
            return reader.tensor(value)
        if not isinstance(value, (_Module, dict, list, tuple)):
            return None if isinstance(value, (_Global, _Storage)) else value
        if id(value) in done:
            return done[id(value)]
        if depth > 100:
            raise ValueError("the values of this archive lie too deep in each other")
        if isinstance(value, (_Module, dict)):
            items = value.attributes if isinstance(value, _Module) else value
            found: dict[str, Any] = {}
            done[id(value)] = found  # before its values, which may hold it
            found.update({key: finish(inner, depth + 1) for key, inner in items.items()})
            return found
        done[id(value)] = None
        done[id(value)] = [finish(inner, depth + 1) for inner in value]
        return done[id(value)]

    return finish(content, 0)
