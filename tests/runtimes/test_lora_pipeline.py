"""LoRA files on an exported pipeline, with the calls that diffusers' users make."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import dqtool
from dqtool.errors import UsageError
from dqtool.runtimes.cpu import simulated_again

pytest.importorskip("peft")

SIZE = 0.1
LAYERS = ("to_q", "to_v", "to_out.0", "proj_in", "conv1", "conv_out", "net.0.proj")
"""Endings of the names of the network's layers that the LoRA files here change."""


@pytest.fixture(params=["cpu", "simulate"])
def pipe(request: pytest.FixtureRequest, stable_diffusion: Path) -> Any:
    """The exported pipeline in both runtimes."""
    from diffusers import DiffusionPipeline, PipelineQuantizationConfig

    asked = PipelineQuantizationConfig(quant_mapping={"unet": dqtool.DqtoolConfig(runtime=request.param)})
    found: Any = DiffusionPipeline.from_pretrained(str(stable_diffusion / "exported"), quantization_config=asked)
    found.set_progress_bar_config(disable=True)
    assert found.unet.runtime == request.param
    return found


@pytest.fixture
def whole(stable_diffusion: Path) -> Any:
    """The float pipeline."""
    from diffusers import DiffusionPipeline

    found: Any = DiffusionPipeline.from_pretrained(str(stable_diffusion / "tiny-sd"))
    found.set_progress_bar_config(disable=True)
    return found


def picture(pipe: Any, **options: Any) -> np.ndarray:
    """Latents of one call, at the calibrated steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", dqtool.errors.DqtoolWarning)
        found = pipe(
            "a b c",
            num_inference_steps=4,
            guidance_scale=2.0,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            **options,
        )
    return found.images.numpy()


def layers(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The float network's layers with these endings."""
    for name, layer in network.named_modules():
        if name.endswith(LAYERS) and isinstance(layer, nn.Linear | nn.Conv2d):
            yield name, layer


def factors(network: nn.Module, seed: int, rank: int = 2, size: float = SIZE) -> dict[str, tuple[Tensor, Tensor]]:
    """Two factors by the name of each layer."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, layer in layers(network):
        outer, inner, *taps = layer.weight.shape
        found[name] = (
            torch.randn(rank, inner, *taps, generator=generator) * size,
            torch.randn(outer, rank, *[1] * len(taps), generator=generator) * size,
        )
    return found


def diffusers_file(path: Path, of: dict[str, tuple[Tensor, Tensor]]) -> Path:
    """A file with diffusers' names."""
    tensors = {}
    for name, (down, up) in of.items():
        tensors |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
    save_file(tensors, path)
    return path


