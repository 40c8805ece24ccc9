"""Methods that a loaded network overrides without changing its class, and a lock that serializes its calls.

diffusers compares the classes of networks by identity, so a network keeps its class and the overriding methods are
attributes of the instance. Deep copies and pickles keep them.

Calls of one network run one after another, because all its quantizers share the current step.
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
    """A function bound to one network. `function` must be defined at module level, so that it can be pickled."""

    def __init__(self, network: nn.Module, function: Callable[..., Any], name: str) -> None:
        self.network, self.function, self.name = network, function, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function with the network as its first argument."""
        return self.function(self.network, *args, **kwargs)

    @property
    def __code__(self) -> CodeType:
        """Return the function's code object; `torch.export` reads it to name the traced function."""
        return self.function.__code__

    @property
    def __signature__(self) -> inspect.Signature:
        """Return the signature of the class method that this one overrides."""
        return inspect.signature(getattr(type(self.network), self.name).__get__(self.network))


def give(network: nn.Module, name: str, function: Callable[..., Any]) -> None:
    """Override the method `name` of this network alone with `function(network, ...)`."""
    network.__dict__[name] = Method(network, function, name)


class CallLock:
    """A re-entrant lock that can be copied and pickled; each copy is a new, unlocked lock."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[CallLock], tuple[()]]:
        return CallLock, ()


def one_call_at_a_time(network: nn.Module) -> nn.Module:
    """Serialize calls of `network`, hooks included, across threads. Modifies `network` in place and returns it."""
    network.__dict__["_dqtool_lock"] = CallLock()
    give(network, "_call_impl", _locked_call)
    return network


def _locked_call(network: Any, *args: Any, **kwargs: Any) -> Any:
    if is_compiling():  # a compiled graph has its own step and can't hold a lock
        return type(network)._call_impl(network, *args, **kwargs)
    with network.__dict__["_dqtool_lock"]:
        return type(network)._call_impl(network, *args, **kwargs)
