"""Other attention processors than the quantizing ones, set by pipelines and users on quantized networks."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    JointAttnProcessor2_0,
    PAGIdentitySelfAttnProcessor2_0,
)
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from families import component_directory
from synthetic import synthetic_network
from torch import Tensor, nn

from dqtool.errors import DqtoolWarning
from dqtool.graph.attention import is_attention
from dqtool.models.families import family_of
from dqtool.nn.call_lock import one_call_at_a_time
from dqtool.runtimes.cpu import convert


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`made(name, form)`: a fresh network of that family at 4/4, "hub" as diffusers loads it or "integer"."""
    known: dict[str, nn.Module] = {}

    def network(name: str, form: str) -> Any:
        if name not in known:
            path: Path = component_directory(name, tmp_path_factory.mktemp(name) / "model")
            known[name] = synthetic_network(str(path), "4/4", steps=3)
        fresh = copy.deepcopy(known[name])
        return convert(fresh) if form == "integer" else one_call_at_a_time(fresh)

    return network


def call(network: Any, **extra: Any) -> Tensor:
    """The network's answer at its second step."""
    torch.manual_seed(0)
    hints = {"_context_tokens": 5, "_sample_size": 8}
    example = family_of(type(network).__name__, "test").example(hints | dict(network.config), batch=2)
    with torch.no_grad():
        result: Tensor = network(
            **example | {"timestep": network.timesteps[1].expand(2), "return_dict": False} | extra
        )[0]
    return result


class Doubled(AttnProcessor2_0):
    """A user's own processor: twice the default attention."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return twice the default's output."""
        return 2 * super().__call__(*args, **kwargs)


def float_attention(network: nn.Module) -> nn.Module:
    """The network without the step tables of its attention products."""
    for module in network.modules():
        if is_attention(module):
            for key in [key for key in module._buffers if key.endswith(("_scale", "_zero_point"))]:
                del module._buffers[key]
    return network


@pytest.mark.parametrize("form", ["hub", "integer"])
@pytest.mark.parametrize(
    ("name", "processor"),
    [
        ("unet2d_condition", AttnProcessor),
        ("unet2d_condition", AttnProcessor2_0),
        ("sd3", JointAttnProcessor2_0),
        ("flux", FluxAttnProcessor),
        ("unet2d", AttnProcessor),
    ],
)
def test_a_processor_that_repeats_the_default_changes_nothing(made: Any, name: str, processor: Any, form: str) -> None:
    network = made(name, form)
    expected = call(network)
    for module in network.modules():
        if is_attention(module):
            module.set_processor(processor())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(call(network), expected)


@pytest.mark.parametrize("form", ["hub", "integer"])
def test_a_processor_that_does_more_runs_in_float_with_one_warning(made: Any, form: str) -> None:
    network, reference = made("unet2d_condition", form), float_attention(made("unet2d_condition", "hub"))
    quantized = call(network)
    network.set_attn_processor(Doubled())
    with pytest.warns(DqtoolWarning, match="Doubled computes another attention"):
        found = call(network)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(network)
    for module in reference.modules():
        if is_attention(module):
            module.to_out[1] = Twice()
    assert float((found - call(reference)).norm() / found.norm()) < 1e-4
    network.set_attn_processor(AttnProcessor())
    assert torch.equal(call(network), quantized)


class Twice(nn.Module):
    """Doubles its input."""

    def forward(self, x: Tensor) -> Tensor:
        """`2 x`."""
        return 2 * x


def image_prompt_weights(network: Any) -> dict[str, Any]:
    """Random weights of an IP adapter for a small UNet, as its file names them."""
    torch.manual_seed(1)
    width = network.config.cross_attention_dim
    processors = {}
    cross = [name for name in network.attn_processors if "attn2" in name]
    for place, name in enumerate(cross):
        module = network.get_submodule(name.removesuffix(".processor"))
        inner = module.to_v.out_features
        for key in ("to_k_ip", "to_v_ip"):
            processors[f"{2 * place + 1}.{key}.weight"] = torch.randn(inner, width) * 0.1
    projection = {
        "proj.weight": torch.randn(4 * width, 6) * 0.1,
        "proj.bias": torch.zeros(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    return {"image_proj": projection, "ip_adapter": processors}


@pytest.mark.filterwarnings("ignore::dqtool.errors.DqtoolWarning")
def test_image_prompts_are_the_same_on_integers(made: Any) -> None:
    results = []
    for form in ("hub", "integer"):
        network = made("unet2d_condition", form)
        without = call(network)
        network._load_ip_adapter_weights([image_prompt_weights(network)])
        torch.manual_seed(2)
        results.append(call(network, added_cond_kwargs={"image_embeds": [torch.randn(2, 1, 6)]}))
        assert not torch.allclose(results[-1], without, atol=1e-3)
    assert float((results[0] - results[1]).norm() / results[0].norm()) < 1e-4


@pytest.mark.filterwarnings("ignore::dqtool.errors.DqtoolWarning")
def test_perturbed_attention_is_the_same_on_integers(made: Any) -> None:
    results = []
    for form in ("hub", "integer"):
        network = made("unet2d_condition", form)
        without = call(network)
        for name, module in network.named_modules():
            if name.endswith("mid_block.attentions.0.transformer_blocks.0.attn1"):
                module.processor = PAGIdentitySelfAttnProcessor2_0()  # pipelines set it this way
        results.append(call(network))
        assert not torch.allclose(results[-1][1], without[1], atol=1e-4)
    assert float((results[0] - results[1]).norm() / results[0].norm()) < 1e-4
