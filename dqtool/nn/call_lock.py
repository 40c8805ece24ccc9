"""Methods of one network: what a loaded network does in another way than its class.

diffusers compares the classes of networks by identity, so a network keeps its own class, and its other methods are
attributes of the object. Copies, pickles and other processes keep them.

Calls of a network run one after another: all its quantizers share the step in flight, which another thread's call would
change.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from types import CodeType
from typing import Any

from torch import nn
from torch.compiler import is_compiling

__all__ = ["CallLock", "Method", "give", "one_call_at_a_time"]


class Method:
    """A function as the method of one network. `function` is a module's own, so that it pickles by name."""

    def __init__(self, network: nn.Module, function: Callable[..., Any], name: str) -> None:
        self.network, self.function, self.name = network, function, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function with the network before the arguments."""
        return self.function(self.network, *args, **kwargs)

    @property
    def __code__(self) -> CodeType:
        """The function's code, by which `torch.export` names what it traces."""
        return self.function.__code__

    @property
    def __signature__(self) -> inspect.Signature:
        """The signature of the class's method in whose place this stands."""
        return inspect.signature(getattr(type(self.network), self.name).__get__(self.network))


def give(network: nn.Module, name: str, function: Callable[..., Any]) -> None:
    """Let `function(network, ...)` be the method `name` of this network alone."""
    network.__dict__[name] = Method(network, function, name)


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


def one_call_at_a_time(network: nn.Module) -> nn.Module:
    """Let calls of `network`, their hooks included, wait for those of other threads, in place."""
    network.__dict__["_dqtool_lock"] = CallLock()
    give(network, "_call_impl", _locked_call)
    return network


def _locked_call(network: Any, *args: Any, **kwargs: Any) -> Any:
    if is_compiling():  # a graph keeps its step to itself, and can't hold a lock
        return type(network)._call_impl(network, *args, **kwargs)
    with network.__dict__["_dqtool_lock"]:
        return type(network)._call_impl(network, *args, **kwargs)
