"""Published models at full size, from shapes alone: parameters, sizes and bit operations equal the published ones."""

from __future__ import annotations

import pytest
import torch

from dqtool.core.quantization import QuantizationSpec
from dqtool.models.architectures import ARCHITECTURES
from dqtool.models.families import family_of
from dqtool.stages.planning.forecast import forecast

LARGE = ("sd21", "sdxl", "sd3-medium", "flux-dev", "pixart-alpha")
"""Networks that are counted alone: a trace of their graphs takes seconds."""


@pytest.mark.parametrize("name", LARGE)
def test_networks_that_are_only_timed_have_the_published_parameters(name: str) -> None:
    arch = ARCHITECTURES[name]
    with torch.device("meta"):
        network = family_of(arch.class_name, name).build(arch.config)
    found = sum(t.numel() for t in network.state_dict().values())  # files hold the positions, too
    assert found == pytest.approx(arch.parameters, rel=0.01)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in LARGE])
def test_parameters_are_the_published_ones(name: str) -> None:
    arch = ARCHITECTURES[name]
    found = forecast(arch.class_name, arch.config, QuantizationSpec.parse("4/4"), arch.steps)
    assert found.parameters == pytest.approx(arch.parameters, rel=0.01)
    assert found.bytes_float32 == pytest.approx(4 * arch.parameters, rel=0.01)
    assert 7.5 < found.bytes_float32 / found.bytes < 8


def test_stable_diffusion_at_6_bits() -> None:
    """The forecast equals the paper's: 5.3x smaller, 27.9x fewer bit operations (arXiv 2409.14307 v1)."""
    arch = ARCHITECTURES["sd14"]
    found = forecast(arch.class_name, arch.config, QuantizationSpec.parse("6/6"), arch.steps)
    assert found.bytes_float32 / found.bytes == pytest.approx(5.3, rel=0.01)
    assert found.bops_float32 / found.bops == pytest.approx(27.9, rel=0.01)


def test_church_with_its_first_stage() -> None:
    """The size equals the paper's 1514.5 MB in float32, with the autoencoder."""
    arch = ARCHITECTURES["ldm8-church"]
    found = forecast(arch.class_name, arch.config, QuantizationSpec.parse("4/4"), arch.steps)
    assert (found.bytes_float32 + 4 * arch.first_stage) / 1e6 == pytest.approx(1514.5, rel=0.01)
