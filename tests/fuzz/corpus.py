"""Genuine small files and values for every reader, and ways to change them at random."""

from __future__ import annotations

import copy
import io
import json
import random
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dqtool.artifacts import Manifest
from dqtool.artifacts.schema import unchecked

__all__ = ["NETWORK", "ODD", "OPTIONS", "SCHEDULER", "bent", "files", "manifest", "packed_file", "twisted", "unpack"]

DATA = Path(__file__).parents[1] / "data"
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 7, 10**6, 10**12, -(10**12), 10**30, 0.5, -0.0, 1e300, float("nan"), float("inf")),
    *("", "x", "\x1b[2J", "a\0b", "é" * 50, "../x", "/x", "x" * 2000, [], [[]], [1, "a"], {}, {"a": {"b": []}}),
)
NETWORK = {
    **{"_class_name": "UNet2DModel", "sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1},
    **{"block_out_channels": [8, 16], "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "norm_num_groups": 4},
    **{"up_block_types": ["AttnUpBlock2D", "UpBlock2D"], "attention_head_dim": 8, "norm_eps": 1e-5, "act_fn": "silu"},
}
SCHEDULER = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4}
RECIPE = b"model: tiny\nstages:\n  dilate: {scaling: wd}\n  calibrate:\n    steps: 4\n    samples: 100\n"
OPTIONS = {"dilate": {"scaling": str}, "calibrate": {"steps": int, "samples": int, "eta": float, "metrics": list}}
INDEX = {"metadata": {"total_size": 8}, "weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}
TEXT_MODEL = {
    **{"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "torch_dtype": "float32"},
    **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 54},
}
TOKENIZER = {
    "version": "1.0",
    "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "'s|[a-z]+|[0-9]"}, "behavior": "Isolated"},
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
}
PIPELINE = {
    "_class_name": "DDIMPipeline",
    "_diffusers_version": "0.30",
    **{"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDIMScheduler"]},
}


def manifest() -> dict[str, Any]:
    """Return a genuine manifest of a small distilled artifact."""
    layer = {"name": "a", "kind": "linear", "shape": [2, 3], "macs": 6, "bits": [4, 4], "dilated": False}
    made = {
        "stage": "distill",
        "fingerprint": "0" * 64,
        "inputs": [{"name": "b", "sha256": "0" * 64, "stage": "calibrate"}],
        "model": {"class": "UNet2DModel", "config": NETWORK, "family": "unet2d", "source": "tiny"},
        "pipeline": {"scheduler": SCHEDULER, "sampling": {"scheduler": SCHEDULER, "steps": 4, "eta": 0.0}},
        "layers": [layer],
        "metrics": {"blocks": [{"name": "a", "reads": []}], "output_reads": ["a"]},
        "file": {"name": "c.safetensors", "bytes": 8, "sha256": "0" * 64},
    }
    return json.loads(unchecked(made, Manifest).to_json())


def packed_file(tensors: dict[str, tuple[str, list[int], bytes]], metadata: dict[str, str] | None = None) -> bytes:
    """Return a safetensors file of name -> (type, shape, bytes), which need not fit together."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name, (kind, shape, data) in tensors.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(data for *_, data in tensors.values())


def unpack(folder: Path) -> Path:
    """Unpack the artifacts of 0.1.0, a whole chain on a tiny model, and return their directory."""
    with tarfile.open(DATA / "artifacts-0.1.0.tar.xz") as archive:
        archive.extractall(folder / "chain")  # an archive of ours; Python before 3.11.4 knows no filter
    return folder / "chain"


def files() -> dict[str, bytes]:
    """Return a genuine small file for each reader of bytes."""
    archive, pickled, old, npz, head = (io.BytesIO() for _ in range(5))
    np.savez(archive, mu=np.zeros(4), arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    torch.save({"state_dict": {"a.weight": torch.ones(2, 2)}}, pickled)
    torch.save({"state_dict": {"a.weight": torch.ones(2, 2)}}, old, _use_new_zipfile_serialization=False)
    torch.save({"weight": torch.ones(1, 4), "bias": torch.ones(1)}, head)
    np.savez(npz, class_labels=np.arange(3))
    pictures = {}
    for kind in ("PNG", "JPEG", "TIFF", "WEBP", "BMP"):
        stream = io.BytesIO()
        Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(stream, kind)
        pictures[f"image {kind}"] = stream.getvalue()
    field = lambda number, content: bytes([number << 3 | 2, len(content)]) + content  # noqa: E731
    tensor = b"\x08\x01" + field(2, field(2, b"\x08\x01")) + field(5, bytes(4))
    node = field(1, b"a") + field(2, b"Const") + field(5, field(1, b"value") + field(2, field(8, tensor)))
    lora = {
        "unet.conv_in.lora_A.weight": ("F32", [2, 1, 3, 3], bytes(72)),
        "unet.conv_in.lora_B.weight": ("F32", [8, 2, 1, 1], bytes(64)),
    }
    settings = json.dumps({"unet.lora_alpha": 2, "unet.alpha_pattern": {"conv_.*": 4}})
    return {
        "safetensors": packed_file({"a": ("F32", [2, 2], bytes(16)), "b": ("I8", [3], bytes(3))}),
        "manifest": json.dumps(manifest()).encode(),
        "config": json.dumps(NETWORK).encode(),
        "recipe": RECIPE,
        "yaml": RECIPE,
        "table": (DATA.parents[1] / "recipes" / "tables" / "bits.yaml").read_bytes(),
        "prompts.txt": b"a cat\na dog\n",
        "prompts.csv": b'id,prompt\n1,"a cat"\n',
        "prompts.json": b'{"annotations": [{"id": 1, "image_id": 2, "caption": "a cat"}]}',
        "npz": archive.getvalue(),
        "checkpoint": pickled.getvalue(),
        "old checkpoint": old.getvalue(),
        "aesthetic head": head.getvalue(),
        "Inception weights": pickled.getvalue(),
        "graph": field(1, node),
        "LoRA": packed_file(lora, {"lora_adapter_metadata": settings}),
        "conditions.safetensors": packed_file({"class_labels": ("I64", [3], bytes(24))}),
        "conditions.npz": npz.getvalue(),
        "config of a text model": json.dumps(TEXT_MODEL).encode(),
        "tokenizer": json.dumps(TOKENIZER).encode(),
        "index of shards": json.dumps(INDEX).encode(),
        "index of a pipeline": json.dumps(PIPELINE).encode(),
        **pictures,
    }


def bent(data: bytes, draw: random.Random) -> bytes:
    """Return bytes that were flipped, cut, doubled or overwritten at a few places."""
    made = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4, 8))):
        place = draw.randrange(len(made) + 1)
        kind = draw.randrange(6)
        if kind == 0 and place < len(made):
            made[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del made[place : place + draw.choice((1, 2, 8, 64))]
        elif kind == 2:
            made[place:place] = made[place : place + draw.choice((1, 8, 64))] * draw.choice((1, 2, 50))
        elif kind == 3:
            made[place : place + 8] = draw.choice((b"\xff" * 8, bytes(8), draw.randbytes(8), b"9" * 400))
        elif kind == 4:
            made[place:place] = draw.choice(
                (b"[", b"{", b'"', b"*a", b"&a", b"!!int ''", b"1e999", b"NaN", b"../", b"[" * 3000)
            )
        elif made:
            made = made[:place]
    return bytes(made)


def twisted(value: Any, draw: random.Random) -> Any:
    """Return a copy of a JSON value in which some part is something else."""
    made = json.loads(json.dumps(value))
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        holder = made
        while True:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not keys:
                break
            key = draw.choice(keys)
            if isinstance(holder[key], dict | list) and draw.random() < 0.8:
                holder = holder[key]
                continue
            if draw.random() < 0.1:
                del holder[key]
            else:
                holder[key] = copy.deepcopy(draw.choice(ODD))
            break
    return made
