"""Fuzz every parser in process, by corpus and by structure, and count what must never happen.

    python tests/fuzz/driver.py --inputs 100000 --seed 0 -o recipes/results/fuzz

writes FILE.json and FILE.md. An input is a genuine file changed at random, or a value of the right form with wrong parts.
Whatever a parser raises must be a `DqtoolError` (code 2 to 5), within a second.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dqtool.artifacts import Manifest, read_header
from dqtool.artifacts.header import file_header
from dqtool.artifacts.manifest import canonical_json
from dqtool.artifacts.reading import load_json
from dqtool.artifacts.records import records_of
from dqtool.errors import ArtifactError, DqtoolError
from dqtool.metrics.batches import NpzImages, npz_arrays, npz_names
from dqtool.metrics.graphdef import graph_constants
from dqtool.metrics.prompts import read_prompts
from dqtool.models.families import FAMILIES
from dqtool.models.sampling.sampler import Sampler, make_sampler
from dqtool.models.sources.original.checkpoint import read_entries
from dqtool.models.sources.patterns import Patterns
from dqtool.models.sources.reading import read_yaml
from dqtool.recipe import load_recipe

SECONDS, MEGABYTES = 1.0, 200
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 7, 10**6, 10**12, -(10**12), 10**30, 0.5, -0.0, 1e300, float("nan"), float("inf")),
    *("", "x", "\x1b[2J", "a\0b", "é" * 50, "../x", "x" * 2000, [], [[]], [1, "a"], {}, {"a": {"b": []}}),
)
NETWORK = {
    **{"_class_name": "UNet2DModel", "sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1},
    **{"block_out_channels": [8, 16], "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "norm_num_groups": 4},
    **{"up_block_types": ["AttnUpBlock2D", "UpBlock2D"], "attention_head_dim": 8, "norm_eps": 1e-5, "act_fn": "silu"},
}
SCHEDULER = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4}
RECIPE = b"model: tiny\nstages:\n  dilate: {scaling: wd}\n  calibrate:\n    steps: 4\n    samples: 100\n"
OPTIONS = {"dilate": {"scaling": str}, "calibrate": {"steps": int, "samples": int, "eta": float, "metrics": list}}


def manifest() -> dict[str, Any]:
    """A genuine manifest of a small distilled artifact."""
    layer = {"name": "a", "kind": "linear", "shape": [2, 3], "macs": 6, "bits": [4, 4], "dilated": False}
    made = Manifest(
        stage="distill",
        fingerprint="0" * 64,
        inputs=[{"name": "b", "sha256": "0" * 64, "stage": "calibrate"}],
        model={"class": "UNet2DModel", "config": NETWORK, "family": "unet2d", "source": "tiny"},
        pipeline={"scheduler": SCHEDULER, "sampling": {"scheduler": SCHEDULER, "steps": 4, "eta": 0.0}},
        layers=[layer],
        metrics={"blocks": [{"name": "a", "reads": []}], "output_reads": ["a"]},
        file={"name": "c.safetensors", "bytes": 8, "sha256": "0" * 64},
    )
    return json.loads(made.to_json())


def corpus() -> dict[str, bytes]:
    """Return a genuine small file for each parser of bytes."""
    archive, pickled = io.BytesIO(), io.BytesIO()
    np.savez(archive, mu=np.zeros(4), arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    torch.save({"state_dict": {"a.weight": torch.ones(2, 2)}}, pickled)
    field = lambda number, content: bytes([number << 3 | 2, len(content)]) + content  # noqa: E731
    tensor = b"\x08\x01" + field(2, field(2, b"\x08\x01")) + field(5, bytes(4))
    node = field(1, b"a") + field(2, b"Const") + field(5, field(1, b"value") + field(2, field(8, tensor)))
    return {
        "safetensors": file_header({"a": ("F32", [2, 2]), "b": ("I8", [3])})[0] + bytes(19),
        "manifest": json.dumps(manifest()).encode(),
        "config": json.dumps(NETWORK).encode(),
        "recipe": RECIPE,
        "yaml": RECIPE,
        "prompts.txt": b"a cat\na dog\n",
        "prompts.csv": b'id,prompt\n1,"a cat"\n',
        "prompts.json": b'{"annotations": [{"id": 1, "image_id": 2, "caption": "a cat"}]}',
        "npz": archive.getvalue(),
        "checkpoint": pickled.getvalue(),
        "graph": field(1, node),
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
                (b"[", b"{", b'"', b"*a", b"&a", b"!!int ''", b"1e999", b"NaN", b"[" * 3000)
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
                holder[key] = draw.choice(ODD)
            break
    return made


def by_bytes(folder: Path) -> dict[str, Callable[[bytes], object]]:
    """Return the parser of each kind of file."""

    def file(name: str, parser: Callable[[Path], object]) -> Callable[[bytes], object]:
        def parse(data: bytes) -> object:
            (folder / name).write_bytes(data)
            return parser(folder / name)

        return parse

    def arrays(path: Path) -> None:
        names = npz_names(path)
        npz_arrays(path, [name for name in names if name != "arr_0"])
        list(NpzImages(path).read(2))

    def graph(data: bytes) -> None:
        try:
            graph_constants(data)
        except ValueError as error:  # the reader of weights says it
            raise ArtifactError(str(error)) from error

    return {
        "safetensors": file("a.safetensors", read_header),
        "manifest": lambda data: records_of(Manifest.from_json(data, "here"), "here", whole=True),
        "config": file("a.json", load_json),
        "recipe": file("r.yaml", lambda path: load_recipe(path, [], OPTIONS)),
        "yaml": file("y.yaml", read_yaml),
        **{name: file(name, read_prompts) for name in ("prompts.txt", "prompts.csv", "prompts.json")},
        "npz": file("a.npz", arrays),
        "checkpoint": file("a.ckpt", read_entries),
        "graph": graph,
    }


def by_structure() -> dict[str, Callable[[random.Random], object]]:
    """Return checks of values that have the right form and wrong parts."""
    family, genuine = FAMILIES["UNet2DModel"], manifest()

    def signed(draw: random.Random) -> object:
        content = twisted({k: v for k, v in genuine.items() if k != "checksum"}, draw)
        try:
            content["checksum"] = hashlib.sha256(canonical_json(content).encode()).hexdigest()
        except ValueError:  # NaN, which no checksum is of
            content["checksum"] = "0" * 64
        return records_of(Manifest.from_json(json.dumps(content), "here"), "here", whole=True)

    def network(draw: random.Random) -> object:
        with torch.device("meta"):
            return family.build(twisted(NETWORK, draw))

    def scheduler(draw: random.Random) -> object:
        name = draw.choice(("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"))
        return Sampler(family, make_sampler(twisted({**SCHEDULER, "_class_name": name}, draw)), 4).timesteps()

    def pattern(draw: random.Random) -> object:
        text = "".join(draw.choice(list("ab.*+?()[]{}|^$\\d0,2-")) for _ in range(draw.randrange(30)))
        try:
            return Patterns([text]).first("a.b" * draw.randrange(40))
        except ValueError as error:
            raise ArtifactError(str(error)) from error

    return {
        "signed manifest": signed,
        "network config": network,
        "scheduler config": scheduler,
        "LoRA pattern": pattern,
    }


def fuzz(inputs: int, seed: int, folder: Path) -> dict[str, Any]:
    """Run that many inputs, as many for each parser, and return the counts."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    genuine, parsers, structures = corpus(), by_bytes(folder), by_structure()
    kinds = [*parsers, *structures]
    counts = {kind: Counter[str]() for kind in kinds}
    slowest, failures = dict.fromkeys(kinds, 0.0), []
    for name, parser in parsers.items():
        parser(genuine[name])  # warm, and right
    FAMILIES["UNet2DModel"].build(NETWORK)
    make_sampler(SCHEDULER)
    expected = set(folder.iterdir())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(inputs):
        kind = kinds[number % len(kinds)]
        draw = random.Random(f"{seed}-{number}")
        data = bent(genuine[kind], draw) if kind in parsers else b""
        start = time.perf_counter()
        try:
            parsers[kind](data) if kind in parsers else structures[kind](draw)
            outcome = "read"
        except DqtoolError as error:
            outcome = f"code {error.exit_code}"
            if error.exit_code == 1 or len(str(error)) > 500 or not str(error).isprintable():
                failures.append({"kind": kind, "number": number, "what": repr(error)[:300]})
        except Exception as error:
            outcome = "traceback"
            failures.append({"kind": kind, "number": number, "what": repr(error)[:300]})
        seconds = time.perf_counter() - start
        slowest[kind] = max(slowest[kind], seconds)
        counts[kind][outcome] += 1
        counts[kind]["over time"] += seconds > SECONDS
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    total = sum(counts.values(), Counter())
    return {
        "inputs": inputs,
        "seed": seed,
        "tracebacks": total["traceback"],
        "code 1": total["code 1"],
        "over time": total["over time"],
        "megabytes grown": round(grown, 1),
        "files outside": len(set(folder.iterdir()) - expected),
        "failures": failures[:50],
        "kinds": {kind: {**counts[kind], "slowest ms": round(1000 * slowest[kind], 1)} for kind in kinds},
    }


