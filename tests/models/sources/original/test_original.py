"""Original checkpoints give the same numbers as the networks they come from, under diffusers' names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from original_networks import DdimModel, DiT, FirstStage, UNetModel, randomize
from safetensors.torch import save_file
from torch import Tensor, nn

from dqtool.errors import ArtifactError, UsageError
from dqtool.models.architectures import ARCHITECTURES
from dqtool.models.sources.hints import ModelHints
from dqtool.models.sources.resolve import ModelSource, resolve_model

TOLERANCE = 1e-4


def diffusers_network(source: ModelSource) -> nn.Module:
    """The converted network as diffusers' class, also where dqtool has no adapter for it."""
    import diffusers

    from dqtool.models.config_extras import apply_config_extras
    from dqtool.models.networks.loading import load_weights

    network = apply_config_extras(getattr(diffusers, source.class_name).from_config(source.config), source.config)
    network.load_state_dict(load_weights(source), strict=True)
    return network.eval()


def assert_equal_outputs(original: nn.Module, network: nn.Module, x: Tensor, **conditions: Tensor) -> None:
    t = torch.tensor([13, 801])
    names = {"context": "encoder_hidden_states", "y": "class_labels"}
    with torch.no_grad():
        expected = original(x, t, **conditions)
        given = {names[key]: value for key, value in conditions.items()}
        result = network(x, timestep=t, **given, return_dict=False)[0]
    assert float((result - expected).abs().max() / expected.abs().max()) <= TOLERANCE


def lightning(network: nn.Module, **beside: Tensor) -> dict[str, Any]:
    """A checkpoint as CompVis' trainer writes it."""
    state = {f"model.diffusion_model.{name}": tensor for name, tensor in network.state_dict().items()}
    return {"state_dict": {**state, **beside}, "global_step": 7}


def compvis_yaml(path: Path, **unet: Any) -> str:
    path.write_text(yaml.safe_dump({"model": {"params": {"linear_end": 0.0155, "unet_config": {"params": unet}}}}))
    return str(path)


def test_ddim(tmp_path: Path) -> None:
    original = randomize(DdimModel(ch=32, ch_mult=(1, 2, 2), blocks=1))
    # The repository's format: the model in DataParallel, optimizer, epoch, step, averaged model. Samples use the last.
    stale = {f"module.{name}": torch.zeros_like(tensor) for name, tensor in original.state_dict().items()}
    torch.save([stale, {"state": {}, "param_groups": []}, 3, 1000, original.state_dict()], tmp_path / "ckpt.pth")
    source = resolve_model(str(tmp_path / "ckpt.pth"))
    assert (source.layout, source.class_name, source.config["sample_size"]) == ("ddim", "UNet2DModel", 32)
    assert source.scheduler is not None
    assert source.scheduler["beta_schedule"] == "linear"
    assert_equal_outputs(original, diffusers_network(source), torch.randn(2, 3, 32, 32))


UNETS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "bedroom": (
        {"channel_mult": (1, 2, 3), "attention": (2, 4), "head_channels": 16, "in_channels": 3},
        {"num_head_channels": 16, "image_size": 16},
        "latent-diffusion",
    ),
    "church": (
        {"channel_mult": (1, 2, 2), "attention": (1, 2), "heads": 8, "scale_shift": True, "resblock_updown": True},
        {"num_heads": 8, "image_size": 16},
        "latent-diffusion",
    ),
    "imagenet": (
        {"channel_mult": (1, 2, 3), "attention": (2, 4), "heads": 1, "context": 512, "in_channels": 3},
        {"num_heads": 1},
        "latent-diffusion-class",
    ),
    "sd1": ({"channel_mult": (1, 2, 2), "attention": (1, 2), "heads": 8, "context": 768}, {}, "stable-diffusion"),
    "sd2": (
        {
            "channel_mult": (1, 2),
            "attention": (1, 2),
            "head_channels": 64,
            "model_channels": 64,
            "context": 1024,
            "linear": True,
        },
        {},
        "stable-diffusion",
    ),
}


@pytest.mark.parametrize("name", UNETS)
def test_compvis_unets(tmp_path: Path, name: str) -> None:
    options, published, layout = UNETS[name]
    original = randomize(UNetModel(**{"model_channels": 32, "blocks": 1, **options}))
    beside = {"first_stage_model.conv.weight": torch.zeros(4), "scale_factor": torch.tensor(0.2)}
    torch.save(lightning(original, **beside), tmp_path / "model.ckpt")
    config = compvis_yaml(tmp_path / "model.yaml", **published) if published else None
    source = resolve_model(str(tmp_path / "model.ckpt"), config)
    assert source.layout == layout
    assert len(source.tensor_entries()) == len(original.state_dict())
    context = options.get("context")
    conditions = {} if context is None else {"context": torch.randn(2, 5, context)}
    assert_equal_outputs(
        original, diffusers_network(source), torch.randn(2, options.get("in_channels", 4), 16, 16), **conditions
    )
    if published:
        assert source.scheduler is not None
        assert source.scheduler["beta_end"] == 0.0155


