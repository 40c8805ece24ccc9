"""Methods that a loaded network overrides without changing its class, and a lock that serializes its calls.

diffusers compares the classes of networks by identity, so a network keeps its class and the overriding methods are
attributes of the instance. Deep copies and pickles keep them.

Calls of one network run one after another, because all its quantizers share the current step.
"""

from __future__ import annotations

import inspect
import itertools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import CodeType, FunctionType
from typing import Any

from torch import nn
from torch.compiler import is_compiling

__all__ = ["CallLock", "Method", "give", "give_forward", "one_call_at_a_time", "run_forward", "take_forward"]

FORWARD = "_dqtool_forward"
"""Attribute with the function that is a network's forward at present."""
AROUND = "_dqtool_around"
"""Attribute with the function that makes the context in which a network is called."""


_COUNT = itertools.count()


class Method:
    """A function bound to one network. `function` must be defined at module level, so that it can be pickled.

    Each instance has a class of its own, whose `__call__` has a code object and a name of its own: `torch.compile` keeps graphs by
    the one, and the sizes that it has seen by the other. With shared ones a second network is compiled for changing sizes, and a
    ninth is not compiled.
    """

    network: nn.Module
    function: Callable[..., Any]
    name: str

    def __new__(cls, *_: Any) -> Method:
        """Make the instance and its class."""
        call: Any = Method.__call__
        code = call.__code__.replace(co_name=f"__call___{next(_COUNT)}")
        own = FunctionType(code, call.__globals__, call.__name__)
        return object.__new__(type(cls.__name__, (Method,), {"__call__": own}))

    def __init__(self, *given: Any) -> None:
        """Bind: `network`, `function`, `name`. Without arguments the instance waits for its state."""
        if given:
            self.network, self.function, self.name = given

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how a copy is made: with a class of its own."""
        return Method, (), self.__dict__

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


def give_forward(network: nn.Module, function: Callable[..., Any]) -> None:
    """Override `forward` of this network with `function(network, ...)`, which may change while accelerate or diffusers wrap it."""
    if FORWARD not in network.__dict__:
        give(network, "forward", run_forward)
    network.__dict__[FORWARD] = function


def take_forward(network: nn.Module) -> None:
    """Give the network the forward of its class back. What others have wrapped around `forward` stays."""
    if isinstance(network.__dict__.get("forward"), Method):
        del network.__dict__["forward"]
        network.__dict__.pop(FORWARD, None)
    else:
        network.__dict__[FORWARD] = _own_forward


def run_forward(network: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the present forward of a network, without hooks."""
    return network.__dict__.get(FORWARD, _own_forward)(network, *args, **kwargs)


def _own_forward(network: Any, *args: Any, **kwargs: Any) -> Any:
    return type(network).forward(network, *args, **kwargs)


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


def _plainly(_network: nn.Module) -> AbstractContextManager[None]:
    """Return a context that changes nothing."""
    return nullcontext()


def one_call_at_a_time(
    network: nn.Module, around: Callable[[nn.Module], AbstractContextManager[None]] = _plainly
) -> nn.Module:
    """Serialize calls of `network`, hooks included, across threads, and run each in the context `around(network)`.

    Modifies `network` in place and returns it. A network that has a lock keeps it: it may change its form within a call.
    """
    network.__dict__.setdefault("_dqtool_lock", CallLock())
    network.__dict__[AROUND] = around
    give(network, "_call_impl", _locked_call)
    return network


def _locked_call(network: Any, *args: Any, **kwargs: Any) -> Any:
    if is_compiling():  # a compiled graph has its own step and can't hold a lock
        return type(network)._call_impl(network, *args, **kwargs)
    with network.__dict__["_dqtool_lock"], network.__dict__.get(AROUND, _plainly)(network):
        return type(network)._call_impl(network, *args, **kwargs)