def rendered(found: dict[str, Any], command: str) -> str:
    """Return the counts as Markdown."""
    heads = ("read", "code 2", "code 3", "code 4", "code 5", "traceback", "over time", "slowest ms")
    lines = [
        "# Fuzzing",
        "",
        f"`{command}`: {found['inputs']:,} inputs, {found['tracebacks']} tracebacks, {found['code 1']} of code 1, "
        f"{found['over time']} over {SECONDS:g} s, {found['files outside']} files outside, peak memory grown by "
        f"{found['megabytes grown']:g} MB.",
        "",
        "| parser | " + " | ".join(heads) + " |",
        "| --- |" + " ---: |" * len(heads),
    ]
    lines += [f"| {k} | " + " | ".join(str(v.get(head, 0)) for head in heads) + " |" for k, v in found["kinds"].items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the command line; returns 1 where something happened that must not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", help="name of the report, without its ending")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = fuzz(given.inputs, given.seed, Path(folder))
    command = f"python tests/fuzz/driver.py --inputs {given.inputs} --seed {given.seed}"
    text = rendered(found, command)
    if given.output:
        Path(f"{given.output}.md").write_text(text)
        Path(f"{given.output}.json").write_text(json.dumps({"command": command, **found}, indent=1) + "\n")
    print(text)
    for failure in found["failures"][:20]:
        print(failure, file=sys.stderr)
    bad = found["tracebacks"] + found["code 1"] + found["over time"] + found["files outside"]
    return int(bad > 0 or found["megabytes grown"] > MEGABYTES)


if __name__ == "__main__":
    sys.exit(main())
