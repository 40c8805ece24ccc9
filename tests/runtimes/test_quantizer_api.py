"""diffusers' interface of quantizers: what it asks one before, while and after it loads a network."""

from __future__ import annotations

import inspect
from pathlib import Path

import diffusers
import torch

from dqtool.runtimes.quantizer import DqtoolConfig, DqtoolQuantizer


def test_every_question_has_an_answer(made: Path) -> None:
    network = diffusers.UNet2DModel.from_pretrained(made / "exported" / "unet")
    quantizer = network.hf_quantizer
    assert isinstance(quantizer, DqtoolQuantizer)
    assert not inspect.isabstract(DqtoolQuantizer)
    assert (quantizer.is_serializable, quantizer.is_trainable, quantizer.is_compileable) == (True, False, True)
    assert quantizer.adjust_target_dtype(torch.float16) == torch.int32  # packed words
    assert quantizer.update_torch_dtype(None) == torch.float32
    state, metadata = quantizer.get_state_dict_and_metadata({"a": torch.ones(1).half(), "b": torch.ones(1).int()})
    assert ({k: v.dtype for k, v in state.items()}, metadata) == ({"a": torch.float32, "b": torch.int32}, {})
    assert isinstance(network.config.quantization_config, DqtoolConfig | dict)


def test_both_names_of_the_dtype(made: Path) -> None:
    networks = [
        diffusers.UNet2DModel.from_pretrained(made / "exported" / "unet", **{name: torch.bfloat16})
        for name in ("dtype", "torch_dtype")
    ]
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    outputs = [network(x, 500).sample for network in networks]
    assert [network.dtype for network in networks] == [torch.bfloat16] * 2
    assert outputs[0].dtype == torch.bfloat16 and torch.equal(*outputs)