@pytest.mark.parametrize("codes", [None, 16])
def test_the_first_stage_comes_along(tmp_path: Path, codes: int | None) -> None:
    """A checkpoint with its autoencoder is a pipeline that decodes as the original does, in the checkpoint's scale."""
    from dqtool.models.components.companions import companions_of_source

    options, published, _ = UNETS["bedroom"]
    original, stage = randomize(UNetModel(32, blocks=1, **options)), randomize(FirstStage(latent=3, codes=codes))
    beside = {f"first_stage_model.{name}": tensor for name, tensor in stage.state_dict().items()}
    torch.save(lightning(original, **beside, scale_factor=torch.tensor(0.5)), tmp_path / "model.ckpt")
    source = resolve_model(str(tmp_path / "model.ckpt"), compvis_yaml(tmp_path / "model.yaml", **published))
    assert (source.model_index or {})["_class_name"] == "LDMPipeline"
    assert source.scheduler == source.own_scheduler
    companions = companions_of_source(source)
    assert companions is not None
    decode = companions.decoder()
    assert decode is not None
    z = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = stage(z / 0.5).clamp(-1, 1)
    torch.testing.assert_close(decode(z), expected, rtol=1e-4, atol=1e-4)
    assert_equal_outputs(original, diffusers_network(source), torch.randn(2, 3, 16, 16))
    assert resolve_model(str(tmp_path / "model.ckpt"), str(tmp_path / "model.yaml")).pipeline == source.pipeline


def test_a_class_conditional_checkpoint_is_guided(tmp_path: Path, run: Any) -> None:
    options = {"channel_mult": (1, 2), "attention": (2,), "heads": 1, "context": 512, "in_channels": 3}
    original, stage = randomize(UNetModel(32, blocks=1, **options)), randomize(FirstStage(latent=3, codes=16))
    beside = {f"first_stage_model.{name}": tensor for name, tensor in stage.state_dict().items()}
    beside["cond_stage_model.embedding.weight"] = torch.randn(11, 512)
    torch.save(lightning(original, **beside), tmp_path / "model.ckpt")
    config = compvis_yaml(tmp_path / "model.yaml", image_size=8, num_heads=1)
    for arguments in (
        ("dilate", "model.ckpt", "--config", config),
        ("calibrate", "--steps", "2", "--samples", "4", "--guidance", "3"),
        ("distill", "--iters", "0", "--refine-iters", "0"),
        ("export",),
    ):
        result = run(*arguments, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "exported" / "class_embedder" / "config.json").is_file()
    assert (tmp_path / "exported" / "vae" / "config.json").is_file()


def test_averaged_weights_are_taken(tmp_path: Path) -> None:
    options, _, _ = UNETS["sd1"]
    original, average = randomize(UNetModel(32, blocks=1, **options)), UNetModel(32, blocks=1, **options)
    randomize(average, seed=1)
    ema = {f"model_ema.diffusion_model{name.replace('.', '')}": t for name, t in average.state_dict().items()}
    save_file({k: v.clone() for k, v in lightning(original, **ema)["state_dict"].items()}, tmp_path / "m.safetensors")
    sources = {
        variant: resolve_model(str(tmp_path / "m.safetensors"), hints=ModelHints(variant=variant))
        for variant in (None, "ema", "non_ema")
    }
    for variant, source in sources.items():
        expected = original if variant == "non_ema" else average
        inputs = torch.randn(2, 4, 16, 16)
        assert_equal_outputs(expected, diffusers_network(source), inputs, context=torch.randn(2, 5, 768))
    assert len({source.sha256() for source in sources.values()}) == 3
    with pytest.raises(UsageError, match="no variant 'fp16'"):
        resolve_model(str(tmp_path / "m.safetensors"), hints=ModelHints(variant="fp16"))


