"""CLIP and aesthetic scores with a tiny random CLIP written by transformers itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_text import D, tiny_clip
from torch import nn

from dqtool.errors import ArtifactError, EnvironmentFault
from dqtool.metrics.aesthetic import load_aesthetic_head
from dqtool.metrics.clip import ClipEncoder, clip_score

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("clip") / "clip")


@pytest.fixture(scope="module")
def encoder(directory: Path) -> ClipEncoder:
    return ClipEncoder(directory)


def test_embeddings_are_those_of_the_model(directory: Path, encoder: ClipEncoder) -> None:
    model = transformers.CLIPModel.from_pretrained(directory).eval()
    images = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pixels = ((images / 255 - mean) / std).permute(0, 3, 1, 2)
    prompts = ["a cat", "z", "b " * 40]
    tokenizer = transformers.CLIPTokenizer.from_pretrained(directory)
    tokens = tokenizer(prompts, padding=True, truncation=True, max_length=16, return_tensors="pt")
    with torch.no_grad():
        outputs = model(pixel_values=pixels, **tokens)
    torch.testing.assert_close(encoder.images(images), outputs.image_embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder.texts(prompts), outputs.text_embeds, rtol=1e-4, atol=1e-5)
    cosines = (outputs.image_embeds * outputs.text_embeds).sum(1)
    torch.testing.assert_close(
        clip_score(encoder.images(images), encoder.texts(prompts)).float(), 100 * cosines, rtol=1e-3, atol=1e-3
    )


def test_other_sizes_are_brought_to_the_centre(encoder: ClipEncoder) -> None:
    wide = Image.new("RGB", (160, 64), "black")
    wide.paste((200, 10, 90), (48, 0, 112, 64))
    plain = torch.from_numpy(np.full((1, 32, 32, 3), (200, 10, 90), dtype=np.uint8))
    found = encoder.images(torch.from_numpy(np.array(wide))[None])
    assert float((found * encoder.images(plain)).sum()) > 0.99


def test_directories_that_will_not_do(tmp_path: Path, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EnvironmentFault, match="no such directory"):
        ClipEncoder(tmp_path / "missing")
    (tmp_path / "other").mkdir()
    with pytest.raises(ArtifactError, match=r"config\.json"):
        ClipEncoder(tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ArtifactError, match="bert"):
        ClipEncoder(tmp_path / "other")
    (tmp_path / "other" / "config.json").write_bytes((directory / "config.json").read_bytes())
    with pytest.raises(ArtifactError):
        ClipEncoder(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ArtifactError, match="no valid safetensors"):
        ClipEncoder(tmp_path / "other")
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(EnvironmentFault, match=r'pip install "dqtool\[text\]"'):
        ClipEncoder(directory)


def mlp(*, relu: bool) -> nn.Sequential:
    modules: list[nn.Module] = []
    for n, (a, b, dropout) in enumerate(((D, 9, 1), (9, 8, 1), (8, 7, 1), (7, 6, 0), (6, 1, 0))):
        modules.append(nn.Linear(a, b))
        if n < 4 and relu:
            modules.append(nn.ReLU())
        if dropout:
            modules.append(nn.Dropout(0.2))
    return nn.Sequential(*modules).eval()


@pytest.mark.parametrize("relu", [False, True])
def test_improved_aesthetic_predictor(tmp_path: Path, relu: bool) -> None:
    torch.manual_seed(0)
    head = mlp(relu=relu)
    torch.save({f"layers.{name}": tensor for name, tensor in head.state_dict().items()}, tmp_path / "mlp.pth")
    x = torch.nn.functional.normalize(torch.randn(4, D), dim=1)
    torch.testing.assert_close(load_aesthetic_head(tmp_path / "mlp.pth", D)(x), head(x))


@pytest.mark.parametrize("prefix", ["", "predictor."])
def test_laion_linear(tmp_path: Path, prefix: str) -> None:
    from safetensors.torch import save_file

    layer = nn.Linear(D, 1)
    state = {f"{prefix}{name}": tensor.detach() for name, tensor in layer.state_dict().items()}
    torch.save(state, tmp_path / "linear.pth")
    save_file(state, tmp_path / "linear.safetensors")
    x = torch.randn(4, D)
    for name in ("linear.pth", "linear.safetensors"):
        assert torch.equal(load_aesthetic_head(tmp_path / name, D)(x), layer(x))
    with pytest.raises(ArtifactError, match="768"):
        load_aesthetic_head(tmp_path / "linear.pth", 768)


def test_heads_that_will_not_do(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault):
        load_aesthetic_head(tmp_path / "missing.pth", D)
    for name, content in (
        ("a.pth", {"x": torch.zeros(2)}),
        ("b.pth", torch.zeros(2)),
        ("c.pth", {"weight": torch.zeros(2)}),
    ):
        torch.save(content, tmp_path / name)
        with pytest.raises(ArtifactError):
            load_aesthetic_head(tmp_path / name, D)
    for name in ("d.pth", "d.safetensors"):
        (tmp_path / name).write_bytes(b"no")
        with pytest.raises(ArtifactError, match="can't be read"):
            load_aesthetic_head(tmp_path / name, D)
