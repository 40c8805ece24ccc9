"""LoRAs fused into weights give what diffusers gives when it fuses them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_pipeline, weights_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from dqtool.artifacts import open_artifact
from dqtool.errors import ArtifactError, EnvironmentFault, NumericError, UsageError
from dqtool.models.networks.loading import load_weights
from dqtool.models.sources.lora import lora_delta
from dqtool.models.sources.resolve import resolve_model

CONFIG: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
}
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
CONV = "down_blocks.0.resnets.0.conv1"


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random UNet2DConditionModel as a component directory."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("lora") / "unet"
    UNet2DConditionModel(**CONFIG).save_pretrained(path)
    return path


def factors(out: int, into: int, rank: int = 4, kernel: int | None = None) -> tuple[Tensor, Tensor]:
    """A and B."""
    if kernel is None:
        return torch.randn(rank, into), torch.randn(out, rank)
    return torch.randn(rank, into, kernel, kernel), torch.randn(out, rank, 1, 1)


def peft_file(path: Path, prefix: str = "unet.", **extra: Tensor) -> Path:
    torch.manual_seed(1)
    state: dict[str, Tensor] = dict(extra)
    for module, shape in ((f"{ATTENTION}.to_q", (32, 32)), (f"{ATTENTION}.to_out.0", (32, 32)), (CONV, (32, 32, 4, 3))):
        a, b = factors(*shape)
        state |= {f"{prefix}{module}.lora_A.weight": a, f"{prefix}{module}.lora_B.weight": b}
    save_file(state, path)
    return path


def fused(unet: Path, *loras: str) -> dict[str, Tensor]:
    return load_weights(resolve_model(str(unet), loras=loras))


def by_diffusers(unet: Path, file: Path, weight: float) -> dict[str, Tensor]:
    """Return the weights after diffusers' `load_lora_weights` and `fuse_lora` of the same file."""
    pytest.importorskip("peft")
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    network = UNet2DConditionModel.from_pretrained(unet)
    state, alphas = StableDiffusionPipeline.lora_state_dict(str(file), unet_config=network.config)
    StableDiffusionPipeline.load_lora_into_unet(state, network_alphas=alphas, unet=network)
    network.fuse_lora(lora_scale=weight)
    network.unload_lora()
    return network.state_dict()


@pytest.mark.parametrize("weight", [1.0, -0.5])
def test_diffusers_format_as_diffusers_fuses_it(unet: Path, tmp_path: Path, weight: float) -> None:
    file = peft_file(tmp_path / "lora.safetensors")
    ours, theirs = fused(unet, f"{file}:{weight}"), by_diffusers(unet, file, weight)
    original = load_file(unet / "diffusion_pytorch_model.safetensors")
    changed = {name for name in ours if not torch.equal(ours[name], original[name])}
    assert changed == {f"{ATTENTION}.to_q.weight", f"{ATTENTION}.to_out.0.weight", f"{CONV}.weight"}
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-5)


def test_kohya_format_with_alphas_as_diffusers_fuses_it(unet: Path, tmp_path: Path) -> None:
    torch.manual_seed(2)
    state: dict[str, Tensor] = {}
    for module in ("attn1_to_q", "attn1_to_out_0", "ff_net_2"):
        down, up = factors(32, 128 if module == "ff_net_2" else 32)
        name = f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_{module}"
        state |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(2.0)}
    save_file(state, tmp_path / "kohya.safetensors")
    ours = fused(unet, str(tmp_path / "kohya.safetensors"))
    theirs = by_diffusers(unet, tmp_path / "kohya.safetensors", 1.0)
    original = load_file(unet / "diffusion_pytorch_model.safetensors")
    assert sum(not torch.equal(ours[name], original[name]) for name in ours) == 3
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-5)


def test_names_from_before_peft(unet: Path, tmp_path: Path) -> None:
    down, up = factors(32, 32)
    name = f"unet.{ATTENTION}.processor.to_k_lora"
    save_file({f"{name}.down.weight": down, f"{name}.up.weight": up}, tmp_path / "old.safetensors")
    original = load_file(unet / "diffusion_pytorch_model.safetensors")[f"{ATTENTION}.to_k.weight"]
    ours = fused(unet, str(tmp_path / "old.safetensors"))[f"{ATTENTION}.to_k.weight"]
    torch.testing.assert_close(ours, original + up @ down)


