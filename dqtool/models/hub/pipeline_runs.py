"""Pipeline calls as runs: one warning per call reports the timesteps that were not calibrated, and corrections of
predictions that were fitted for another sampling are switched off (`corrections`)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

__all__ = ["register"]


def register(pipeline_utils: ModuleType) -> None:
    """Make every pipeline class, present and future, open a `step_run` around its calls. Idempotent.

    `pipeline_utils` is `diffusers.pipelines.pipeline_utils`. The classes stay the same objects: diffusers compares them by
    identity.
    """
    base: Any = pipeline_utils.DiffusionPipeline
    if "__init_subclass__" in vars(base) and getattr(base.__init_subclass__, "_dqtool", False):
        return

    def watch(cls: Any, /, **kwargs: Any) -> None:
        super(base, cls).__init_subclass__(**kwargs)
        _wrap(cls)

    watch._dqtool = True  # type: ignore[attr-defined]
    base.__init_subclass__ = classmethod(watch)
    known = [base]
    for cls in known:
        known += type.__subclasses__(cls)
        _wrap(cls)


def _wrap(cls: Any) -> None:
    call = vars(cls).get("__call__")
    if call is not None and not hasattr(call, "_dqtool"):
        cls.__call__ = _as_run(call)


def _as_run(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def run(*args: Any, **kwargs: Any) -> Any:
        from dqtool.models.hub.corrections import corrected_as_fitted
        from dqtool.nn.steps import step_run

        pipeline = args[0] if args else None
        with step_run(), corrected_as_fitted(pipeline, call, args[1:], kwargs):
            return call(*args, **kwargs)

    run._dqtool = True  # type: ignore[attr-defined]
    return run
