"""`from_pretrained(torch_dtype=...)` of every family: half-precision networks compute what the float32 one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import NETWORKS, component_directory
from synthetic import synthetic_export
from torch import Tensor

import dqtool
from dqtool.models.families import family_of
from dqtool.models.sources.resolve import resolve_model


@pytest.fixture(scope="module", params=NETWORKS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an 8/8 network of one family, `exported`, beside the float one, `model`."""
    path = tmp_path_factory.mktemp(request.param)
    synthetic_export(str(component_directory(request.param, path / "model")), "8/8", path / "exported")
    return path


def loaded(path: Path, runtime: str, **options: Any) -> Any:
    import diffusers

    kind = getattr(diffusers, resolve_model(str(path / "model")).class_name)
    config = dqtool.DqtoolConfig(runtime=runtime)
    return kind.from_pretrained(path / "exported", quantization_config=config, **options)


def answer(path: Path, network: Any) -> Tensor:
    """The network's answer at its second step, to inputs of its own dtype."""
    source = resolve_model(str(path / "model"))
    family = family_of(source.class_name, "test")
    torch.manual_seed(0)
    example = family.example(source.config, batch=2) | {"timestep": network.timesteps[1].expand(2)}
    cast: Any = torch.utils._pytree.tree_map_only(
        Tensor, lambda t: t.to(network.dtype) if t.is_floating_point() else t, example
    )
    with torch.no_grad():
        found: Tensor = network(**cast, return_dict=False)[0]
    return found


@pytest.mark.parametrize("runtime", ["cpu", "simulate"])
def test_every_family_in_half_precision(exported: Path, runtime: str) -> None:
    reference = answer(exported, loaded(exported, runtime))
    assert reference.dtype == torch.float32
    # Codes of made-up scales flip where an input is rounded.
    for option, dtype, within in (("torch_dtype", torch.float16, 0.15), ("dtype", torch.bfloat16, 0.4)):
        network = loaded(exported, runtime, **{option: dtype})
        found = answer(exported, network)
        assert network.dtype == found.dtype == dtype
        assert float((found.float() - reference).norm() / reference.norm()) < within
