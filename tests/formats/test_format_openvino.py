"""OpenVINO graphs of every family follow the simulation at another batch than traced, with all products in integers."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from families import component_directory
from synthetic import synthetic_network

from dqtool.models.families import FAMILIES
from dqtool.models.sources.resolve import resolve_model
from dqtool.nn.packed_layer import PackedLayer
from dqtool.nn.traceable import flat_arguments

openvino = pytest.importorskip("openvino")

from dqtool.errors import UsageError  # noqa: E402
from dqtool.formats.openvino import (  # noqa: E402
    TIMESTEPS,
    build_ir,
    compile_settings,
    integer_layers,
    shrink_weights,
    to_openvino,
)


@pytest.mark.parametrize("name", ["sdxl", "dit", "pixart", "sd3", "flux"])
def test_graph_computes_what_the_packed_network_does(name: str, tmp_path: Path) -> None:
    path = component_directory(name, tmp_path / name)
    packed = synthetic_network(str(path), "4/6" if name == "dit" else "6/6")
    source = resolve_model(str(path))
    family, config = FAMILIES[source.class_name], source.config
    layers = [n for n, m in packed.named_modules() if isinstance(m, PackedLayer)]
    model = build_ir(copy.deepcopy(packed), family, family.example(config), saturating=True)
    shrink_weights(model)
    assert [float(t) for t in model.get_rt_info(TIMESTEPS).astype(str).split()] == packed.timesteps.tolist()
    example = family.example(config, batch=2, seed=1)
    timestep = torch.tensor([50.0, 200.0])
    arguments = {**example, "timestep": timestep}
    expected = packed(**arguments, return_dict=False)[0]
    tensors = flat_arguments(arguments)
    names = {port: next(n for n in port.names if n in tensors) for port in model.inputs}
    model.reshape({port: list(tensors[n].shape) for port, n in names.items()})
    compiled = openvino.Core().compile_model(model, "CPU", compile_settings())
    feed = {port: tensors[next(n for n in port.names if n in tensors)].numpy() for port in compiled.inputs}
    got = torch.from_numpy(compiled(feed)[0])
    assert (got - expected).norm() < 0.1 * expected.norm()
    assert set(layers) <= integer_layers(compiled)


def test_operations_that_openvino_lacks_are_named() -> None:
    class Padded(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.utils.rnn.pad_sequence([x, x[:1]], batch_first=True)

    with pytest.raises(UsageError, match="aten::pad_sequence"):
        to_openvino(Padded(), (torch.ones(3, 2),))
