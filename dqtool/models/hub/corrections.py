"""Corrections of predictions in pipeline calls, switched off for a sampling that they are not for.

A network knows its timesteps but not its sampler. A pipeline has the scheduler, and its call the number of steps and the
guidance, so the decision falls there.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dqtool.artifacts.jsonvalues import Json, JsonObject
from dqtool.errors import DqtoolWarning
from dqtool.models.sampling.fitted import FITTED, fitted_with, misfit, sentence, used_by

__all__ = ["ASKED", "corrected_as_fitted", "fitted_of_network"]

ASKED = "_dqtool_correction"
"""Entry of a network's `__dict__` with the value of `DqtoolConfig(correction=...)`: "auto", "on" or "off"."""


@contextlib.contextmanager
def corrected_as_fitted(
    pipeline: Any, call: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]
) -> Iterator[None]:
    """Switch corrections that don't fit this call of `pipeline` off until it ends, with one warning for each network."""
    networks = [] if pipeline is None else _networks(pipeline)
    if not networks:
        yield
        return
    from dqtool.nn.prediction import is_correcting, set_correcting

    before = [(network, is_correcting(network)) for network, _ in networks]
    try:
        for network, fitted in networks:
            text = misfit(fitted, _used(pipeline, call, args, kwargs))
            if text and is_correcting(network) and network.__dict__.get(ASKED, "auto") == "auto":
                _switch_off(network, fitted, text)
        yield
    finally:
        for network, on in before:
            set_correcting(network, on)


def fitted_of_network(network: Any) -> JsonObject | None:
    """Return the sampling that a loaded network's correction was fitted with; None for a network without one."""
    origin = network.__dict__.get("_dqtool_origin")
    manifest = getattr(origin, "manifest", None) or getattr(network.__dict__.get("artifact"), "manifest", None)
    quantization = getattr(origin, "quantization", None) or {}
    found = quantization.get(FITTED) or (manifest.metrics.as_read.get(FITTED) if manifest is not None else None)
    if found is None and "prediction" in quantization and manifest is not None:
        return fitted_with(manifest.sampling) if manifest.sampling is not None else None
    return found if isinstance(found, Mapping) else None


def _networks(pipeline: Any) -> list[tuple[Any, JsonObject]]:
    """Return the networks of a pipeline that have a correction, each with the sampling of its fit."""
    found = []
    for component in vars(pipeline).values():
        network = getattr(component, "_orig_mod", component)  # the network that `torch.compile` wraps
        if hasattr(network, "_forward_hooks") and (fitted := fitted_of_network(network)) is not None:
            found.append((network, fitted))
    return found


def _switch_off(network: Any, fitted: JsonObject, text: str) -> None:
    from dqtool.nn.prediction import set_correcting

    artifact = network.__dict__.get("artifact")
    fixed = artifact is not None and artifact.manifest.parameters.format == "openvino"
    state = "can't be switched off in this graph" if fixed else "is off"
    if not fixed:
        set_correcting(network, False)
    warnings.warn(
        f"The correction of predictions {state}. It was fitted with {sentence(fitted)}; here are {text}. Sample as it was "
        "fitted, or keep it with quantization_config=dqtool.DqtoolConfig(correction='on')",
        DqtoolWarning,
        stacklevel=6,
    )


def _used(pipeline: Any, call: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> dict[str, Json]:
    """Return the record of the sampling of this call; what its arguments don't tell is None."""
    try:
        bound = inspect.signature(call).bind(pipeline, *args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
    except TypeError:  # the call itself reports what is wrong with its arguments
        given = dict(kwargs)
    listed = next((given[name] for name in ("timesteps", "sigmas") if given.get(name) is not None), None)
    steps = given.get("num_inference_steps") if listed is None else len(listed)
    guidance, eta = given.get("guidance_scale"), given.get("eta")
    guidance = max(1.0, float(guidance)) if isinstance(guidance, int | float) else None
    scheduler = getattr(pipeline, "scheduler", None)
    if scheduler is None:
        return {"steps": steps, "guidance": guidance, "eta": eta}
    return used_by(scheduler, steps, eta, guidance, listed is not None)
