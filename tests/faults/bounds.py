"""Hostile files for every reader, each read in a process of its own whose processor time and peak memory are measured.

    python tests/faults/bounds.py FOLDER

prints a JSON object {name: [answer, CPU seconds, megabytes grown, bytes of the file]}; the answer is an exit code of dqtool's,
or the exception that got through.
"""

from __future__ import annotations

import io
import json
import os
import resource
import struct
import sys
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import PIL.BmpImagePlugin
import PIL.PngImagePlugin  # noqa: F401  (before the forks)
import torch

from dqtool.artifacts import Manifest, open_artifact, read_header
from dqtool.artifacts.library_files import check_library_directory
from dqtool.artifacts.npz import npz_arrays, npz_names
from dqtool.artifacts.reading import load_json
from dqtool.artifacts.tensorfile import load_tensors
from dqtool.artifacts.torch_files import weights_content
from dqtool.errors import ArtifactError, DqtoolError
from dqtool.metrics.aesthetic import load_aesthetic_head
from dqtool.metrics.batches import ImageFolder, NpzImages
from dqtool.metrics.graphdef import graph_constants
from dqtool.metrics.prompts import read_prompts
from dqtool.models.families import FAMILIES
from dqtool.models.sampling.sampler import make_sampler
from dqtool.models.sources.lora import fuse_loras
from dqtool.models.sources.lora_files import LoraFile
from dqtool.models.sources.original.checkpoint import read_checkpoint
from dqtool.models.sources.reading import read_yaml
from dqtool.page.results import find_results
from dqtool.recipe import load_recipe
from dqtool.tables.spec import load_table

Reader = Callable[[Path], object]


def inflating(name: str, size: int = 2 << 30, head: bytes = b"", method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Return a zip archive whose one member inflates to `size` zeros after `head`, in a thousandth of that."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    first = deflate.compress(head) + deflate.flush(zlib.Z_FULL_FLUSH)
    block = deflate.compress(bytes(1 << 20)) + deflate.flush(zlib.Z_FULL_FLUSH)
    data = first + block * (size >> 20) + deflate.flush()
    sizes = struct.pack("<III", 0, len(data), (size + len(head)) & 0xFFFFFFFF)
    text = name.encode()
    local = b"PK\3\4" + struct.pack("<HHHHH", 20, 0, method, 0, 0) + sizes + struct.pack("<HH", len(text), 0) + text
    entry = b"PK\1\2" + struct.pack("<HHHHHH", 20, 20, 0, method, 0, 0) + sizes
    entry += struct.pack("<HHHHHII", len(text), 0, 0, 0, 0, 0, 0) + text
    end = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(entry), len(local) + len(data), 0)
    return local + data + entry + end


def header(entries: object) -> bytes:
    """Return a safetensors file of a header alone."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


def npy(shape: str) -> bytes:
    """Return the start of an array file."""
    text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}}}".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text


def stored(name: str, content: bytes) -> bytes:
    """Return a zip archive of one member as it is."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(name, content)
    return stream.getvalue()


def field(number: int, content: bytes) -> bytes:
    """Return a protobuf field of bytes."""
    length, size = len(content), b""
    while length > 127:
        size, length = size + bytes([length & 127 | 128]), length >> 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + content


