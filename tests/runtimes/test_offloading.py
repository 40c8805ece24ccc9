"""Exported networks under accelerate's offloading, device maps, threads and processes."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dqtool
from dqtool.runtimes.cpu.build import find_compiler

pytest.importorskip("accelerate")

RUNTIMES = ("cpu", "simulate")


def network_of(made: Path, runtime: str, **options: Any) -> Any:
    from diffusers import UNet2DModel

    config = dqtool.DqtoolConfig(runtime=runtime)
    return UNet2DModel.from_pretrained(str(made / "exported" / "unet"), quantization_config=config, **options)


def answer(network: Any, seed: int = 3) -> Tensor:
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        found: Tensor = network(x, 999).sample
    return found


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_hooks_that_offload_the_whole_network(made: Path, runtime: str) -> None:
    """The hooks of `enable_model_cpu_offload`, with the CPU as the accelerator."""
    from accelerate import cpu_offload_with_hook
    from accelerate.hooks import remove_hook_from_module

    expected = answer(network_of(made, runtime))
    network, hook = cpu_offload_with_hook(network_of(made, runtime), execution_device="cpu")
    assert torch.equal(answer(network), expected)
    hook.offload()
    assert torch.equal(answer(network), expected)
    remove_hook_from_module(network, recurse=True)
    assert torch.equal(answer(network), expected)


def test_layers_that_are_offloaded_one_by_one(made: Path) -> None:
    """The hooks of `enable_sequential_cpu_offload`: buffers leave as well, and come back for each call."""
    from accelerate import cpu_offload

    expected = answer(network_of(made, "simulate"))
    network = cpu_offload(network_of(made, "simulate"), execution_device=torch.device("cpu"), offload_buffers=True)
    assert all(buffer.device.type == "meta" for buffer in network.conv_in.buffers())
    for _ in range(2):
        assert torch.equal(answer(network), expected)


def test_integer_layers_keep_their_tensors_where_buffers_leave(made: Path) -> None:
    """diffusers lets buffers leave where a network has parameters of its own, as PixArt has: accelerate then reads a state dict."""
    from accelerate import cpu_offload

    expected = answer(network_of(made, "cpu"))
    network = cpu_offload(network_of(made, "cpu"), execution_device=torch.device("cpu"), offload_buffers=True)
    assert network.conv_norm_out.weight.device.type == "meta"
    for _ in range(2):
        assert torch.equal(answer(network), expected)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_group_offloading(made: Path, runtime: str) -> None:
    expected = answer(network_of(made, runtime))
    network = network_of(made, runtime)
    network.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    for _ in range(2):
        assert torch.equal(answer(network), expected)


def test_a_pipeline_offloads_its_parts(stable_diffusion: Path) -> None:
    from diffusers import DiffusionPipeline

    def picture(pipe: Any) -> Any:
        pipe.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": 4, "generator": torch.Generator().manual_seed(0), "output_type": "np"}
        return pipe("a b", **options).images

    pipe: Any = DiffusionPipeline.from_pretrained(str(stable_diffusion / "exported"))
    expected = picture(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    assert (picture(pipe) == expected).all()
    pipe.remove_all_hooks()
    assert (picture(pipe) == expected).all()


@pytest.mark.parametrize("device_map", [{"": "cpu"}, {"": torch.device("cpu")}])
def test_device_maps(made: Path, device_map: Any) -> None:
    network = network_of(made, "auto", device_map=device_map)
    assert network.runtime == "cpu"
    assert torch.equal(answer(network), answer(network_of(made, "cpu")))


def test_a_device_map_that_accelerate_chooses(stable_diffusion: Path) -> None:
    from diffusers import UNet2DConditionModel

    networks = [
        UNet2DConditionModel.from_pretrained(str(stable_diffusion / "exported" / "unet"), device_map=device_map)
        for device_map in (None, "auto")
    ]
    x, context = torch.randn(1, 4, 4, 4), torch.randn(1, 16, 16)
    with torch.no_grad():
        plain, mapped = (network(x, 1, context).sample for network in networks)
    assert torch.equal(plain, mapped)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_many_threads_call_one_network(made: Path, runtime: str) -> None:
    network = network_of(made, runtime)
    alone = [answer(network, seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: answer(network, seed), range(8)))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_many_processes_load_one_export(made: Path, tmp_path: Path) -> None:
    """The cache is empty: each finds the kernels missing, and compiles or waits for them.

    They do so without optimization, which takes a third of the time.
    """
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    quick = tmp_path / "quick-compiler"
    quick.write_text(f'#!/bin/sh\nexec {compiler} "$@" -O0\n')
    quick.chmod(0o755)
    code = (
        "import sys, torch, dqtool; n = dqtool.load(sys.argv[1], 'cpu');"
        "x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3));"
        "print(float(n(x, 999).sample.double().sum()))"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "DQTOOL_CACHE": str(tmp_path),
        "CXX": str(quick),
    }
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(made / "exported")], stdout=subprocess.PIPE, text=True, env=environment
        )
        for _ in range(2)
    ]
    totals = {float(process.communicate(timeout=300)[0]) for process in running}
    assert all(process.returncode == 0 for process in running)
    assert totals == {float(answer(dqtool.load(str(made / "exported"), "cpu")).double().sum())}
