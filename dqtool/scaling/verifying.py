"""The proof that scaling changed nothing: the scaled network on divided inputs gives the original's output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from dqtool.errors import NumericError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dqtool.models.families import Family

__all__ = ["TOLERANCE", "check_equivalence"]

TOLERANCE = 1e-5
"""Largest allowed |scaled - original| relative to the output's largest magnitude: float32 round-off."""


def check_equivalence(
    network: nn.Module,
    scaled: Callable[[], Mapping[str, Tensor]],
    scales: Mapping[str, Tensor],
    family: Family,
    config: dict[str, Any],
    given: str,
) -> float:
    """Largest |y' - y| over the output's largest magnitude, on a random input at a random step; `network`, the original, is
    left as it was. `given` names it in an error.

    y' runs the tensors that `scaled()` gives, asked for when y is known, on `x / s`, where s is in `scales`.

    Raises:
        NumericError: it is more than round-off.
    """
    import torch

    from dqtool.core.device import beside
    from dqtool.scaling.divided_inputs import other_parameters, scaled_inputs

    arguments = beside(network, family.example(family.proof_config(config)))
    onednn = torch.backends.mkldnn.enabled
    # It would bring every weight into a layout of its own, which takes longer than multiplying by it once.
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        with torch.no_grad():
            original = network(**arguments, return_dict=False)[0]
            with scaled_inputs(network, beside(network, scales)), other_parameters(network, scaled()):
                changed = network(**arguments, return_dict=False)[0]
    finally:
        torch.backends.mkldnn.enabled = onednn
    error = float((changed - original).abs().max() / original.abs().max().clamp(min=torch.finfo(torch.float32).tiny))
    if not error <= TOLERANCE:
        raise NumericError(
            f"The dilated network's output differs from the original's by {error:.2g} relative, more than {TOLERANCE:g}",
            where=given,
            fix="A layer's input range may exceed what float32 resolves; lower --cap",
        )
    return error
