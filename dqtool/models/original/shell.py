"""What an original checkpoint holds beside the network (the first stage, the class embedding), as a diffusers pipeline
directory without the network.

Written once, under `$DQTOOL_CACHE` (default `~/.cache/dqtool`), for `ModelSource.pipeline` to point at; the network
itself is always read from the checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqtool.artifacts.files import content_digest, os_fault
from dqtool.errors import ArtifactError
from dqtool.models.original.checkpoint import read_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["has_first_stage", "pipeline_shell"]

FIRST_STAGE = "first_stage_model."
CLASSES = "cond_stage_model.embedding.weight"
_CODES = "quantize.embedding.weight"
_VERSION = 1


def has_first_stage(names: Mapping[str, Any], class_name: str) -> bool:
    """Whether a pipeline can be made of a checkpoint with these tensors: one that decodes, and whose condition, if any,
    is a class."""
    decodes = f"{FIRST_STAGE}decoder.conv_out.weight" in names
    return decodes and (class_name == "UNet2DModel" or CLASSES in names)


def pipeline_shell(path: Path, class_name: str, scheduler: Mapping[str, Any]) -> Path:
    """The pipeline directory of the checkpoint at `path`, whose network is a `class_name`.

    Raises:
        ArtifactError: the first stage is none that diffusers has an equal of.
        EnvironmentFault: the cache can't be written.
    """
    root = Path(os.environ.get("DQTOOL_CACHE") or Path.home() / ".cache" / "dqtool") / "originals"
    schedule = content_digest_of(scheduler)
    target = root / f"{content_digest(path)[:32]}-{schedule}-{_VERSION}"
    if (target / "model_index.json").is_file():
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        area = Path(tempfile.mkdtemp(dir=root, prefix=".new-"))
    except OSError as error:
        raise os_fault(error, root) from error
    try:
        _write(area, path, class_name, scheduler)
        try:
            os.rename(area, target)
        except OSError:  # another process was faster
            if not (target / "model_index.json").is_file():
                raise
    except OSError as error:
        raise os_fault(error, target) from error
    finally:
        shutil.rmtree(area, ignore_errors=True)
    return target


def content_digest_of(value: Mapping[str, Any]) -> str:
    """A short digest of a JSON value."""
    import hashlib

    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _write(area: Path, path: Path, class_name: str, scheduler: Mapping[str, Any]) -> None:
    import torch

    state = read_checkpoint(path)
    by_class = CLASSES in state
    decoder = "vae" if by_class else "vqvae"  # as LatentClassPipeline and diffusers' LDMPipeline name theirs
    first_stage = {k.removeprefix(FIRST_STAGE): v for k, v in state.items() if k.startswith(FIRST_STAGE)}
    scale = float(state["scale_factor"]) if "scale_factor" in state else 1.0
    vae = _first_stage(first_stage, scale, str(path))
    vae.save_pretrained(area / decoder)
    index: dict[str, Any] = {
        "_class_name": "LatentClassPipeline" if by_class else "LDMPipeline",
        "unet": ["diffusers", class_name],
        decoder: ["diffusers", type(vae).__name__],
        "scheduler": ["diffusers", scheduler["_class_name"]],
    }
    if by_class:
        from dqtool.models.latent_class import ClassEmbedder

        rows = state[CLASSES]
        embedder = ClassEmbedder(classes=rows.shape[0] - 1, dim=rows.shape[1])  # the last row is no class
        embedder.load_state_dict({"embedding.weight": rows.to(torch.float32)})
        embedder.save_pretrained(area / "class_embedder")
        index["class_embedder"] = ["dqtool.models.latent_class", "ClassEmbedder"]
    (area / "scheduler").mkdir()
    (area / "scheduler" / "scheduler_config.json").write_text(json.dumps(dict(scheduler), indent=2) + "\n")
    (area / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def _first_stage(state: Mapping[str, Tensor], scale: float, where: str) -> Any:
    """The autoencoder (`AutoencoderKL`, or `VQModel` where it has codes), through diffusers' converter."""
    import diffusers
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    levels = len({name.split(".")[2] for name in state if name.startswith("encoder.down.")})
    firsts = [f"encoder.down.{level}.block.0.conv1.weight" for level in range(levels)]
    attends = any(name.startswith("encoder.down.") and ".attn." in name for name in state)
    if not levels or attends or "encoder.mid.attn_1.norm.weight" not in state:
        raise ArtifactError(
            "dqtool reads first stages that attend in the middle only", where=f"{where}, {FIRST_STAGE}*"
        )
    config: dict[str, Any] = {
        "in_channels": state["encoder.conv_in.weight"].shape[1],
        "out_channels": state["decoder.conv_out.weight"].shape[0],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": [state[name].shape[0] for name in firsts],
        "layers_per_block": len({n.split(".")[4] for n in state if n.startswith("encoder.down.0.block.")}),
        "latent_channels": state["decoder.conv_in.weight"].shape[1],
        "norm_num_groups": 32,
        "scaling_factor": scale,
    }
    converted = convert_ldm_vae_checkpoint(dict(state), config)
    vae: Any
    if _CODES in state:
        codes, width = state[_CODES].shape
        vae = diffusers.VQModel(**config, num_vq_embeddings=codes, vq_embed_dim=width)
        converted[_CODES] = state[_CODES]
    else:
        vae = diffusers.AutoencoderKL(**config)
    try:
        vae.load_state_dict({name: tensor.float() for name, tensor in converted.items()}, strict=True)
    except RuntimeError as error:
        raise ArtifactError(f"diffusers has no equal of this first stage: {error}", where=where) from error
    return vae.eval()
