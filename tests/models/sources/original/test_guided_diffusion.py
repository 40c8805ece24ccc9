"""Checkpoints of openai/guided-diffusion and openai/consistency_models give the same numbers under diffusers' names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from original_networks import UNetModel, randomize
from safetensors.torch import save_file
from torch import Tensor, nn

from dqtool.errors import ArtifactError, UsageError
from dqtool.models.networks.loading import build_network, load_weights
from dqtool.models.sources.hints import ModelHints
from dqtool.models.sources.original import LAYOUTS, Description, Known
from dqtool.models.sources.resolve import ModelSource, resolve_model

TINY: dict[str, Any] = {
    "model_channels": 32,
    "channel_mult": (1, 2),
    "attention": (2,),
    "in_channels": 3,
    "blocks": 1,
    "head_channels": 16,
    "scale_shift": True,
    "resblock_updown": True,
}
FLAGS: dict[str, Any] = {"num_head_channels": 16, "image_size": 16, "noise_schedule": "cosine"}


def flags(path: Path, **values: Any) -> str:
    path.write_text(yaml.safe_dump(values))
    return str(path)


def network_of(source: ModelSource) -> nn.Module:
    return build_network(source.class_name, source.config, load_weights(source), source.given)


def assert_equal_outputs(original: nn.Module, source: ModelSource, y: Tensor | None = None, labels: Any = None) -> None:
    x, t = torch.randn(2, source.config["in_channels"], 16, 16), torch.tensor([13, 801])
    given = {} if y is None else {"class_labels": y if labels is None else labels}
    with torch.no_grad():
        expected = original(x, t, y=y)
        found = network_of(source)(x, t, **given, return_dict=False)[0]
    assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-4


@pytest.mark.parametrize("conv", [nn.Conv1d, nn.Conv2d])
@pytest.mark.parametrize("new_order", [False, True])
def test_attention_under_the_authors_names(tmp_path: Path, conv: Any, new_order: bool) -> None:
    original = randomize(UNetModel(**TINY, classes=10, conv=conv, new_order=new_order, out_channels=6))
    save_file({k: v.clone() for k, v in original.state_dict().items()}, tmp_path / "m.safetensors")
    config = flags(tmp_path / "flags.yaml", **FLAGS, use_new_attention_order=new_order)
    source = resolve_model(str(tmp_path / "m.safetensors"), config)
    assert (source.layout, source.class_name) == ("guided-diffusion", "UNet2DModel")
    assert (source.config["num_class_embeds"], source.config["out_channels"]) == (10, 6)
    assert_equal_outputs(original, source, y=torch.tensor([3, 9]))


def test_defaults_are_the_authors(tmp_path: Path) -> None:
    """A 2-d convolution comes with flash attention, hence the new order; a 1-d one with the legacy order."""
    for conv, new_order in ((nn.Conv2d, True), (nn.Conv1d, False)):
        original = randomize(UNetModel(**TINY, conv=conv, new_order=new_order))
        torch.save(original.state_dict(), tmp_path / "m.pt")
        source = resolve_model(str(tmp_path / "m.pt"), flags(tmp_path / "flags.yaml", **FLAGS))
        assert_equal_outputs(original, source)


def test_labels_that_are_numbers(tmp_path: Path) -> None:
    """An MLP of a number becomes a table of the labels that the flags name, under CompVis' prefix too."""
    original = UNetModel(**TINY, conv=nn.Conv2d, new_order=True)
    original.label_emb = nn.Sequential(nn.Linear(1, 128), nn.SiLU(), nn.Linear(128, 128))
    randomize(original)
    state = {f"model.diffusion_model.{k}": v.clone() for k, v in original.state_dict().items()}
    save_file(state, tmp_path / "m.safetensors")
    given = str(tmp_path / "m.safetensors")
    with pytest.raises(ArtifactError, match="conditioned on a number") as caught:
        resolve_model(given, flags(tmp_path / "flags.yaml", **FLAGS))
    assert "label_values" in str(caught.value)
    config = flags(tmp_path / "flags.yaml", **FLAGS, label_values=[0, 1, 100], training_mode="consistency_training")
    source = resolve_model(given, config)
    assert source.config["num_class_embeds"] == 100
    assert (source.scheduler or {})["_class_name"] == "CMStochasticIterativeScheduler"
    assert_equal_outputs(original, source, y=torch.tensor([[0.0], [73 / 99]]), labels=torch.tensor([0, 73]))


def test_schedules_that_nothing_tells_are_asked_for(tmp_path: Path) -> None:
    def asked(conv: Any, told: ModelHints | None = None, **more: Any) -> dict[str, Any]:
        network = randomize(UNetModel(**TINY, conv=conv))
        save_file({k: v.clone() for k, v in network.state_dict().items()}, tmp_path / "m.safetensors")
        config = flags(tmp_path / "flags.yaml", num_head_channels=16, image_size=16, **more)
        source = resolve_model(str(tmp_path / "m.safetensors"), config, hints=told)
        source.check_schedule()
        return source.scheduler or {}

    for conv in (nn.Conv1d, nn.Conv2d):
        with pytest.raises(UsageError, match="schedule") as caught:
            asked(conv)
        assert "--scheduler" in str(caught.value)
    assert asked(nn.Conv1d, noise_schedule="cosine")["beta_schedule"] == "squaredcos_cap_v2"
    assert asked(nn.Conv1d, noise_schedule="linear", predict_xstart=True)["prediction_type"] == "sample"
    told = ModelHints(scheduler="CMStochasticIterativeScheduler")
    assert asked(nn.Conv2d, told)["_class_name"] == "CMStochasticIterativeScheduler"
    assert asked(nn.Conv2d, training_mode="consistency_distillation", sigma_max=40)["sigma_max"] == 40.0