@pytest.mark.parametrize("name", ["model.gguf", "model.safetensors"])
def test_a_gguf_file_is_refused_with_what_to_give(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(ArtifactError, match="full-precision model that it was made from"):
        resolve_model(str(tmp_path / name))


@pytest.mark.parametrize("file", ["dit.pt", "dit.safetensors"])
def test_dit(tmp_path: Path, file: str) -> None:
    original = randomize(DiT(width=384, depth=2, heads=6))
    state = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    if file.endswith(".pt"):
        torch.save({"model": {}, "ema": state, "opt": {}}, tmp_path / file)
    else:
        save_file(state, tmp_path / file)
    source = resolve_model(str(tmp_path / file))
    assert (source.layout, source.config["num_embeds_ada_norm"]) == ("dit", 10)
    y = torch.tensor([3, 10])  # the last row is no class
    assert_equal_outputs(original, diffusers_network(source), torch.randn(2, 4, 8, 8), y=y)


def test_dit_of_another_table_of_positions_is_refused(tmp_path: Path) -> None:
    state = {k: v.clone() for k, v in randomize(DiT(width=384, depth=1, heads=6)).state_dict().items()}
    state["pos_embed"] = state["pos_embed"] + 1
    save_file(state, tmp_path / "dit.safetensors")
    with pytest.raises(ArtifactError, match="table of positions"):
        diffusers_network(resolve_model(str(tmp_path / "dit.safetensors")))


FULL: dict[str, Callable[[], nn.Module]] = {
    "ddpm-cifar10": lambda: DdimModel(128, (1, 2, 2, 2), blocks=2),
    "ldm4-bedroom": lambda: UNetModel(224, (1, 2, 3, 4), (2, 4, 8), in_channels=3, head_channels=32),
    "ldm8-church": lambda: UNetModel(
        192, (1, 2, 2, 4, 4), (1, 2, 4, 8), heads=8, scale_shift=True, resblock_updown=True
    ),
    "ldm4-imagenet": lambda: UNetModel(192, (1, 2, 3, 5), (2, 4, 8), in_channels=3, heads=1, context=512),
    "sd14": lambda: UNetModel(320, (1, 2, 4, 4), (1, 2, 4), heads=8, context=768),
    "dit-xl2": lambda: DiT(1152, 28, 16, size=32, classes=1000),
}


@pytest.mark.parametrize("name", FULL)
def test_published_models_are_recognised_without_help(name: str) -> None:
    """Shapes alone give the architecture's config, with its heads, and its noise schedule."""
    from dqtool.models.sources.original import LAYOUTS, Known

    with torch.device("meta"):
        original = FULL[name]()
    shapes = {key: tuple(tensor.shape) for key, tensor in original.state_dict().items()}
    layout = next(each for each in LAYOUTS.values() if each.matches(shapes))
    found, expected = layout.describe(shapes, Known(), name), ARCHITECTURES[name]
    assert found.config["_class_name"] == expected.class_name
    for key, value in expected.config.items():
        if key not in ("mid_block_scale_factor", "time_embedding_type", "center_input_sample", "act_fn"):
            assert found.config.get(key) == value, key
    betas = ("beta_schedule", "beta_start", "beta_end")
    assert [found.scheduler[key] for key in betas] == [expected.scheduler[key] for key in betas]


def test_heads_that_nothing_tells_are_asked_for(tmp_path: Path) -> None:
    options, _, _ = UNETS["church"]
    torch.save(lightning(UNetModel(32, blocks=1, **options)), tmp_path / "model.ckpt")
    with pytest.raises(ArtifactError, match="heads") as caught:
        resolve_model(str(tmp_path / "model.ckpt"))
    assert "--config" in str(caught.value)


class Payload:
    """A pickle that would run code."""

    def __reduce__(self) -> tuple[Callable, tuple]:
        import os

        return os.system, ("touch executed",)


def test_pickles_that_would_run_code_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"conv_in.weight": torch.zeros(1)}, "callbacks": Payload()}, "model.ckpt")
    with pytest.raises(ArtifactError, match="code would have to run"):
        resolve_model("model.ckpt")
    assert not (tmp_path / "executed").exists()


def test_what_trainers_leave_beside_the_weights_is_not_needed(tmp_path: Path) -> None:
    from argparse import Namespace

    original = randomize(DiT(width=384, depth=1, heads=6))
    torch.save({"ema": original.state_dict(), "args": Namespace(lr=1e-4)}, tmp_path / "dit.pt")
    assert resolve_model(str(tmp_path / "dit.pt")).layout == "dit"


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 damaged"])
def test_damaged_pickles_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.ckpt").write_bytes(content)
    with pytest.raises(ArtifactError):
        resolve_model(str(tmp_path / "model.ckpt"))


def test_a_checkpoint_of_no_known_layout_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "model.pt")
    with pytest.raises(ArtifactError, match="no original checkpoint"):
        resolve_model(str(tmp_path / "model.pt"))