def png(side: int) -> bytes:
    """Return a PNG whose header says `side` x `side` pixels, of which few are there."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(10_000))) + chunk(b"IEND", b"")
    )


def picture(path: Path) -> object:
    """Read the one image beside `path`."""
    return list(ImageFolder(path.parent).read(1))


def arrays(path: Path) -> object:
    """Read an npz file as images and as tables."""
    npz_arrays(path, npz_names(path))
    return list(NpzImages(path).read(1))


def lora(path: Path) -> object:
    """Add a LoRA to a network of one layer."""
    source: Any = SimpleNamespace(loras=[LoraFile(path)], class_name="UNet2DModel", config=NETWORK)
    return fuse_loras({"conv_in.weight": torch.zeros(8, 1, 3, 3), "conv_in.bias": torch.zeros(8)}, source)


def config(path: Path) -> object:
    """Build the network of a config without weights."""
    with torch.device("meta"):
        return FAMILIES["UNet2DModel"].build(load_json(path))


def graph(path: Path) -> object:
    """Read the constants of a graph."""
    try:
        return graph_constants(path.read_bytes())
    except ValueError as error:
        raise ArtifactError(str(error)) from error


def weights(path: Path) -> object:
    """Read a file of Inception weights."""
    try:
        return weights_content(path)
    except ValueError as error:
        raise ArtifactError(str(error)) from error


NETWORK: dict[str, Any] = {
    **{"_class_name": "UNet2DModel", "sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1},
    **{"block_out_channels": [8, 16], "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "norm_num_groups": 4},
    **{"up_block_types": ["AttnUpBlock2D", "UpBlock2D"], "attention_head_dim": 8},
}
SCHEDULER: dict[str, Any] = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000}
READERS: dict[str, tuple[str, Reader]] = {
    "safetensors": ("a.safetensors", lambda path: load_tensors(path)),
    "header": ("a.safetensors", read_header),
    "json": ("a.json", load_json),
    "manifest": ("a.json", lambda path: Manifest.from_json(path.read_bytes(), str(path))),
    "recipe": ("r.yaml", lambda path: load_recipe(path, [], {"dilate": {"scaling": str}})),
    "yaml": ("y.yaml", read_yaml),
    "table": ("t.yaml", load_table),
    "prompts": ("p.txt", read_prompts),
    "table of prompts": ("p.csv", read_prompts),
    "captions": ("p.json", read_prompts),
    "npz": ("a.npz", arrays),
    "checkpoint": ("a.ckpt", read_checkpoint),
    "Inception weights": ("i.pt", weights),
    "aesthetic head": ("h.pth", lambda path: load_aesthetic_head(path, 4)),
    "graph": ("g.pb", graph),
    "LoRA": ("l.safetensors", lora),
    "config": ("config.json", config),
    "scheduler": ("scheduler_config.json", lambda path: make_sampler(load_json(path))),
    "image": ("images/a.png", picture),
    "text model": ("text/config.json", lambda path: check_library_directory(path.parent, "here")),
    "tokenizer": ("tokens/tokenizer.json", lambda path: check_library_directory(path.parent, "here")),
    "artifact": ("x.safetensors", open_artifact),
    "results": ("eval.json", lambda path: find_results([str(path)])),
}
DEEP = "[" * 100_000
LORA = {"conv_in.lora_A.weight": ("F32", [2, 1, 3, 3], 72), "conv_in.lora_B.weight": ("F32", [8, 2, 1, 1], 64)}


def with_pattern(pattern: str) -> bytes:
    """Return a LoRA whose metadata has this regular expression."""
    entries: dict[str, Any] = {
        "__metadata__": {"lora_adapter_metadata": json.dumps({"unet.alpha_pattern": {pattern: 4}})}
    }
    end = 0
    for name, (kind, shape, size) in LORA.items():
        entries[f"unet.{name}"] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    return header(entries) + bytes(end)


PAYLOADS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "a pickle of 4 MB that inflates": ("checkpoint", lambda: inflating("a/data.pkl", 2 << 30)),
    "weights of 2 MB that inflate": ("Inception weights", lambda: inflating("a/data.pkl")),
    "a head that inflates": ("aesthetic head", lambda: inflating("a/data.pkl")),
    "a pickle of 4 MB of instructions": (
        "checkpoint",
        lambda: stored("a/data.pkl", b"\x80\2" + b"]" * (4 << 20) + b"."),
    ),
    "an old pickle of instructions": ("checkpoint", lambda: b"\x80\2" + b"(" * (4 << 20)),
    "a pickle of memos": ("Inception weights", lambda: stored("a/data.pkl", b"\x80\2]" + b"q\0h\0" * (1 << 20) + b".")),
    "a million tensors": (
        "header",
        lambda: header({f"t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(200_000)}),
    ),
    "a shape of 100,000 numbers": (
        "header",
        lambda: header({"a": {"dtype": "F32", "shape": [1] * 100_000, "data_offsets": [0, 4]}}),
    ),
    "numbers of 4,000 digits": (
        "header",
        lambda: header(b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,4]}}' % (b"9" * 4_000)),
    ),
    "a header of 100 MB": ("safetensors", lambda: (100 << 20).to_bytes(8, "little") + b"{"),
    "deep JSON": ("json", lambda: DEEP.encode()),
    "JSON of many values": ("manifest", lambda: b"[" + b"0," * (8 << 20) + b"0]"),
    "JSON of escapes": ("json", lambda: b'{"a":"' + b"\\u0000" * 600_000 + b'"'),
    "YAML of 10 MB": ("recipe", lambda: b"model: " + b"x" * (10 << 20)),
    "YAML that repeats itself": (
        "recipe",
        lambda: ("a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{f'*a{n - 1},' * 10}]\n" for n in range(1, 12))).encode(),
    ),
    "YAML of merges": (
        "yaml",
        lambda: (
            "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{f'*a{n - 1},' * 10}]}}\n" for n in range(1, 12))
        ).encode(),
    ),
    "YAML of keys within keys": ("table", lambda: b"? " * 20_000 + b"a"),
    "deep YAML": ("table", lambda: DEEP[:20_000].encode()),
    "prompts without end": ("prompts", lambda: b"a\n" * 20_000_000),
    "rows without end": ("table of prompts", lambda: b"prompt\n" + b"a\n" * 3_000_000),
    "a row without end": ("table of prompts", lambda: b'prompt\n"' + b'""' * 10_000_000),
    "captions without end": ("captions", lambda: b'{"annotations": [' + b"{}," * 8_000_000 + b"{}]}"),
    "arrays that inflate": ("npz", lambda: inflating("mu.npy", 2 << 30, npy("(268435456,)"))),
    "a header of an array that inflates": (
        "npz",
        lambda: inflating("mu.npy", 2 << 30, b"\x93NUMPY\2\0" + struct.pack("<I", 2 << 30)),
    ),
    "images that inflate": ("npz", lambda: inflating("arr_0.npy", 2 << 30, npy("(1, 40000, 20000, 3)"))),
    "a graph of 500,000,000 values": (
        "graph",
        lambda: field(
            1,
            field(1, b"a")
            + field(2, b"Const")
            + field(
                5,
                field(1, b"value")
                + field(
                    2,
                    field(8, b"\x08\1" + field(2, field(2, b"\x08\x80\xca\xb5\xee\1")) + field(5, bytes(4))),
                ),
            ),
        ),
    ),
    "a graph of empty fields": ("graph", lambda: field(1, b"") * 2_000_000),
    "a pattern that backtracks": ("LoRA", lambda: with_pattern("(a+)+(a+)+(a+)+$")),
    "a pattern of repeats": ("LoRA", lambda: with_pattern("((a{0,1000}){0,1000}){0,1000}")),
    "two thousand layers a block": ("config", lambda: json.dumps({**NETWORK, "layers_per_block": 2_000}).encode()),
    "a million layers a block": ("config", lambda: json.dumps({**NETWORK, "layers_per_block": 1_000_000}).encode()),
    "wide channels": ("config", lambda: json.dumps({**NETWORK, "block_out_channels": [1 << 40, 8]}).encode()),
    "ten billion steps": ("scheduler", lambda: json.dumps({**SCHEDULER, "num_train_timesteps": 10**10}).encode()),
    "a scheduler that is a network": ("scheduler", lambda: b'{"_class_name": "UNet2DConditionModel"}'),
    "a bomb of pixels": ("image", lambda: png(30_000)),
    "more pixels than bytes": ("image", lambda: png(6_000)),
    "an attention to download": ("text model", lambda: b'{"_attn_implementation": "kernels-community/x"}'),
    "tokens without end": ("tokenizer", lambda: b'{"a": [' + b"0," * 8_000_000 + b"0]}"),
    "a regular expression of a tokenizer": ("tokenizer", lambda: b'{"Regex": "(a+)+$"}'),
    "an artifact that is a list": ("artifact", lambda: header({})),
    "results of NaN": ("results", lambda: b'{"format": "dqtool/1", "stage": "eval", "metrics": {"a": NaN}}'),
}
AT_ONCE = 0.5  # seconds below which a run is not repeated
SPECIAL = ("a device", "a pipe", "a link to a device", "a directory")


def tried(read: Reader, path: Path) -> list[Any]:
    """Read in this process; return the answer, CPU seconds and megabytes grown."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        read(path)
        said = "accepted"
    except DqtoolError as error:
        said = f"code {error.exit_code}" if len(str(error)) <= 500 and str(error).isprintable() else f"said {error!r}"
    except BaseException as error:
        said = repr(error)[:300]
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return [said, round(time.process_time() - start, 3), round(grown, 1)]


