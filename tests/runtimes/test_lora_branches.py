"""LoRA on quantized networks: a float branch beside each quantized product, through diffusers' own calls."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import component_directory
from synthetic import synthetic_network
from torch import Tensor, nn

import dqtool  # noqa: F401  (its hook waits for peft)
from dqtool.errors import UsageError
from dqtool.models.families import family_of
from dqtool.nn.call_lock import one_call_at_a_time
from dqtool.runtimes.cpu import convert

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
    """`made(name, form)`: a fresh network of that family at 8/8, "hub" as diffusers loads it or "integer"."""
    known: dict[str, nn.Module] = {}

    def network(name: str, form: str) -> Any:
        if name not in known:
            path: Path = component_directory(name, tmp_path_factory.mktemp(name) / "model")
            known[name] = synthetic_network(str(path), "4/4", steps=3)
        fresh = copy.deepcopy(known[name])
        return convert(fresh) if form == "integer" else one_call_at_a_time(fresh)

    return network


def call(network: Any) -> Tensor:
    """The network's answer at its second step."""
    torch.manual_seed(0)
    hints = {"_context_tokens": 5, "_sample_size": 8}
    example = family_of(type(network).__name__, "test").example(hints | dict(network.config), batch=2)
    with torch.no_grad():
        result: Tensor = network(**example | {"timestep": network.timesteps[1].expand(2), "return_dict": False})[0]
    return result


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
    result = call(network)
    for handle in handles:
        handle.remove()
    return result


@pytest.mark.parametrize("form", ["hub", "integer"])
def test_branches_are_added_weighted_and_taken_off(made: Any, form: str) -> None:
    network, plain = made("unet2d_condition", form), made("unet2d_condition", "hub")
    before = call(network)
    one, two = weights(plain, 1), weights(plain, 2)
    network.load_lora_adapter(dict(one), prefix=None, adapter_name="one")

    def close(wanted: Tensor) -> bool:
        return float((call(network) - wanted).norm() / wanted.norm()) < 1e-3

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
    assert torch.equal(call(network), before)


@pytest.mark.parametrize("form", ["hub", "integer"])
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_transformers_take_branches(made: Any, name: str, form: str) -> None:
    network, plain = made(name, form), made(name, "hub")
    state = weights_of_linear(plain)
    before = call(network)
    network.load_lora_adapter(dict(state), prefix=None, adapter_name="one")
    wanted = expected(plain, (state, 1.0))
    assert float((call(network) - wanted).norm() / wanted.norm()) < 1e-3
    assert not torch.allclose(before, wanted, atol=1e-3)
    network.unload_lora()
    assert torch.equal(call(network), before)


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
    assert float((call(network) - wanted).norm() / wanted.norm()) < 1e-3


@pytest.mark.parametrize("form", ["hub", "integer"])
def test_lokr_is_refused_by_name(made: Any, form: str) -> None:
    network = made("unet2d_condition", form)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
    before = call(network)
    factors = {"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(8, 8), "alpha": torch.tensor(1.0)}
    with pytest.raises(UsageError, match="LoKr"):
        network.load_lora_adapter(
            {f"{name}.{key}": value for key, value in factors.items()}, prefix=None, adapter_name="one"
        )
    assert torch.equal(call(network), before)
