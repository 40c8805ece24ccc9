"""Networks without an adapter: refused with the list, or run leaf by leaf on request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import dqtool
from dqtool.artifacts import open_artifact
from dqtool.errors import ArtifactError, UsageError
from dqtool.models.families import FAMILIES, family_of
from dqtool.models.families.generic import EXAMPLE, Generic
from dqtool.nn.surgery import steps_of
from dqtool.stages.calibrate import CalibrateOptions, calibrate
from dqtool.stages.dilate import DilateOptions, dilate
from dqtool.stages.distill import DistillOptions, distill
from dqtool.stages.eval import EvalOptions, evaluate
from dqtool.stages.export import ExportOptions, export
from dqtool.stages.shared.settings import RunSettings

QUIET = RunSettings(quiet=True)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """AuraFlow: its text is an argument that has a default and is needed all the same."""
    from diffusers import AuraFlowTransformer2DModel

    torch.manual_seed(0)
    network = AuraFlowTransformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pos_embed_max_size=16,
    )
    network.save_pretrained(tmp_path / "model")
    (tmp_path / "scheduler.json").write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.73}')
    return tmp_path / "model"


def told(model: Path, output: str, **options: Any) -> DilateOptions:
    """Options of `dilate` with the schedule that weights alone don't tell."""
    return DilateOptions(str(model), output, scheduler=str(model.parent / "scheduler.json"), **options)


def test_an_unknown_class_is_refused_with_the_list(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as error:
        dilate(told(model, str(tmp_path / "d.safetensors")), QUIET)
    assert all(name in str(error.value) for name in FAMILIES)
    assert "--family generic" in str(error.value)


def test_generic_says_what_it_needs(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="--example"):
        dilate(told(model, str(tmp_path / "d.safetensors"), family="generic"), QUIET)
    with pytest.raises(UsageError, match="is no family"):
        dilate(told(model, str(tmp_path / "d.safetensors"), family="vit"), QUIET)
    with pytest.raises(ArtifactError, match="takes no sample"):
        family_of("generic:ReduxImageEncoder", "test")
    with pytest.raises(ArtifactError, match="has no network"):
        family_of("generic:NoSuchModel", "test")


def test_generic_goes_through_all_stages(model: Path, tmp_path: Path) -> None:
    save_file({"encoder_hidden_states": torch.randn(1, 5, 12)}, tmp_path / "example.safetensors")
    at = {name: str(tmp_path / f"{name}.safetensors") for name in "dcq"}
    dilate(told(model, at["d"], family="generic", example=str(tmp_path / "example.safetensors")), QUIET)
    manifest = open_artifact(at["d"]).manifest
    assert manifest.network.family == "generic"
    blocks = [block.name for block in manifest.metrics.blocks]
    assert all(any(f"{r.name}.".startswith(f"{block}.") for block in blocks) for r in manifest.layers)
    products = [record for record in manifest.layers if record.kind == "attention"]
    assert [record.name for record in products] == [
        "joint_transformer_blocks.0.attn",
        "single_transformer_blocks.0.attn",
    ]
    assert products[0].shape == (16 + 8 + 5, 16 + 8 + 5, 16)  # image, register and text tokens
    assert "kept_float" not in manifest.metrics.as_read
    calibrate(CalibrateOptions(at["d"], at["c"], steps=2, samples=6, random_conditions=True), QUIET)
    distill(DistillOptions(at["c"], at["q"], bits="8/8", iters=1, refine_iters=1), QUIET)
    export(ExportOptions(at["q"], str(tmp_path / "exported")), QUIET)
    report = evaluate(EvalOptions(str(tmp_path / "exported"), str(tmp_path / "eval.json"), samples=2), QUIET)
    assert open_artifact(report).manifest.metrics.as_read["psnr"]["mean"] > 20
    from diffusers import AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

    simulated = dqtool.DqtoolConfig(runtime="simulate")
    theirs = AuraFlowTransformer2DModel.from_pretrained(tmp_path / "exported", quantization_config=simulated)
    ours = dqtool.load(str(tmp_path / "exported"), runtime="simulate")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.73)
    scheduler.set_timesteps(2)
    for row, t in enumerate(scheduler.timesteps):  # AuraFlowPipeline passes t / 1000
        ours(torch.randn(1, 4, 8, 8), torch.randn(1, 5, 12), torch.tensor([t / 1000]))
        assert steps_of(ours).rows.tolist() == [row]
    assert not steps_of(ours).missed
    x, text, t = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12), torch.tensor([1.0, 1.0])
    with torch.no_grad():
        assert torch.equal(ours(x, text, t).sample, theirs(x, text, t).sample)