def test_alpha_in_the_metadata_of_peft(unet: Path, tmp_path: Path) -> None:
    import json

    down, up = factors(32, 32)
    state = {f"unet.{ATTENTION}.to_v.lora_A.weight": down, f"unet.{ATTENTION}.to_v.lora_B.weight": up}
    settings = {"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_v": 6}}
    save_file(state, tmp_path / "meta.safetensors", metadata={"lora_adapter_metadata": json.dumps(settings)})
    original = load_file(unet / "diffusion_pytorch_model.safetensors")[f"{ATTENTION}.to_v.weight"]
    ours = fused(unet, str(tmp_path / "meta.safetensors"))[f"{ATTENTION}.to_v.weight"]
    torch.testing.assert_close(ours, original + 6 / 4 * up @ down)


def test_several_add_up_and_are_part_of_what_the_model_is(unet: Path, tmp_path: Path) -> None:
    file = peft_file(tmp_path / "lora.safetensors")
    twice, at_once = fused(unet, f"{file}:0.25", f"{file}:0.5"), fused(unet, f"{file}:0.75")
    for name, tensor in twice.items():
        torch.testing.assert_close(tensor, at_once[name], rtol=1e-5, atol=1e-5)
    digests = {resolve_model(str(unet), loras=given).sha256() for given in ((), (str(file),), (f"{file}:0.5",))}
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"unet.conv_nowhere.lora_A.weight": torch.ones(4, 8), "unet.conv_nowhere.lora_B.weight": torch.ones(8, 4)}, ArtifactError, "does not have"),
        ({"unet.conv_in.lora_A.weight": torch.ones(4, 8), "unet.conv_in.lora_B.weight": torch.ones(8, 4)}, ArtifactError, "don't fit"),
        ({"unet.conv_in.lora_A.weight": torch.ones(4, 4, 3, 3)}, ArtifactError, "one of its two"),
        ({"unet.conv_in.dora_scale": torch.ones(4)}, ArtifactError, "DoRA"),
        ({"something.else": torch.ones(4)}, ArtifactError, "something.else"),
        ({"unet.conv_in.lora_A.weight": torch.full((4, 4, 3, 3), torch.nan), "unet.conv_in.lora_B.weight": torch.ones(32, 4, 1, 1)}, NumericError, "NaN"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    unet: Path, tmp_path: Path, change: dict[str, Tensor], error: type[Exception], text: str
) -> None:
    file = peft_file(tmp_path / "lora.safetensors", **change)
    with pytest.raises(error, match=text):
        fused(unet, str(file))


def test_the_command_line_takes_files_and_weights(unet: Path, tmp_path: Path) -> None:
    file = peft_file(tmp_path / "lora.safetensors")
    with pytest.raises(UsageError, match="no weight"):
        resolve_model(str(unet), loras=[f"{file}:much"])
    with pytest.raises(EnvironmentFault, match="no such LoRA"):
        resolve_model(str(unet), loras=["absent.safetensors:0.5"])


def test_factors_of_convolutions() -> None:
    down, up = factors(6, 5, kernel=3)
    x = torch.randn(2, 5, 7, 7)
    direct = torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, down), up)
    torch.testing.assert_close(
        torch.nn.functional.conv2d(x, lora_delta(down, up, torch.Size((6, 5, 3, 3)), "")), direct, rtol=1e-4, atol=1e-4
    )


