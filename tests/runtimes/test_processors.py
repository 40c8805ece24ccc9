"""Other attention processors than the quantizing ones, set by pipelines and users on quantized networks."""

from __future__ import annotations

import warnings
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
from synthetic import second_step, small_networks
from torch import Tensor, nn

from dqtool.errors import DqtoolWarning
from dqtool.graph.attention import is_attention


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """See `small_networks`."""
    return small_networks(tmp_path_factory)


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
    expected = second_step(network)
    for module in network.modules():
        if is_attention(module):
            module.set_processor(processor())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(second_step(network), expected)


@pytest.mark.parametrize("form", ["hub", "integer"])
def test_a_processor_that_does_more_runs_in_float_with_one_warning(made: Any, form: str) -> None:
    network, reference = made("unet2d_condition", form), float_attention(made("unet2d_condition", "hub"))
    quantized = second_step(network)
    network.set_attn_processor(Doubled())
    with pytest.warns(DqtoolWarning, match="Doubled computes another attention"):
        found = second_step(network)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second_step(network)
    for module in reference.modules():
        if is_attention(module):
            module.to_out[1] = Twice()
    assert float((found - second_step(reference)).norm() / found.norm()) < 1e-4
    network.set_attn_processor(AttnProcessor())
    assert torch.equal(second_step(network), quantized)


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
        without = second_step(network)
        network._load_ip_adapter_weights([image_prompt_weights(network)])
        torch.manual_seed(2)
        results.append(second_step(network, added_cond_kwargs={"image_embeds": [torch.randn(2, 1, 6)]}))
        assert not torch.allclose(results[-1], without, atol=1e-3)
    assert float((results[0] - results[1]).norm() / results[0].norm()) < 1e-4


@pytest.mark.filterwarnings("ignore::dqtool.errors.DqtoolWarning")
def test_perturbed_attention_is_the_same_on_integers(made: Any) -> None:
    results = []
    for form in ("hub", "integer"):
        network = made("unet2d_condition", form)
        without = second_step(network)
        for name, module in network.named_modules():
            if name.endswith("mid_block.attentions.0.transformer_blocks.0.attn1"):
                module.processor = PAGIdentitySelfAttnProcessor2_0()  # pipelines set it this way
        results.append(second_step(network))
        assert not torch.allclose(results[-1][1], without[1], atol=1e-4)
    assert float((results[0] - results[1]).norm() / results[0].norm()) < 1e-4