def test_tokens_have_one_number_for_all_of_them() -> None:
    family = Generic("AuraFlowTransformer2DModel")
    config = {EXAMPLE: {family.sample: {"shape": [6, 16]}}, "out_channels": 4}
    rows = family.per_channel(torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]), 1.0, config)
    assert rows.tolist() == [[[3.5]]]
    assert rows.shape[1:] == family.prediction_row(config)


VIDEO = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    "cross_attention_dim": 8,
    "attention_head_dim": 4,
    "layers_per_block": 1,
}
PRIOR = {
    "num_attention_heads": 2,
    "attention_head_dim": 4,
    "num_layers": 2,
    "embedding_dim": 8,
    "num_embeddings": 5,
    "additional_embeddings": 4,
}
SHAPES: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]], str]] = {
    "UNet3DConditionModel": (VIDEO, {"sample": (1, 4, 2, 8, 8), "encoder_hidden_states": (1, 3, 8)}, "on-policy"),
    "PriorTransformer": (
        PRIOR,
        {"hidden_states": (1, 8), "proj_embedding": (1, 8), "encoder_hidden_states": (1, 5, 8)},
        "bkd",
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_samples_that_are_no_images_go_through_all_stages(name: str, tmp_path: Path) -> None:
    import diffusers

    config, shapes, method = SHAPES[name]
    torch.manual_seed(0)
    getattr(diffusers, name)(**config).save_pretrained(tmp_path / "model")
    save_file({key: torch.randn(shape) for key, shape in shapes.items()}, tmp_path / "example")
    at = {letter: str(tmp_path / letter) for letter in "dcqx"}
    dilate(DilateOptions(str(tmp_path / "model"), at["d"], family="generic", example=str(tmp_path / "example")), QUIET)
    calibrate(CalibrateOptions(at["d"], at["c"], steps=2, samples=6, random_conditions=True), QUIET)
    if method != "bkd":
        with pytest.raises(UsageError, match="folds frames"):
            distill(DistillOptions(at["c"], at["q"], bits="8/8", iters=1, refine_iters=1), QUIET)
    distill(DistillOptions(at["c"], at["q"], bits="8/8", iters=1, method=method), QUIET)
    export(ExportOptions(at["q"], at["x"]), QUIET)
    report = evaluate(EvalOptions(at["x"], str(tmp_path / "e.json"), samples=2, metrics=("similarity",)), QUIET)
    figures = open_artifact(report).manifest.metrics.as_read
    assert figures["psnr"]["mean"] > 20
    assert ("ssim" in figures) == (name == "UNet3DConditionModel")


def test_a_class_that_says_it_learns_the_variance_predicts_twice_the_channels() -> None:
    config = {"sample_size": 8, "in_channels": 4}
    family = Generic("HunyuanDiT2DModel")
    assert family.prediction_row({**config, "learn_sigma": True}) == (8, 1, 1)
    assert family.prediction_row({**config, "learn_sigma": False}) == (4, 1, 1)
    values = torch.ones(3, 4)
    assert (
        family.per_channel(values, 0.0, {**config, "learn_sigma": True})[:, :, 0, 0].tolist()
        == [[1.0] * 4 + [0.0] * 4] * 3
    )
