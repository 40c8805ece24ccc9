"""The cuda runtime end to end in Triton's interpreter: networks compute what the simulation does, in any mix of steps."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import component_directory
from helpers import tiny_pipeline
from synthetic import relative_error, synthetic_network
from torch import nn
from torch.utils._pytree import tree_leaves
from triton_layers import STEPS

from dqtool.core.bits import AttentionBits
from dqtool.models.families import family_of
from dqtool.nn.attention import QuantAttnProcessor
from dqtool.nn.call_lock import one_call_at_a_time
from dqtool.nn.integer import integer_attention
from dqtool.nn.steps import StepIndex
from dqtool.runtimes import cuda
from dqtool.runtimes.cuda.attention import TABLES, AttentionTables, CudaAttnProcessor
from dqtool.runtimes.cuda.planes import chunk_of, plane_bytes
from dqtool.runtimes.cuda.products import CudaProduct, Glue


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cuda.ON_CPU, "1")


@pytest.mark.parametrize(("bits", "probs"), [(4, 8), (8, 4)])
@pytest.mark.parametrize(("queries", "keys", "dim"), [(5, 40, 8)])
def test_attention_is_the_simulations(bits: int, probs: int, queries: int, keys: int, dim: int) -> None:
    torch.manual_seed(queries)
    heads = 2
    attn: Any = nn.Module()
    attn.heads, attn.scale = heads, dim**-0.5
    steps = StepIndex(torch.arange(STEPS) * 10.0)
    processor = QuantAttnProcessor(AttentionBits(bits, probs), steps)
    attn.processor = processor
    for name in ("q", "k", "v"):
        attn.register_buffer(f"{name}_scale", torch.rand(STEPS, heads) * 0.1 + 6 / 2**bits)
        if bits != 8:
            zeros = torch.randint(0, 2**bits, (STEPS, heads), dtype=torch.uint8)
            attn.register_buffer(f"{name}_zero_point", zeros)
    attn.register_buffer("probs_scale", torch.rand(STEPS, heads) / 2**probs)
    q, k, v = (torch.randn(2, s, heads, dim).transpose(1, 2) for s in (queries, keys, keys))
    glue, integer = Glue(), integer_attention(attn)
    attn.add_module(TABLES, AttentionTables(integer))
    ours = CudaAttnProcessor(processor, integer, glue)
    mask = torch.zeros(2, 1, 1, keys)
    mask[1, :, :, keys // 2 :] = -10000.0
    for m, rows in ((None, [1]), (mask, [2, 0])):
        steps.select(torch.tensor(rows))
        glue.rows = torch.tensor(rows)
        expected, got = processor.attend(attn, q, k, v, m), ours.attend(attn, q, k, v, m)
        assert got.shape == expected.shape == (2, queries, heads * dim)
        # A softmax value on a rounding tie may take the neighbouring code.
        assert (got - expected).abs().mean() < 1e-4 * expected.abs().mean()


@pytest.fixture(scope="module", params=["unet", "dit"])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """A tiny packed network, at 4/4 with `STEPS` steps: every launch takes the interpreter a twentieth of a second."""
    path = tmp_path_factory.mktemp(request.param) / "model"
    if request.param == "dit":
        model = component_directory("dit", path)
    else:
        one = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
        model = tiny_pipeline(path, **one) / "unet"
    return one_call_at_a_time(synthetic_network(str(model), "4/4", steps=STEPS))


def example(network: Any, batch: int = 2) -> dict[str, Any]:
    torch.manual_seed(0)
    hints = {"_context_tokens": 5, "_sample_size": 8}
    given = family_of(type(network).__name__, "test").example(hints | dict(network.config), batch=batch)
    return given | {"return_dict": False}


def at_one_step(network: Any) -> dict[str, Any]:
    """One sample at the second step."""
    return example(network, 1) | {"timestep": network.timesteps[torch.tensor([1])]}


def test_networks_compute_what_the_simulation_does(packed: nn.Module) -> None:
    ours = cuda.convert(copy.deepcopy(packed))
    assert set(cuda.integer_report(ours).values()) == {"int8"}
    given = example(packed)
    told = given | {"timestep": packed.timesteps[torch.tensor([2, 0])]}  # type: ignore[index]
    timestep_first = {"timestep": told["timestep"].double(), **{k: v for k, v in told.items() if k != "timestep"}}
    with torch.no_grad():
        expected, got = packed(**told)[0], ours(**timestep_first)[0]
    assert got.dtype == torch.float32
    assert got.shape == expected.shape and relative_error(got, expected) < 0.03


def test_half_precision_between_products_costs_little(packed: nn.Module) -> None:
    """One layer stays float, as `--keep` leaves it, and takes the dtype of the network."""
    ours: Any = cuda.convert(copy.deepcopy(packed))
    for module in ours.modules():
        if hasattr(module, "time_emb_proj"):
            old = module.time_emb_proj
            module.time_emb_proj = nn.Linear(old.in_features, old.out_features)
    given = example(packed) | {"timestep": packed.timesteps[torch.tensor([1, 1])]}  # type: ignore[index]
    half = {
        k: v.half() if isinstance(v, torch.Tensor) and v.is_floating_point() and k != "timestep" else v
        for k, v in given.items()
    }
    with torch.no_grad():
        wide = ours(**given)[0]
        narrow = ours.to(torch.float16)(**half)[0]
    assert narrow.dtype == torch.float16
    peak, error = wide.abs().max(), (narrow.float() - wide).square().mean()
    assert 20 * torch.log10(peak / error.sqrt()) > 12  # random weights spread the few codes beyond a rounding boundary


def test_weights_take_their_bits_and_scales_keep_their_dtype(packed: nn.Module) -> None:
    ours: Any = cuda.convert(copy.deepcopy(packed)).to(torch.float16)
    products = [module for module in ours.modules() if isinstance(module, CudaProduct)]
    for product in products:
        sizes = product.sizes
        chunk = chunk_of(sizes.channel_bytes)
        assert product.planes.numel() == plane_bytes(sizes.out_channels, sizes.k, sizes.bits, chunk)
        assert sizes.bits != 4 or product.planes.numel() == sizes.out_channels * sizes.k // 2
        assert product.steps.dtype == product.weight_scale.dtype == torch.float32
    assert ours.dtype == torch.float16
    kept = ours.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in packed.state_dict().items())  # saved as it was loaded
    floats = [p for p in ours.parameters() if p.is_floating_point()]
    assert all(p.dtype == torch.float16 for p in floats)


def test_offloading_moves_tensors_and_changes_nothing(packed: nn.Module) -> None:
    """The hooks of `enable_model_cpu_offload`, and those of `enable_sequential_cpu_offload`, with the CPU as the accelerator."""
    accelerate = pytest.importorskip("accelerate")
    ours: Any = cuda.convert(copy.deepcopy(packed))
    given = at_one_step(packed)
    with torch.no_grad():
        expected = ours(**given)[0]
        network, hook = accelerate.cpu_offload_with_hook(copy.deepcopy(ours), execution_device="cpu")
        assert torch.equal(network(**given)[0], expected)
        hook.offload()
        network = accelerate.cpu_offload(copy.deepcopy(ours), torch.device("cpu"), offload_buffers=True)
        norms = [m for m in network.modules() if isinstance(m, nn.GroupNorm | nn.LayerNorm) and m.weight is not None]
        for _ in range(2):
            assert all(norm.weight.device.type == "meta" for norm in norms)
            assert relative_error(network(**given)[0], expected) < 0.03


def test_group_offloading_calls_every_product(packed: nn.Module) -> None:
    """The hooks of `enable_group_offload` for single layers, which fetch the tensors of a layer when it is called."""
    hooks = pytest.importorskip("diffusers.hooks")
    ours: Any = cuda.convert(copy.deepcopy(packed))
    given = at_one_step(packed)
    with torch.no_grad():
        expected = ours(**given)[0]
        hooks.apply_group_offloading(ours, torch.device("cpu"), offload_type="leaf_level")
        products = [m for m in ours.modules() if isinstance(m, CudaProduct)]
        hooked = [m for m in products if hasattr(m, "_diffusers_hook")]
        called: set[int] = set()
        for each in hooked:
            forward = each.forward
            each.forward = lambda *a, _f=forward, _m=each, **k: (called.add(id(_m)), _f(*a, **k))[1]
        assert relative_error(ours(**given)[0], expected) < 0.03
    assert hooked
    assert called == {id(each) for each in hooked}


@pytest.mark.parametrize("offload", ["whole", "one by one"])
def test_a_cpu_network_changes_under_the_hooks_of_offloading(
    packed: nn.Module, monkeypatch: pytest.MonkeyPatch, offload: str
) -> None:
    """A pipeline is loaded on the CPU and then offloaded from a GPU: the network changes in the middle of its first call."""
    accelerate = pytest.importorskip("accelerate")
    from dqtool.runtimes import cpu

    if cpu.available() is not None:
        pytest.skip("the cpu runtime can't run here")
    given = example(packed, 1) | {"timestep": packed.timesteps[torch.tensor([2])]}  # type: ignore[index]
    ours: Any = cpu.convert(copy.deepcopy(packed))
    monkeypatch.setattr(cpu, "SERVED", ("meta",))  # the CPU plays the GPU
    monkeypatch.setattr(cpu, "ENGINES", {"cpu": "dqtool.runtimes.cuda"})
    if offload == "whole":
        network, _ = accelerate.cpu_offload_with_hook(ours, execution_device="cpu")
    else:
        network = accelerate.cpu_offload(ours, torch.device("cpu"), offload_buffers=True)
    with torch.no_grad():
        expected = cuda.convert(copy.deepcopy(packed))(**given)[0]
        assert torch.equal(network(**given)[0], expected)
        assert network.runtime == "cpu"  # the name of the device, which is the CPU here
        assert any(isinstance(module, CudaProduct) for module in network.modules())
        accelerate.hooks.remove_hook_from_module(network, recurse=True)
        assert torch.equal(network(**given)[0], expected)


def test_layers_on_another_device_find_the_rows_there() -> None:
    glue = Glue()
    glue.rows = torch.tensor([2])
    assert glue.rows_on(torch.device("cpu")) is glue.rows
    moved = glue.rows_on(torch.device("meta"))
    assert moved.device.type == "meta" and glue.rows_on(torch.device("meta")) is moved
    glue.rows = torch.tensor([1, 0])
    assert glue.rows_on(torch.device("meta")).shape == (2,)


def test_a_network_is_converted_on_its_device() -> None:
    command = [sys.executable, str(Path(__file__).with_name("fenced_conversion.py"))]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


def test_a_network_spread_over_two_devices(packed: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hooks of a device map: what comes last is elsewhere, with its tables, and gets its rows there."""
    hooks = pytest.importorskip("accelerate.hooks")
    from dqtool.runtimes.cuda import launch

    for name in ("quantize_image", "layer_norm_codes", "multiply_codes", "attend"):
        monkeypatch.setattr(launch, name, _on_one_device(getattr(launch, name)))
    ours: Any = cuda.convert(copy.deepcopy(packed))
    first = ("conv_in", "time_proj", "time_embedding", "down_blocks", "pos_embed")
    devices = {name: "cpu" if name in first else "meta" for name, _ in ours.named_children()}
    hooks.attach_align_device_hook_on_blocks(ours, execution_device=devices, offload=dict.fromkeys(devices, False))
    hooks.remove_hook_from_module(ours)  # the root's, which brings the result back: there is no way from meta
    told = example(packed, 1) | {"timestep": packed.timesteps[torch.tensor([1])]}  # type: ignore[index]
    with torch.no_grad():
        assert ours(**told)[0].device.type == "meta"


