"""The cpu engine: the integers of the int64 reference, layer by layer, and the simulation's network end to end."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Run
from helpers import tiny_pipeline
from torch import Tensor, nn

from dqtool import load
from dqtool.core.bits import AttentionBits, LayerBits
from dqtool.nn.attention import QuantAttnProcessor
from dqtool.nn.integer import IntegerLayer, Operand, accumulate, integer_attention, integer_layer
from dqtool.nn.packed_layer import PackedLayer
from dqtool.nn.steps import StepIndex
from dqtool.runtimes.cpu import codes, integer_report, library
from dqtool.runtimes.cpu.attention import IntegerAttnProcessor
from dqtool.runtimes.cpu.blocks import NormActProduct
from dqtool.runtimes.cpu.codes import GEGLU, GELU, GELU_TANH, NONE, SILU, CurrentStep
from dqtool.runtimes.cpu.merging import merge
from dqtool.runtimes.cpu.native_product import NativeProduct
from dqtool.runtimes.cpu.onednn_product import OnednnProduct
from dqtool.runtimes.cpu.product import Product

BITS = ("4/4", "6/6", "8/8")

needs_kernels = pytest.mark.usefixtures("kernels")


@pytest.fixture
def kernels() -> None:
    """Skip where there is no compiler or no AVX2. A fixture, because asking compiles."""
    if not library.has_products():
        pytest.skip(library.problem() or "the processor lacks AVX2")


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, run: Run) -> dict[str, Path]:
    """Directories of the tiny model at each of `BITS`, quantizers initialised and not trained."""
    work = tmp_path_factory.mktemp("cpu")
    tiny_pipeline(work / "tiny", downsample_padding=0)
    commands = [("dilate", "tiny"), ("calibrate", "--steps", "4", "--samples", "16")]
    for bits in BITS:
        name = "b" + bits[0]
        commands += [
            ("distill", "--bits", bits, "--iters", "0", "--refine-iters", "0", "-o", f"{name}.safetensors"),
            ("export", f"{name}.safetensors", "-o", name),
        ]
    for arguments in commands:
        result = run(*arguments, cwd=work)
        assert result.returncode == 0, result.stderr
    return {bits: work / ("b" + bits[0]) for bits in BITS}


def packed_layers(network: nn.Module) -> dict[str, PackedLayer]:
    """The layers of a simulated network."""
    return {name: m for name, m in network.named_modules() if isinstance(m, PackedLayer)}


def engines(layer: IntegerLayer) -> list[type[Product]]:
    """The product classes that promise this layer on this machine."""
    return [
        *([OnednnProduct] if OnednnProduct.exact(layer) else []),
        *([NativeProduct] if library.has_products() else []),
    ]


@pytest.mark.parametrize("bits", BITS)
def test_accumulators_equal_the_reference_in_every_layer_and_step(exported: dict[str, Path], bits: str) -> None:
    network = load(str(exported[bits]), "simulate")
    torch.manual_seed(0)
    for name, layer in packed_layers(network).items():
        integer = integer_layer(layer)
        assert integer.input is not None and integer.is_integer, name
        channels = integer.weight.shape[1]
        shape = (2, channels, 7, 6) if integer.is_conv else (2, 5, channels)
        for engine in engines(integer):
            current_step = CurrentStep()
            product = engine(integer, current_step)
            for step in range(integer.input.steps):
                current_step.row = step
                x = torch.randn(shape) * integer.input.scale[step] * 2 ** (integer.input.bits - 1)
                x = (
                    x
                    if integer.divisor is None
                    else x * integer.divisor.view(-1, *(1,) * (2 if integer.is_conv else 0))
                )
                codes = integer.input.codes(x, step, channel_dim=1 if integer.is_conv else -1)
                expected = accumulate(codes, integer)
                assert torch.equal(product.accumulators(product.quantize(x)).to(torch.int64), expected), (name, engine)


@pytest.mark.parametrize("bits", BITS)
def test_layers_and_blocks_compute_what_the_simulation_does(exported: dict[str, Path], bits: str) -> None:
    simulated, engine = load(str(exported[bits]), "simulate"), load(str(exported[bits]), "cpu")
    seen: dict[str, tuple] = {}
    for name, module in simulated.named_modules():
        module.register_forward_hook(
            lambda _m, args, kwargs, out, n=name: seen.__setitem__(n, (args, kwargs, out)), with_kwargs=True
        )
    fused = ("FusedResnetBlock2D", "FusedDownsample2D", "FusedUpsample2D", "FusedAttention", "NormActProduct")
    generator = torch.Generator().manual_seed(0)
    differences: dict[tuple[str, float], float] = {}
    for step in simulated.timesteps.tolist():
        x = torch.randn(2, 1, 8, 8, generator=generator)
        simulated(x, step)
        engine(x, step)  # sets the step
        for name, module in engine.named_modules():
            if type(module).__name__ in fused and name in seen:
                args, kwargs, expected = seen[name]
                if isinstance(module, NormActProduct):  # the norm before it left the input as it was
                    args = seen["conv_norm_out"][0]
                differences[name, step] = float((module(*args, **kwargs) - expected).norm() / expected.norm())
    assert len(differences) >= 8 * len(simulated.timesteps)
    # Where a value falls on a rounding tie, the last bit of the norm before it decides, and another processor may take the
    # other code. Rare, but the norm after it spreads such a code over all pixels.
    apart = {key: value for key, value in differences.items() if value > 1e-5}
    assert len(apart) <= 3, apart
    assert all(value < 0.03 for value in apart.values()), apart


def test_steps_without_a_table_take_the_same_codes(exported: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of all steps' multipliers is kept for small layers only."""

    engine = load(str(exported["4/4"]), "cpu")
    monkeypatch.setattr(codes, "TABLE", 0)
    other = load(str(exported["4/4"]), "cpu")
    layers = [m for m in other.modules() if isinstance(m, Product)]
    assert layers and all(layer._multipliers is None for layer in layers)
    for step in engine.timesteps.tolist():
        x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
        assert torch.equal(engine(x, step).sample, other(x, step).sample)