def test_heads_that_nothing_tells_are_asked_for(tmp_path: Path) -> None:
    network = randomize(UNetModel(**TINY))
    save_file({k: v.clone() for k, v in network.state_dict().items()}, tmp_path / "m.safetensors")
    with pytest.raises(ArtifactError, match="attention heads") as caught:
        resolve_model(str(tmp_path / "m.safetensors"))
    assert "num_head_channels" in str(caught.value)


ADM: dict[str, Any] = {"in_channels": 3, "out_channels": 6, "scale_shift": True, "resblock_updown": True}
CM: dict[str, Any] = {**ADM, "out_channels": 3, "conv": nn.Conv2d}
OF_64 = {"model_channels": 192, "channel_mult": (1, 2, 3, 4), "attention": (2, 4, 8), "blocks": 3, "head_channels": 64}
OF_256 = {"model_channels": 256, "channel_mult": (1, 1, 2, 2, 4, 4), "attention": (8, 16, 32), "head_channels": 64}
OF_128 = {"model_channels": 256, "channel_mult": (1, 1, 2, 3, 4), "attention": (4, 8, 16), "heads": 4}
TERRAIN = {
    "model_channels": 32,
    "channel_mult": (1, 1, 2, 3, 4),
    "attention": (4, 8, 16),
    "blocks": 4,
    "head_channels": 32,
    "in_channels": 1,
    "out_channels": 1,
}
PUBLISHED: dict[str, tuple[dict[str, Any], int, dict[str, Any]]] = {
    "adm-64": ({**ADM, **OF_64, "classes": 1000}, 296, {"sample_size": 64, "attention_head_dim": 64}),
    "adm-128": ({**ADM, **OF_128, "classes": 1000}, 422, {"sample_size": 128}),
    "adm-256": ({**ADM, **OF_256, "classes": 1000}, 554, {"sample_size": 256, "attention_head_dim": 64}),
    "adm-lsun": ({**ADM, **OF_256}, 553, {"sample_size": 256, "num_class_embeds": None}),
    "cd-64": ({**CM, **OF_64, "classes": 1000}, 296, {"sample_size": 64, "attention_head_dim": 64}),
    "cd-lsun": ({**CM, **OF_256, "scale_shift": False}, 526, {"resnet_time_scale_shift": "default"}),
    "terrain": ({**CM, **TERRAIN}, 10, {"sample_size": 128, "attention_head_dim": 32, "num_class_embeds": 100}),
}
"""Options, published parameters in millions, and what the config says."""


def described(state: dict[str, Tensor]) -> Description:
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    layout = next(each for each in LAYOUTS.values() if each.matches(shapes))
    assert layout.name == "guided-diffusion"
    return layout.describe(shapes, Known(), "model.pt")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_need_no_flags(name: str) -> None:
    from diffusers import UNet2DModel

    from dqtool.models.config_extras import apply_config_extras

    options, millions, expected = PUBLISHED[name]
    with torch.device("meta"):
        original = UNetModel(**options)
        if name == "terrain":
            original.label_emb = nn.Sequential(nn.Linear(1, 128), nn.SiLU(), nn.Linear(128, 128))
    state = dict(original.state_dict())
    found = described(state)
    assert {key: found.config.get(key) for key in expected} == expected
    order = found.config.get("original", {}).get("attention_order")
    assert order == ("new" if name == "adm-64" else None)  # other models use the default for their convolution
    with torch.device("meta"):
        network = apply_config_extras(UNet2DModel.from_config(found.config), found.config)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6) == millions
    if name != "terrain":  # its table of labels is computed
        converted = LAYOUTS["guided-diffusion"].convert(state, found.config, name)
        assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in network.state_dict().items()}
    heads = {module.heads for module in network.modules() if hasattr(module, "to_q")}
    assert heads == ({4} if name == "adm-128" else {w // found.config["attention_head_dim"] for w in _widths(options)})
    asked = name.startswith("cd-")
    assert (found.unknown_schedule is not None) is asked
    kind = "CMStochasticIterativeScheduler" if "conv" in options else "DDIMScheduler"
    assert found.scheduler["_class_name"] == kind
    if kind == "DDIMScheduler":
        assert found.scheduler["beta_schedule"] == ("squaredcos_cap_v2" if name == "adm-64" else "linear")


def _widths(options: dict[str, Any]) -> set[int]:
    """Channels of the resolutions that attend."""
    mults, first = options["channel_mult"], options["model_channels"]
    return {first * mult for level, mult in enumerate(mults) if 2**level in options["attention"]}


def test_a_consistency_model_goes_through_the_command_line(tmp_path: Path, run: Any) -> None:
    """One step of a tiny network under the authors' names, from the file to an exported network."""
    network = randomize(UNetModel(**TINY, conv=nn.Conv2d, new_order=True, classes=4))
    save_file({k: v.clone() for k, v in network.state_dict().items()}, tmp_path / "m.safetensors")
    flags(tmp_path / "flags.yaml", **FLAGS, training_mode="consistency_distillation")
    for arguments in (
        ("dilate", "m.safetensors", "--config", "flags.yaml", "--scaling", "none"),
        ("calibrate", "--steps", "1", "--samples", "4"),
        ("distill", "--iters", "0", "--refine-iters", "0"),
        ("export",),
    ):
        result = run(*arguments, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
