"""Calls of a network one after another: all its quantizers share the step in flight, which another thread's call would
change."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.compiler import is_compiling

__all__ = ["CallLock", "one_call_at_a_time"]

Methods = Callable[[type], dict[str, Any]]


class CallLock:
    """A re-entrant lock. A deep copy or a pickle of what holds it gets one of its own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[CallLock], tuple[()]]:
        return CallLock, ()


def one_call_at_a_time(network: nn.Module, methods: Methods | None = None) -> nn.Module:
    """Let calls of `network`, their hooks included, wait for those of other threads, in place.

    It becomes one of a subclass with the same name. `methods`, a function of a module, makes the subclass's other methods
    from the class.
    """
    original: Any = getattr(type(network), "_dqtool_original", type(network))
    network.__dict__["_dqtool_lock"] = CallLock()
    network.__class__ = _subclass(original, methods)
    return network


@functools.cache
def _subclass(original: Any, methods: Methods | None) -> type[nn.Module]:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if is_compiling():  # a graph keeps its step to itself, and can't hold a lock
            return original.__call__(self, *args, **kwargs)
        with self.__dict__["_dqtool_lock"]:
            return original.__call__(self, *args, **kwargs)

    def reduce(self: Any, _protocol: object) -> tuple[Any, ...]:
        return _empty, (original, methods), self.__getstate__()

    own = {
        "__call__": call,
        "__reduce_ex__": reduce,  # no module has this class by its name
        "__module__": original.__module__,
        "__doc__": original.__doc__,
        "_dqtool_original": original,
    }
    return type(original.__name__, (original,), own if methods is None else own | methods(original))


def _empty(original: type, methods: Methods | None) -> nn.Module:
    made = _subclass(original, methods)
    return made.__new__(made)