@pytest.mark.parametrize("bits", BITS)
def test_network_follows_the_simulation_at_any_batch_resolution_and_step(exported: dict[str, Path], bits: str) -> None:
    simulated, engine = load(str(exported[bits]), "simulate"), load(str(exported[bits]), "cpu")
    assert set(integer_report(engine).values()) == {"int8"} or not library.has_products()
    first = None
    for shape, step in (((1, 1, 8, 8), 0), ((3, 1, 8, 8), 1), ((2, 1, 12, 16), 2), ((1, 1, 8, 8), 0)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        timestep = simulated.timesteps[step]
        expected, got = simulated(x, timestep).sample, engine(x, timestep).sample
        assert got.shape == expected.shape
        assert (got - expected).norm() < 0.1 * expected.norm()
        if shape == (1, 1, 8, 8):
            first = got if first is None else first
            assert torch.equal(first, got)


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "float attention"])
def test_batch_of_mixed_steps_equals_its_samples_one_by_one(
    exported: dict[str, Path], kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernels:
        monkeypatch.setattr(library, "has_products", lambda: False)
    engine = load(str(exported["4/4"]), "cpu")
    x, timesteps = torch.randn(3, 1, 8, 8), engine.timesteps[[2, 0, 2]]
    mixed = engine(x, timesteps, return_dict=False)[0]
    alone = torch.cat([engine(x[i : i + 1], timesteps[i]).sample for i in range(3)])
    assert torch.allclose(mixed, alone, atol=1e-6)
    assert torch.equal(engine(x, timesteps).sample, mixed)


def test_copies_and_pipelines(exported: dict[str, Path]) -> None:
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    engine = load(str(exported["4/4"]), "cpu")
    x = torch.randn(1, 1, 8, 8)
    expected = engine(x, 0).sample
    twin = copy.deepcopy(engine)
    del engine
    assert torch.equal(twin(x, 0).sample, expected)
    assert isinstance(twin, UNet2DModel) and type(twin).__name__ == "UNet2DModel"
    pipeline = DDIMPipeline(unet=twin, scheduler=DDIMScheduler(timestep_spacing="trailing"))
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(num_inference_steps=4, output_type="np").images.shape == (1, 8, 8, 1)


@needs_kernels
def test_weights_are_read_at_their_first_use_and_their_pages_let_go(exported: dict[str, Path]) -> None:
    engine = load(str(exported["4/4"]), "cpu")
    products = [module for module in engine.modules() if isinstance(module, NativeProduct)]
    assert products
    assert all(product.packed is None and product.pages is not None for product in products)
    twin = copy.deepcopy(engine)  # its codes have memory of their own, which stays
    assert not any(getattr(module, "pages", None) for module in twin.modules())
    x = torch.randn(1, 1, 8, 8)
    assert torch.equal(engine(x, 0).sample, twin(x, 0).sample)
    assert all(p.packed is not None and p.source is None and p.pages is None for p in products)


def test_without_a_compiler_the_same_numbers_and_a_warning(
    exported: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    x = torch.randn(2, 1, 8, 8)
    expected = load(str(exported["6/6"]), "simulate")(x, 0).sample
    monkeypatch.setenv("DQTOOL_KERNELS", "0")
    library.has_products.cache_clear()
    try:
        engine = load(str(exported["6/6"]), "cpu")
        assert "slower" in capsys.readouterr().err
        assert (engine(x, 0).sample - expected).norm() < 0.05 * expected.norm()
        kinds = integer_report(engine)
        assert "float" in kinds.values() and "int8" in kinds.values()  # attention's products, and the layers
    finally:
        library.has_products.cache_clear()


def random_layer(
    co: int, ci: int, kernel: int, bits: int, groups: int = 1, **geometry: tuple[int, int]
) -> IntegerLayer:
    """A layer of random codes that need no calibration, with one step."""
    q = 2**bits - 1
    weight = torch.randint(-q // 2, q // 2 + 1, (co, ci // groups, kernel, kernel), dtype=torch.int8)
    operand = Operand(bits, torch.tensor([0.1]), torch.tensor([q // 3], dtype=torch.int32))
    return IntegerLayer(operand, weight, torch.rand(co), torch.randn(co), None, True, groups=groups, **geometry)


@pytest.mark.parametrize(
    ("co", "ci", "kernel", "geometry"),
    [
        (64, 32, 3, {"padding": (1, 1)}),
        (20, 16, 3, {"padding": (1, 1)}),
        (80, 20, 3, {"padding": (0, 0)}),
        (16, 18, 3, {"padding": (2, 2)}),
        (70, 33, 3, {"padding": (1, 1), "stride": (2, 2)}),
        (24, 16, 3, {"padding": (2, 2), "taps_dilation": (2, 2)}),
        (130, 5, 1, {}),
    ],
)
@pytest.mark.parametrize("bits", [2, 4, 5, 7, 8])
def test_convolutions_of_every_geometry_are_exact(co: int, ci: int, kernel: int, geometry: dict, bits: int) -> None:
    torch.manual_seed(co + bits)
    layer = random_layer(co, ci, kernel, bits, **geometry)
    assert layer.input is not None
    for size in ((6, 6), (5, 7)):
        x = torch.randn(3, ci, *size) * layer.input.scale[0] * 2**bits / 4
        expected = accumulate(layer.input.codes(x, 0, channel_dim=1), layer)
        for engine in engines(layer):
            product = engine(layer, CurrentStep())
            assert torch.equal(product.accumulators(product.quantize(x)).to(torch.int64), expected), engine


@needs_kernels
def test_narrow_convolutions_run_as_winograd_transforms_where_they_fit_a_byte() -> None:
    if library.on_tiles(32):
        pytest.skip("tiles take the place of Winograd transforms")
    x = torch.randn(1, 32, 6, 6)
    narrow = NativeProduct(random_layer(32, 32, 3, 4, padding=(1, 1)), CurrentStep())
    narrow(x)
    assert narrow.winograd
    layer = random_layer(32, 32, 3, 4, padding=(1, 1))
    layer.weight[0, 0] = 15  # nine of them sum up to 135
    wide = NativeProduct(layer, CurrentStep())
    wide(x)
    assert not wide.winograd


def test_grouped_convolution_is_exact() -> None:
    layer = random_layer(8, 8, 3, 4, groups=4, padding=(1, 1))
    assert layer.input is not None
    x = torch.randn(2, 8, 5, 5)
    product = OnednnProduct(layer, CurrentStep())
    expected = accumulate(layer.input.codes(x, 0, channel_dim=1), layer)
    assert torch.equal(product.accumulators(product.quantize(x)).to(torch.int64), expected)


def test_bias_per_sample_residual_and_factor() -> None:
    layer = random_layer(16, 16, 3, 4, padding=(1, 1))
    for engine in engines(layer):
        product = engine(layer, CurrentStep())
        x, residual, bias = torch.randn(2, 16, 4, 4), torch.randn(2, 16, 4, 4), torch.randn(2, 16)
        plain = product(x) - product.bias.view(1, -1, 1, 1)
        got = product.multiply(product.quantize(x), bias=bias, residual=residual, post=0.5)
        assert torch.allclose(got, (plain + bias[:, :, None, None] + residual) * 0.5, atol=1e-5), engine


def linear_layer(co: int, ci: int, bits: int) -> IntegerLayer:
    """A linear layer of random codes."""
    conv = random_layer(co, ci, 1, bits)
    return IntegerLayer(conv.input, conv.weight[:, :, 0, 0], conv.weight_scale, conv.bias, None, False)


@needs_kernels
@pytest.mark.parametrize("act", [NONE, SILU, GELU, GELU_TANH, GEGLU])
@pytest.mark.parametrize("width", [64, 640, 900, 36])
def test_codes_of_the_next_layer_are_those_of_its_own_quantizer(
    act: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dqtool.runtimes.cpu.product.PIECE", 1)  # where floats are between: pieces of 48 rows
    torch.manual_seed(width)
    channels = 2 * width if act == GEGLU else width
    first, second = linear_layer(channels, 72, 6), linear_layer(24, width, 4)
    assert first.input is not None and second.input is not None
    second = replace(second, input=replace(second.input, divisor=torch.rand(width) + 0.5))
    following, wide = NativeProduct(second, CurrentStep()), NativeProduct(linear_layer(24, channels, 4), CurrentStep())
    for rows in (1, 37, 100):
        x = torch.randn(rows, 72)
        fused, plain = NativeProduct(first, CurrentStep()), NativeProduct(first, CurrentStep())
        got = fused.feed(fused.quantize(x), following, act)
        expected = Product.feed(plain, plain.quantize(x), following, act)
        assert got.shape == expected.shape and torch.equal(got.data, expected.data)
        assert torch.equal(fused(x), plain(x))  # floats keep their order, in any packed order
        late = plain.feed(plain.quantize(x), following, act)  # packed before it was known what for
        assert torch.equal(late.data, expected.data)
        elsewhere = fused.feed(fused.quantize(x), wide, SILU)  # packed for something else, perhaps
        assert torch.equal(elsewhere.data, Product.feed(plain, plain.quantize(x), wide, SILU).data)


def test_gate_per_sample() -> None:
    layer = linear_layer(20, 16, 6)
    for engine in engines(layer):
        product = engine(layer, CurrentStep())
        x, residual, gates = torch.randn(2, 5, 16), torch.randn(2, 5, 20), torch.randn(2, 60)
        for gate in (gates.chunk(3, dim=1)[1], gates[:1, :20]):
            got = product.multiply(product.quantize(x), residual=residual, gate=gate)
            assert torch.allclose(got, residual + gate[:, None] * product(x), atol=1e-5), engine


def test_scale_and_shift_of_one_sample_are_for_all() -> None:
    layer = linear_layer(20, 16, 6)
    x, scale, shift, norm = torch.randn(3, 5, 16), torch.randn(1, 16), torch.randn(1, 16), nn.LayerNorm(16)
    for engine in engines(layer):
        product = engine(layer, CurrentStep())
        got = product.layer_norm(x, norm, scale, shift).data
        assert torch.equal(got, product.layer_norm(x, norm, scale.expand(3, -1), shift.expand(3, -1)).data), engine


def test_merged_projections_need_one_quantizer() -> None:
    operand = Operand(4, torch.tensor([0.1, 0.2]), torch.tensor([3, 4], dtype=torch.int32))
    other = Operand(4, torch.tensor([0.1, 0.3]), torch.tensor([3, 4], dtype=torch.int32))
    a, b, c = (
        IntegerLayer(o, torch.ones(4, 8, dtype=torch.int8), torch.ones(4), bias, None, False)
        for o, bias in ((operand, None), (operand, torch.ones(4)), (other, None))
    )
    whole = merge([a, b])
    assert whole is not None and whole.weight.shape == (8, 8)
    assert whole.bias is not None and whole.bias.tolist() == [0.0] * 4 + [1.0] * 4
    assert merge([a, c]) is None


@needs_kernels
@pytest.mark.parametrize(("bits", "probs"), [(4, 8), (6, 8), (8, 8), (4, 4)])
@pytest.mark.parametrize(("queries", "keys", "dim"), [(5, 5, 8), (70, 77, 40), (33, 130, 3)])
def test_attention_products_on_integers(bits: int, probs: int, queries: int, keys: int, dim: int) -> None:
    torch.manual_seed(queries)
    heads = 2
    attn = nn.Module()
    attn.heads, attn.scale = heads, dim**-0.5
    processor = QuantAttnProcessor(AttentionBits(bits, probs), StepIndex(torch.tensor([0.0])))
    attn.processor = processor
    for name in ("q", "k", "v"):
        attn.register_buffer(f"{name}_scale", torch.rand(1, heads) * 0.1 + 6 / 2**bits)
        if bits != 8:
            attn.register_buffer(f"{name}_zero_point", torch.full((1, heads), 2 ** (bits - 1), dtype=torch.uint8))
    attn.register_buffer("probs_scale", torch.full((1, heads), 1 / 2**probs))
    q, k, v = (torch.randn(2, heads, s, dim) for s in (queries, keys, keys))
    mask = torch.zeros(2, heads, 1, keys)
    mask[1, :, :, keys // 2 :] = -10000.0
    integer = IntegerAttnProcessor(processor, integer_attention(attn), CurrentStep())
    for m in (None, mask):
        expected, got = processor.attend(attn, q, k, v, m), integer.attend(attn, q, k, v, m)
        assert got.shape == expected.shape == (2, queries, heads * dim)
        # A softmax value on a rounding tie may take the neighbouring code.
        assert (got - expected).abs().mean() < 1e-4 * expected.abs().mean()


@needs_kernels
@pytest.mark.parametrize("norm_type", ["layer_norm", "ada_norm_zero"])
def test_transformer_blocks_compute_what_the_simulation_does(norm_type: str) -> None:
    from dqtool.runtimes.cpu import convert

    simulated = _transformer(norm_type)
    engine = convert(copy.deepcopy(simulated))
    assert type(engine.block).__name__ == "FusedBasicTransformerBlock"
    x = torch.randn(2, 9, 16)
    arguments: dict = {"timestep": torch.tensor([1, 1])}
    if norm_type == "ada_norm_zero":
        arguments["class_labels"] = torch.tensor([0, 1])
    else:
        arguments["encoder_hidden_states"] = torch.randn(2, 4, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected, got = simulated(x, **arguments), engine(x, **arguments)
    assert (got - expected).norm() < 0.03 * expected.norm()


@needs_kernels
@pytest.mark.parametrize("linear", [False, True])
def test_transformers_on_images_compute_what_the_simulation_does(linear: bool) -> None:
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    from dqtool.runtimes.cpu import convert

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Transformer2DModel(
                2, 8, in_channels=16, norm_num_groups=4, cross_attention_dim=12, use_linear_projection=linear
            )

        def forward(self, hidden: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
            return self.block(hidden, context, timestep=timestep, return_dict=False)[0]

    torch.manual_seed(0)
    simulated = quantized(Root())
    engine = convert(copy.deepcopy(simulated))
    assert type(engine.block).__name__ == "FusedTransformer2DModel"
    x, context = torch.randn(2, 16, 5, 10), torch.randn(2, 4, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected, got = simulated(x, torch.tensor([1, 1]), context), engine(x, torch.tensor([1, 1]), context)
    assert (got - expected).norm() < 0.03 * (expected - x).norm()


def _transformer(norm_type: str) -> nn.Module:
    """One quantized BasicTransformerBlock at 6/6 behind a root that passes its arguments on."""
    from diffusers.models.attention import BasicTransformerBlock

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            cross = 12 if norm_type == "layer_norm" else None
            self.block = BasicTransformerBlock(
                16, 2, 8, cross_attention_dim=cross, norm_type=norm_type, activation_fn="geglu" if cross else "gelu-approximate",
                num_embeds_ada_norm=10 if norm_type == "ada_norm_zero" else None,
                norm_elementwise_affine=norm_type == "layer_norm",
            )  # fmt: skip

        def forward(self, hidden: Tensor, timestep: Tensor, **kwargs: Tensor) -> Tensor:
            return self.block(hidden, timestep=timestep, **kwargs)

    torch.manual_seed(0)
    return quantized(Root())


def quantized(root: nn.Module) -> nn.Module:
    """`root` with its layers (but embeddings') and attention modules packed at 6/6, one step, plain ranges."""
    from dqtool.core.affine import affine_parameters, search_weight
    from dqtool.graph.attention import is_attention
    from dqtool.graph.leaves import is_quantizable
    from dqtool.nn.layers import FakeQuantLayer
    from dqtool.nn.packed_layer import PackedLayer, packed_shapes

    root.eval().requires_grad_(False)
    steps = StepIndex(torch.tensor([1.0]))
    bits = LayerBits(6, 6)
    for name, module in list(root.named_modules()):
        if is_attention(module):
            for operand in ("q", "k", "v"):
                module.register_buffer(f"{operand}_scale", torch.full((1, 2), 4 / 63))
                module.register_buffer(f"{operand}_zero_point", torch.full((1, 2), 32, dtype=torch.uint8))
            module.register_buffer("probs_scale", torch.full((1, 2), 1 / 255))
            module.set_processor(QuantAttnProcessor(AttentionBits(6, 8), steps))
        elif is_quantizable(module) and "emb" not in name:
            fake = FakeQuantLayer(module, bits, steps)
            fake.weight_scale, fake.weight_zero_point = map(nn.Parameter, search_weight(module.weight, 6, False))
            scale, zero_point = affine_parameters(torch.tensor([-3.0]), torch.tensor([3.0]), 6)
            fake.input_scale, fake.input_zero_point = nn.Parameter(scale), nn.Parameter(zero_point)
            shapes = packed_shapes(tuple(fake.weight.shape), bits, 1, 0, module.bias is not None)
            packed = PackedLayer(module, bits, steps, shapes)
            packed.load_state_dict(fake.packed_state(), assign=True)
            parent, _, leaf = name.rpartition(".")
            setattr(root.get_submodule(parent), leaf, packed)
    root.__dict__["_dqtool_steps"] = steps
    return root.requires_grad_(False)