def test_step_tables_are_read_on_the_device_alone(packed: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """No forward reads a number of a tensor: it would wait for a GPU."""
    ours = cuda.convert(copy.deepcopy(packed))
    told = example(packed) | {"timestep": packed.timesteps[torch.tensor([1, 1])]}  # type: ignore[index]
    from dqtool.nn.steps import StepIndex as Index

    monkeypatch.setattr(Index, "set", lambda self, *_: self.select(torch.ones(1, dtype=torch.long)))
    from dqtool.runtimes.cuda import launch

    for name in ("quantize_image", "layer_norm_codes", "multiply_codes", "attend"):
        monkeypatch.setattr(launch, name, _filled(getattr(launch, name)))
    ours = ours.to("meta")
    meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in told.items()}
    with torch.no_grad():
        assert ours(**meta)[0].device.type == "meta"  # a read of a meta tensor raises


def test_a_network_is_one_graph(packed: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    from dqtool.runtimes.cuda import launch

    for name in ("quantize_image", "layer_norm_codes", "multiply_codes", "attend"):
        monkeypatch.setattr(launch, name, _filled(getattr(launch, name)))
    ours = cuda.convert(copy.deepcopy(packed))
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    told = example(packed) | {"timestep": packed.timesteps[torch.tensor([1, 1])]}  # type: ignore[index]
    with torch.no_grad():
        assert compiled(**told)[0].shape[0] == 2


def _on_one_device(function: Any) -> Any:
    """Return the fake result of a launch, which refuses tensors of several devices."""
    fake = _filled(function)

    def result(*args: Any, **kwargs: Any) -> torch.Tensor:
        devices = {t.device for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        assert len(devices) == 1, f"{function.__name__} got tensors on {devices}"
        return fake(*args, **kwargs)

    return result


def _filled(function: Any) -> Any:
    """Return the fake result of a launch."""

    def result(*args: Any, **_: Any) -> torch.Tensor:
        if function.__name__ == "multiply_codes":
            return args[9]
        if function.__name__ == "quantize_image":
            from dqtool.runtimes.cuda.ops import image_codes

            return image_codes(args[0], list(args[4]))
        if function.__name__ == "layer_norm_codes":
            return args[0].new_empty((args[0].shape[0] * args[0].shape[1], args[9]), dtype=torch.int8)
        q = args[0][0]
        return q.new_empty((q.shape[0], q.shape[2], q.shape[1] * q.shape[3]))

    return result
