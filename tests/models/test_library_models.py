"""Directories that transformers and diffusers read: nothing of them runs, downloads, hangs or fills the memory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timing import within
from tiny_text import tiny_clip, tiny_stable_diffusion

from dqtool.errors import ArtifactError
from dqtool.metrics.clip import ClipEncoder
from dqtool.models.components.companions import companions_of_source
from dqtool.models.sources.resolve import resolve_model

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("clip") / "clip")


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_stable_diffusion(tmp_path_factory.mktemp("sd") / "sd")


def edited(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda root: edited(root / "config.json", change)


def tokenizer(**entries: Any) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        (root / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": {"type": "BPE"}, **entries}))

    return write


def pickled(root: Path) -> None:
    weights = root / "model.safetensors"
    from safetensors.torch import load_file

    torch.save(dict(load_file(weights)), root / "pytorch_model.bin")
    weights.unlink()


def replaced(name: str, by: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        (root / name).unlink(missing_ok=True)
        by(root / name)

    return change


HOSTILE: dict[str, Callable[[Path], object]] = {
    "a wide network without weights": config(lambda c: c["text_config"].update(hidden_size=1 << 20)),
    "a deep network": config(lambda c: c["text_config"].update(num_hidden_layers=1_000_000)),
    "a huge vocabulary": config(lambda c: c["text_config"].update(vocab_size=10**12)),
    "a huge image": config(lambda c: c["vision_config"].update(image_size=10**9)),
    "no heads": config(lambda c: c["text_config"].update(num_attention_heads=0)),
    "a patch of nothing": config(lambda c: c["vision_config"].update(patch_size=0)),
    "a text for a number": config(lambda c: c["text_config"].update(hidden_size="wide")),
    "code of its own": config(lambda c: c.update(auto_map={"AutoModel": "evil.Model"})),
    "quantized weights": config(lambda c: c.update(quantization_config={"quant_method": "bitsandbytes"})),
    "a downloaded attention": config(lambda c: c.update(_attn_implementation="kernels-community/evil")),
    "a nested downloaded attention": config(lambda c: c["text_config"].update(attn_implementation="a/b")),
    "deep JSON": replaced("config.json", lambda p: p.write_text('{"a":' * 5000 + "1" + "}" * 5000)),
    "a large config": replaced("config.json", lambda p: p.write_text(json.dumps({"a": "x" * (5 << 20)}))),
    "a pickle": pickled,
    "a module": lambda root: (root / "modeling_clip.py").write_text("raise SystemExit"),
    "a pipe": replaced("vocab.json", os.mkfifo),
    "a device": replaced("merges.txt", lambda p: p.symlink_to("/dev/zero")),
    "a link out of it": replaced("config.json", lambda p: p.symlink_to("/etc/hostname")),
    "weights cut short": lambda root: os.truncate(root / "model.safetensors", 500),
    "a deviation of nothing": lambda root: (root / "preprocessor_config.json").write_text('{"image_std": [0, 0, 0]}'),
    "a mean of one channel": lambda root: (root / "preprocessor_config.json").write_text('{"image_mean": [0.5]}'),
}
TOKENS: dict[str, Callable[[Path], object]] = {
    "a regular expression": tokenizer(
        pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"}
    ),
    "a long list": tokenizer(added_tokens=[0] * 3_500_000),
    "code of its own": lambda root: (root / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": "e.T"}}'
    ),
    "a vocabulary of texts": replaced("vocab.json", lambda p: p.write_text('{"a": "b"}')),
    "no JSON": replaced("vocab.json", lambda p: p.write_text("[[[")),
}


@pytest.mark.parametrize("name", [*HOSTILE, *(f"tokenizer: {name}" for name in TOKENS)])
def test_a_clip_directory_is_refused(clip: Path, tmp_path: Path, name: str) -> None:
    root = Path(shutil.copytree(clip, tmp_path / "clip"))
    ({**HOSTILE, **{f"tokenizer: {key}": value for key, value in TOKENS.items()}}[name])(root)

    def read() -> str:
        with pytest.raises(ArtifactError) as caught:
            ClipEncoder(root).texts(["a" * 40 + "b"])
        return str(caught.value)

    said = within(1, read)
    assert len(said) <= 500
    assert said.isprintable()


@pytest.mark.parametrize(
    ("place", "change"),
    [
        ("text_encoder", HOSTILE["a wide network without weights"]),
        ("text_encoder", config(lambda c: c.update(hidden_size=1 << 20, intermediate_size=1 << 20))),
        ("text_encoder", HOSTILE["code of its own"]),
        ("text_encoder", HOSTILE["a downloaded attention"]),
        ("text_encoder", HOSTILE["a module"]),
        ("tokenizer", TOKENS["a regular expression"]),
        ("tokenizer", TOKENS["code of its own"]),
        (".", lambda root: edited(root / "model_index.json", lambda c: c.update(_class_name=["evil", "Pipeline"]))),
        (".", lambda root: edited(root / "model_index.json", lambda c: c.update(_class_name="AutoencoderKL"))),
        (
            ".",
            lambda root: edited(
                root / "model_index.json", lambda c: c.update(text_encoder=["transformers", "TrainingArguments"])
            ),
        ),
    ],
)
def test_the_text_models_of_a_pipeline_are_refused(
    diffusion: Path, tmp_path: Path, place: str, change: Callable[[Path], object]
) -> None:
    root = Path(shutil.copytree(diffusion, tmp_path / "sd"))
    if place == "text_encoder" and change is HOSTILE["a wide network without weights"]:
        change = config(lambda c: c.update(vocab_size=1 << 20, hidden_size=1 << 14))
    change(root / place)
    with pytest.raises(ArtifactError):
        companions = companions_of_source(resolve_model(str(root)))
        assert companions is not None
        with companions.text_pipeline():
            pass


@pytest.mark.parametrize(
    "change",
    [
        config(lambda c: c.update(_class_name="DiffusionPipeline")),
        config(lambda c: c.update(_class_name="os")),
        config(lambda c: c.update(block_out_channels=[1 << 16, 1 << 16])),
        config(lambda c: c.update(layers_per_block=100_000)),
        config(lambda c: c.update(quantization_config={"quant_method": "gguf"})),
    ],
)
def test_a_decoder_is_refused(diffusion: Path, tmp_path: Path, change: Callable[[Path], object]) -> None:
    root = Path(shutil.copytree(diffusion, tmp_path / "sd"))
    change(root / "vae")
    with pytest.raises(ArtifactError):
        companions = companions_of_source(resolve_model(str(root)))
        assert companions is not None
        companions.load("vae")


def test_pickled_text_encoders_are_read_without_running_them(diffusion: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(diffusion, tmp_path / "sd"))
    pickled(root / "text_encoder")
    companions = companions_of_source(resolve_model(str(root)))
    assert companions is not None
    with companions.text_pipeline() as pipeline:
        assert type(pipeline.text_encoder).__name__ == "CLIPTextModel"

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"a": Evil()}, root / "text_encoder" / "pytorch_model.bin")
    companions = companions_of_source(resolve_model(str(root)))
    assert companions is not None
    with pytest.raises(ArtifactError), companions.text_pipeline():
        pass
    assert not (tmp_path / "ran").exists()