def kohya_file(path: Path, of: dict[str, tuple[Tensor, Tensor]], alpha: float) -> Path:
    """A file with kohya's names."""
    tensors = {}
    for name, (down, up) in of.items():
        base = "lora_unet_" + name.replace(".", "_")
        tensors |= {f"{base}.lora_down.weight": down, f"{base}.lora_up.weight": up}
        tensors[f"{base}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)
    return path


def close(found: np.ndarray, wanted: np.ndarray, within: float = 0.05) -> bool:
    return bool(np.linalg.norm(found - wanted) < within * np.linalg.norm(wanted))


def change(before: np.ndarray, after: np.ndarray, plain: np.ndarray, wanted: np.ndarray) -> float:
    """Relative error of the change that a LoRA makes on the quantized pipeline, to that on the float one."""
    return float(np.linalg.norm((after - before) - (wanted - plain)) / np.linalg.norm(wanted - plain))


def test_files_of_both_kinds_change_the_image_as_on_the_float_pipeline(pipe: Any, whole: Any, tmp_path: Path) -> None:
    one, two = factors(whole.unet, 1), factors(whole.unet, 2)
    before, plain = picture(pipe), picture(whole)
    assert close(before, plain)
    for each in (pipe, whole):
        each.load_lora_weights(str(diffusers_file(tmp_path / "one.safetensors", one)), adapter_name="one")
    changed = picture(pipe)
    assert change(before, changed, plain, picture(whole)) < 0.3
    for each in (pipe, whole):
        each.load_lora_weights(str(kohya_file(tmp_path / "two.safetensors", two, 2.0)), adapter_name="two")
        each.set_adapters(["one", "two"], adapter_weights=[0.6, 0.9])
    both = picture(pipe)
    assert change(before, both, plain, picture(whole)) < 0.3 and not close(both, changed)
    assert pipe.get_active_adapters() == ["one", "two"]
    pipe.delete_adapters("two")
    pipe.set_adapters("one")
    assert np.array_equal(picture(pipe), changed)
    pipe.disable_lora()
    assert close(picture(pipe), before, 1e-5)
    pipe.enable_lora()
    assert close(picture(pipe, cross_attention_kwargs={"scale": 0.0}), before, 1e-5)
    pipe.unload_lora_weights()
    assert np.array_equal(picture(pipe), before)


def test_a_hot_swap_equals_a_fresh_load(pipe: Any, whole: Any, tmp_path: Path) -> None:
    one = diffusers_file(tmp_path / "one.safetensors", factors(whole.unet, 1))
    two = diffusers_file(tmp_path / "two.safetensors", factors(whole.unet, 2))
    pipe.load_lora_weights(str(two), adapter_name="it")
    wanted = picture(pipe)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(str(one), adapter_name="it")
    assert not close(picture(pipe), wanted)
    pipe.load_lora_weights(str(two), adapter_name="it", hotswap=True)
    assert close(picture(pipe), wanted, 1e-5)


def test_a_hot_swap_of_another_rank(pipe: Any, whole: Any, tmp_path: Path) -> None:
    two = diffusers_file(tmp_path / "two.safetensors", factors(whole.unet, 2, rank=4))
    pipe.load_lora_weights(str(two), adapter_name="it")
    wanted = picture(pipe)
    pipe.unload_lora_weights()
    pipe.enable_lora_hotswap(target_rank=4)
    pipe.load_lora_weights(str(diffusers_file(tmp_path / "one.safetensors", factors(whole.unet, 1))), adapter_name="it")
    pipe.load_lora_weights(str(two), adapter_name="it", hotswap=True)
    assert close(picture(pipe), wanted, 1e-5)


def test_fusing_is_refused_and_changes_nothing(pipe: Any, whole: Any, tmp_path: Path) -> None:
    pipe.load_lora_weights(str(diffusers_file(tmp_path / "one.safetensors", factors(whole.unet, 1))))
    before = picture(pipe)
    with pytest.raises(UsageError, match="dilate MODEL --lora"):
        pipe.fuse_lora()
    assert np.array_equal(picture(pipe), before)
    pipe.unfuse_lora()
    assert np.array_equal(picture(pipe), before)


def test_a_change_of_engine_does_not_lose_a_lora(pipe: Any, whole: Any, tmp_path: Path) -> None:
    if pipe.unet.runtime != "cpu":
        pytest.skip("only integer networks change")
    pipe.load_lora_weights(str(diffusers_file(tmp_path / "one.safetensors", factors(whole.unet, 1))))
    before = picture(pipe)
    with pytest.raises(UsageError, match="Move the pipeline first"):
        simulated_again(pipe.unet)
    assert np.array_equal(picture(pipe), before)


KINDS = {
    "DoRA": {"lora_A.weight": (2, 16), "lora_B.weight": (16, 2), "lora_magnitude_vector": (16,)},
    "DoRA of kohya": {"lora_down.weight": (2, 16), "lora_up.weight": (16, 2), "alpha": (), "dora_scale": (16, 1)},
    "LoHa": {"hada_w1_a": (16, 2), "hada_w1_b": (2, 16), "hada_w2_a": (16, 2), "hada_w2_b": (2, 16), "alpha": ()},
    "LoKr": {"lokr_w1": (4, 4), "lokr_w2": (4, 4), "alpha": ()},
    "IA3": {"on_input": (1,), "weight": (16,)},
    "full difference": {"diff": (16, 16)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_adapters_are_refused_by_name(pipe: Any, tmp_path: Path, kind: str) -> None:
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    base = f"unet.{name}" if kind == "DoRA" else "lora_unet_" + name.replace(".", "_")
    save_file({f"{base}.{part}": torch.ones(shape) for part, shape in KINDS[kind].items()}, tmp_path / "f.safetensors")
    before = picture(pipe)
    with pytest.raises(UsageError, match=kind.split()[0]):
        pipe.load_lora_weights(str(tmp_path / "f.safetensors"), adapter_name="it")
    assert np.array_equal(picture(pipe), before)
    assert not pipe.get_list_adapters()


def test_a_lora_of_the_text_encoder_comes_along(pipe: Any, whole: Any, tmp_path: Path) -> None:
    name, generator = "text_model.encoder.layers.0.self_attn.q_proj", torch.Generator().manual_seed(3)
    one = diffusers_file(tmp_path / "one.safetensors", factors(whole.unet, 1))
    text = {
        f"text_encoder.{name}.lora_A.weight": torch.randn(2, 16, generator=generator),
        f"text_encoder.{name}.lora_B.weight": torch.randn(16, 2, generator=generator),
    }
    from safetensors.torch import load_file

    save_file(load_file(one) | text, tmp_path / "both.safetensors")
    before, plain = picture(pipe), picture(whole)
    for each in (pipe, whole):
        each.load_lora_weights(str(tmp_path / "both.safetensors"))
    assert change(before, picture(pipe), plain, picture(whole)) < 0.3
    pipe.unload_lora_weights()
    assert np.array_equal(picture(pipe), before)
