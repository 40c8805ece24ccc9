"""LoRA on quantized networks: a float branch beside each quantized product, through diffusers' own calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from synthetic import second_step, small_networks
from torch import Tensor, nn

import dqtool  # noqa: F401  (its hook waits for peft)
from dqtool.errors import UsageError

pytest.importorskip("peft")

TARGETS = (
    "attn1.to_q",
    "attn1.to_v",
    "attn1.to_out.0",
    "attn2.to_k",
    "attn2.to_q",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "proj_in",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """See `small_networks`."""
    return small_networks(tmp_path_factory)


def weights(network: Any, seed: int = 0, rank: int = 2) -> dict[str, Tensor]:
    """A LoRA of many kinds of layers, as peft names it."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, module in network.named_modules():
        if name.endswith(TARGETS) and hasattr(module, "geometry_of_float"):
            shape = module.geometry_of_float()
            taps = tuple(shape.get("kernel_size", ()))
            inner, outer = (
                shape.get("in_features", shape.get("in_channels")),
                shape.get("out_features", shape.get("out_channels")),
            )
            state[f"{name}.lora_A.weight"] = torch.randn(rank, inner, *taps, generator=generator) * 0.2
            state[f"{name}.lora_B.weight"] = torch.randn(outer, rank, *(1,) * len(taps), generator=generator) * 0.2
    return state


def expected(network: Any, *adapters: tuple[dict[str, Tensor], float]) -> Tensor:
    """The answer with the branches computed by hooks on the simulated layers."""
    handles = []
    for state, scale in adapters:
        for key in [key for key in state if key.endswith("lora_A.weight")]:
            layer = network.get_submodule(key.removesuffix(".lora_A.weight"))
            a, b = state[key], state[key.replace("lora_A", "lora_B")]

            def add(layer: Any, args: Any, out: Tensor, a: Tensor = a, b: Tensor = b, scale: float = scale) -> Tensor:
                if layer.is_conv:
                    conv = nn.functional.conv2d
                    return out + scale * conv(conv(args[0], a, None, layer.stride, layer.padding), b)
                return out + scale * args[0] @ a.T @ b.T

            handles.append(layer.register_forward_hook(add))
    result = second_step(network)
    for handle in handles:
        handle.remove()
    return result


@pytest.mark.parametrize("form", ["hub", "integer"])
def test_branches_are_added_weighted_and_taken_off(made: Any, form: str) -> None:
    network, plain = made("unet2d_condition", form), made("unet2d_condition", "hub")
    before = second_step(network)
    one, two = weights(plain, 1), weights(plain, 2)
    network.load_lora_adapter(dict(one), prefix=None, adapter_name="one")

    def close(wanted: Tensor) -> bool:
        return float((second_step(network) - wanted).norm() / wanted.norm()) < 1e-3

    assert close(expected(plain, (one, 1.0)))
    assert not close(before)
    network.load_lora_adapter(dict(two), prefix=None, adapter_name="two")
    network.set_adapters(["one", "two"], [0.5, 0.25])
    assert close(expected(plain, (one, 0.5), (two, 0.25)))
    network.disable_lora()
    assert close(before)
    network.enable_lora()
    with pytest.raises(UsageError, match="dilate MODEL --lora"):
        network.fuse_lora()
    network.unload_lora()
    assert torch.equal(second_step(network), before)


@pytest.mark.parametrize("form", ["hub", "integer"])
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_transformers_take_branches(made: Any, name: str, form: str) -> None:
    network, plain = made(name, form), made(name, "hub")
    state = weights_of_linear(plain)
    before = second_step(network)
    network.load_lora_adapter(dict(state), prefix=None, adapter_name="one")
    wanted = expected(plain, (state, 1.0))
    assert float((second_step(network) - wanted).norm() / wanted.norm()) < 1e-3
    assert not torch.allclose(before, wanted, atol=1e-3)
    network.unload_lora()
    assert torch.equal(second_step(network), before)


def weights_of_linear(network: Any) -> dict[str, Tensor]:
    """A LoRA of a transformer's projections."""
    generator = torch.Generator().manual_seed(5)
    state = {}
    for name, module in network.named_modules():
        if name.endswith((".to_q", ".to_v", ".to_out.0")) and hasattr(module, "geometry_of_float"):
            shape = module.geometry_of_float()
            state[f"{name}.lora_A.weight"] = torch.randn(2, shape["in_features"], generator=generator) * 0.3
            state[f"{name}.lora_B.weight"] = torch.randn(shape["out_features"], 2, generator=generator) * 0.3
    return state


def test_dora_is_refused_by_name(made: Any) -> None:
    network = made("unet2d_condition", "hub")
    state = weights(network, 1)
    for key in [key for key in state if key.endswith("lora_A.weight")]:
        rows = state[key.replace("lora_A", "lora_B")].shape[0]
        state[key.replace("lora_A", "lora_magnitude_vector")] = torch.ones(rows)
    with pytest.raises(UsageError, match="DoRA"):
        network.load_lora_adapter(state, prefix=None, adapter_name="one")


@pytest.mark.parametrize("form", ["hub", "integer"])
def test_kohya_names_with_their_alpha(made: Any, form: str) -> None:
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    network, plain = made("unet2d_condition", form), made("unet2d_condition", "hub")
    state = {key: value for key, value in weights(plain, 1).items() if ".attn" in key}
    kohya = {}
    for key, value in state.items():
        name, part = key.rsplit(".lora_", 1)
        base = "lora_unet_" + name.replace(".", "_")
        kohya[f"{base}.lora_{'down' if part[0] == 'A' else 'up'}.weight"] = value
        kohya[f"{base}.alpha"] = torch.tensor(1.0)  # rank 2 gives half the strength
    found, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(kohya, unet_config=network.config)[:2]
    StableDiffusionLoraLoaderMixin.load_lora_into_unet(found, alphas, network, adapter_name="one")
    wanted = expected(plain, (state, 0.5))
    assert float((second_step(network) - wanted).norm() / wanted.norm()) < 1e-3


@pytest.mark.parametrize("form", ["hub", "integer"])
def test_lokr_is_refused_by_name(made: Any, form: str) -> None:
    network = made("unet2d_condition", form)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
    before = second_step(network)
    factors = {"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(8, 8), "alpha": torch.tensor(1.0)}
    with pytest.raises(UsageError, match="LoKr"):
        network.load_lora_adapter(
            {f"{name}.{key}": value for key, value in factors.items()}, prefix=None, adapter_name="one"
        )
    assert torch.equal(second_step(network), before)