def test_dilate_fuses_before_it_dilates(tmp_path: Path, run: Any) -> None:
    tiny_pipeline(tmp_path / "tiny")
    torch.manual_seed(0)
    a, b = factors(16, 8, kernel=3)
    save_file({"unet.down_blocks.1.resnets.0.conv1.lora_A.weight": a, "unet.down_blocks.1.resnets.0.conv1.lora_B.weight": b}, tmp_path / "l.safetensors")  # fmt: skip
    plain = run("dilate", "tiny", "-o", "plain.safetensors", cwd=tmp_path)
    assert plain.returncode == 0, plain.stderr
    result = run("dilate", "tiny", "--lora", "l.safetensors:0.5", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    artifact = open_artifact(tmp_path / "dilated.safetensors")
    assert artifact.manifest.parameters.as_read["lora"] == ["l.safetensors:0.5"]
    name = "down_blocks.1.resnets.0.conv1"
    tensors = artifact.tensors()
    expected = load_file(weights_of(tmp_path / "tiny"))[f"{name}.weight"] + 0.5 * lora_delta(a, b, torch.Size((16, 8, 3, 3)), "")  # fmt: skip
    factor = tensors.get(f"{name}.dilation", torch.ones(8)).view(1, -1, 1, 1)
    undone = tensors[f"{name}.weight"] / factor
    torch.testing.assert_close(undone, expected, rtol=1e-6, atol=1e-7)
    assert artifact.manifest.fingerprint != open_artifact(tmp_path / "plain.safetensors").manifest.fingerprint


def with_settings(path: Path, **settings: Any) -> Path:
    """A LoRA of peft with these settings in its metadata."""
    import json

    torch.manual_seed(1)
    a, b = factors(32, 32)
    state = {f"unet.{ATTENTION}.to_q.lora_A.weight": a, f"unet.{ATTENTION}.to_q.lora_B.weight": b}
    metadata = {f"unet.{key}": value for key, value in settings.items()}
    save_file(state, path, metadata={"lora_adapter_metadata": json.dumps(metadata)})
    return path


class TestSettings:
    @pytest.mark.parametrize(
        ("patterns", "alpha"),
        [
            ({"to_q": 8}, 8.0),
            ({f"{ATTENTION}.to_q": 8}, 8.0),
            ({"to_k": 2, r"down_blocks\.\d+\..*\.to_[qk]": 8, "to_q": 16}, 8.0),  # the first that matches
            ({"o_q": 8}, 4.0),
        ],
    )
    def test_patterns_mean_what_peft_means(self, unet: Path, tmp_path: Path, patterns: dict, alpha: float):
        name = f"{ATTENTION}.to_q.weight"
        plain = load_weights(resolve_model(str(unet)))[name]
        path = with_settings(tmp_path / "a.safetensors", lora_alpha=4, alpha_pattern=patterns)
        changed = load_weights(resolve_model(str(unet), loras=[str(path)]))[name] - plain
        whole = with_settings(tmp_path / "b.safetensors", lora_alpha=alpha)
        expected = load_weights(resolve_model(str(unet), loras=[str(whole)]))[name] - plain
        torch.testing.assert_close(changed, expected)

    @pytest.mark.parametrize(
        "settings",
        [
            {"alpha_pattern": {"(a+)+$": 1, "(.*.*.*)*x" * 50: 2}, "lora_alpha": "x"},
            {"lora_alpha": True},
            {"lora_alpha": [1]},
            {"alpha_pattern": [1]},
            {"alpha_pattern": {"(": 1}},
            {"alpha_pattern": {"a": None}},
            {"alpha_pattern": {r"(\w+)\1": 1}},
        ],
    )
    def test_odd_settings(self, unet: Path, tmp_path: Path, settings: dict):
        path = with_settings(tmp_path / "a.safetensors", **settings)
        with pytest.raises(ArtifactError):
            load_weights(resolve_model(str(unet), loras=[str(path)]))

    @pytest.mark.parametrize(
        ("down", "up"),
        [((0, 32), (32, 0)), ((4,), (32, 4)), ((), ()), ((4, 32), (32,)), ((4, 0), (32, 4))],
    )
    def test_ranks_that_are_none(self, unet: Path, tmp_path: Path, down: tuple, up: tuple):
        path = tmp_path / "a.safetensors"
        name = f"unet.{ATTENTION}.to_q.lora"
        save_file({f"{name}_A.weight": torch.ones(down), f"{name}_B.weight": torch.ones(up)}, path)
        with pytest.raises(ArtifactError, match="factors|rank"):
            load_weights(resolve_model(str(unet), loras=[str(path)]))

    @pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.bool])
    def test_types_that_are_no_floats(self, unet: Path, tmp_path: Path, dtype: torch.dtype):
        path = tmp_path / "a.safetensors"
        name = f"unet.{ATTENTION}.to_q.lora"
        save_file({f"{name}_A.weight": torch.ones(4, 32, dtype=dtype), f"{name}_B.weight": torch.ones(32, 4)}, path)
        with pytest.raises(ArtifactError, match="floats"):
            load_weights(resolve_model(str(unet), loras=[str(path)]))


def test_a_second_factor_without_columns_is_refused() -> None:
    from dqtool.models.sources.lora import lora_delta

    with pytest.raises(ArtifactError, match="no two matrices of a rank above 0"):
        lora_delta(torch.zeros(2, 1, 3, 3), torch.zeros(8, 2, 0), torch.Size([8, 1, 3, 3]), "here")