def measured(read: Reader, path: Path, tries: int = 3) -> list[Any]:
    """Do the same in a fork of this process, whose peak of memory is its own, and again where it is slow.

    Busy machines make single runs several times slower, also in processor time: the fastest run counts.
    """
    found = []
    for _ in range(tries):
        found.append(in_fork(read, path))
        if found[-1][1] < AT_ONCE:
            break
    return min(found, key=lambda answer: answer[1])


def in_fork(read: Reader, path: Path) -> list[Any]:
    """Read in a fork of this process and return its answer."""
    answer, done = os.pipe()
    child = os.fork()
    if not child:
        os.write(done, json.dumps(tried(read, path)).encode())
        os._exit(0)
    os.close(done)
    with os.fdopen(answer) as stream:
        found = stream.read()
    os.waitpid(child, 0)
    return json.loads(found) if found else ["killed", 0, 0]


def main(folder: Path) -> None:
    """Measure everything and print what was found."""
    torch.set_num_threads(1)
    with torch.device("meta"):
        FAMILIES["UNet2DModel"].build(NETWORK)  # imports
    make_sampler(SCHEDULER)
    assert diffusers.UNet2DConditionModel
    assert np.zeros(1).size
    found = {}
    for name, (reader, make) in PAYLOADS.items():
        place, read = READERS[reader]
        path = folder / "payload" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make())
        found[name] = [*measured(read, path), path.stat().st_size]
        path.unlink()
    for kind in SPECIAL:
        for reader, (place, read) in READERS.items():
            if reader in (
                "image",
                "graph",
                "manifest",
            ):  # the one looks for images in a directory, the others take bytes
                continue
            if kind == "a directory" and reader in ("text model", "tokenizer"):  # where folders do not count
                continue
            path = folder / kind / reader / place
            path.parent.mkdir(parents=True)
            if kind == "a pipe":
                os.mkfifo(path)
            elif kind == "a directory":
                path.mkdir()
            else:
                path.symlink_to("/dev/zero" if kind == "a device" else "zero")
                (path.parent / "zero").symlink_to("/dev/zero")
            found[f"{kind}: {reader}"] = [*tried(read, path), 0]
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
