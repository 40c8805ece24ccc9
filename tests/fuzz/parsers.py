"""Every reader of files: by bytes, by values of the right form with wrong parts, and the command line itself."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from corpus import INDEX, NETWORK, ODD, OPTIONS, PIPELINE, RECIPE, SCHEDULER, bent, manifest, packed_file, twisted
from safetensors.torch import load_file

from dqtool import __main__ as command_line
from dqtool.artifacts import Manifest, open_artifact, read_header
from dqtool.artifacts.completeness import check_complete
from dqtool.artifacts.library_files import check_library_directory
from dqtool.artifacts.manifest import canonical_json
from dqtool.artifacts.names import path_within
from dqtool.artifacts.npz import npz_arrays, npz_names
from dqtool.artifacts.reading import load_json
from dqtool.artifacts.records import LayerRecord
from dqtool.artifacts.schema import unchecked
from dqtool.artifacts.torch_files import weights_content
from dqtool.errors import ArtifactError
from dqtool.metrics.aesthetic import load_aesthetic_head
from dqtool.metrics.batches import ImageFolder, NpzImages
from dqtool.metrics.graphdef import graph_constants
from dqtool.metrics.prompts import read_prompts
from dqtool.models.conditions.conditioning import Request
from dqtool.models.conditions.external import ConditionSource
from dqtool.models.families import FAMILIES
from dqtool.models.networks.checked_artifacts import check_tensors
from dqtool.models.networks.packed import packed_network, plans_from
from dqtool.models.sampling.sampler import Sampler, make_sampler
from dqtool.models.sources.lora import fuse_loras
from dqtool.models.sources.lora_files import LoraFile
from dqtool.models.sources.original.checkpoint import read_checkpoint, read_entries
from dqtool.models.sources.patterns import Patterns
from dqtool.models.sources.reading import read_yaml
from dqtool.models.sources.resolve import resolve_model
from dqtool.models.sources.weight_files import find_weights
from dqtool.recipe import load_recipe
from dqtool.stages.registry import STAGES, option_types
from dqtool.tables.spec import load_table

__all__ = ["COMMANDS", "by_bytes", "by_structure", "commands"]

STATE = {"conv_in.weight": torch.zeros(8, 1, 3, 3), "conv_in.bias": torch.zeros(8)}
TYPES = ("F32", "F16", "BF16", "F64", "I8", "U8", "I64", "BOOL", "F4", "C64", "X9")


def by_bytes(folder: Path) -> dict[str, tuple[Path, Callable[[Path], object]]]:
    """Return the place of each kind of file, and its reader."""
    kinds, shards, pipeline = ("PNG", "JPEG", "TIFF", "WEBP", "BMP"), folder / "shards", folder / "pipeline"
    libraries = [folder / name for name in ("text model", "tokenizer")]
    for directory in (
        *(folder / kind for kind in kinds),
        shards,
        pipeline / "unet",
        pipeline / "scheduler",
        *libraries,
    ):
        directory.mkdir(parents=True)
    for name in INDEX["weight_map"].values():
        (shards / name).write_bytes(packed_file({"a": ("F32", [1], bytes(4))}))
    (pipeline / "unet" / "config.json").write_text(json.dumps(NETWORK))
    (pipeline / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(packed_file({"a": ("F32", [1], bytes(4))}))
    (pipeline / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))

    def file(name: str, parser: Callable[[Path], object]) -> tuple[Path, Callable[[Path], object]]:
        return folder / name, parser

    def arrays(path: Path) -> None:
        names = npz_names(path)
        npz_arrays(path, [name for name in names if name != "arr_0"])
        list(NpzImages(path).read(2))

    def graph(path: Path) -> None:
        try:
            graph_constants(path.read_bytes())
        except ValueError as error:  # the reader of weights says it
            raise ArtifactError(str(error)) from error

    def weights(path: Path) -> object:
        try:
            return weights_content(path)
        except ValueError as error:  # its callers say it
            raise ArtifactError(str(error)) from error

    def checkpoint(path: Path) -> object:
        read_entries(path)
        return read_checkpoint(path)

    def lora(path: Path) -> object:
        source: Any = SimpleNamespace(loras=[LoraFile(path)], class_name="UNet2DModel", config=NETWORK)
        return fuse_loras(STATE, source)

    def conditions(path: Path) -> object:
        config = {**NETWORK, "num_class_embeds": 4, "class_embed_type": None}
        return ConditionSource(str(path)).conditions(FAMILIES["UNet2DModel"], config, Request(2), None)

    def library(path: Path) -> object:
        return check_library_directory(path.parent, "here")

    def picture(path: Path) -> object:
        return list(ImageFolder(path.parent).read(1))

    return {
        "safetensors": file("a.safetensors", read_header),
        "manifest": file("m.json", lambda path: _records(path.read_bytes())),
        "config": file("a.json", load_json),
        "recipe": file("r.yaml", lambda path: load_recipe(path, [], OPTIONS)),
        "yaml": file("y.yaml", read_yaml),
        "table": file("t.yaml", load_table),
        **{name: file(name, read_prompts) for name in ("prompts.txt", "prompts.csv", "prompts.json")},
        "npz": file("a.npz", arrays),
        "checkpoint": file("a.ckpt", checkpoint),
        "old checkpoint": file("o.ckpt", checkpoint),
        "aesthetic head": file("h.pth", lambda path: load_aesthetic_head(path, 4)),
        "Inception weights": file("i.pth", weights),
        "graph": file("g.pb", graph),
        "LoRA": file("l.safetensors", lora),
        "conditions.safetensors": file("c.safetensors", conditions),
        "conditions.npz": file("c.npz", conditions),
        "index of shards": file(
            "shards/model.safetensors.index.json", lambda path: find_weights(path.parent, "shards")
        ),
        "index of a pipeline": file("pipeline/model_index.json", lambda path: resolve_model(str(path.parent))),
        "config of a text model": file("text model/config.json", library),
        "tokenizer": file("tokenizer/tokenizer.json", library),
        **{f"image {kind}": file(f"{kind}/a.{kind.lower()}", picture) for kind in kinds},
    }


def _records(data: bytes) -> object:
    found = Manifest.from_json(data, "here")
    check_complete(found, "here")
    return found


def by_structure(folder: Path, chain: Path) -> dict[str, Callable[[random.Random], object]]:
    """Return checks of values that have the right form and wrong parts."""
    family, genuine = FAMILIES["UNet2DModel"], manifest()
    export = json.loads((chain / "exported" / "unet" / "config.json").read_text())
    layers = export.pop("quantization_config")["layers"]
    packed = load_file(chain / "exported" / "unet" / "diffusion_pytorch_model.safetensors")
    calibrated = open_artifact(chain / "calibrated.safetensors")
    known = calibrated.tensors()

    def signed(draw: random.Random) -> object:
        content = twisted({k: v for k, v in genuine.items() if k != "checksum"}, draw)
        try:
            content["checksum"] = hashlib.sha256(canonical_json(content).encode()).hexdigest()
        except ValueError:  # NaN, which no checksum is of
            content["checksum"] = "0" * 64
        return _records(json.dumps(content).encode())

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

    def name(draw: random.Random) -> object:
        parts = ["..", ".", "a", "", "\0", "C:", "\\", "pipeline", "~", "é", "x" * 300, "\n", "-"]
        return path_within(folder, draw.choice(("", "/", "//")).join(draw.choices(parts, k=draw.randrange(6))), "here")

    def lora(draw: random.Random) -> object:
        tensors = {
            "unet.conv_in.lora_A.weight": ("F32", [2, 1, 3, 3], bytes(72)),
            "unet.conv_in.lora_B.weight": ("F32", [8, 2, 1, 1], bytes(64)),
        }
        for module in draw.choices(("conv_in", "unet.conv_in", "nowhere", "text_encoder.a", "lora_unet_a"), k=1):
            for leaf in draw.choices(
                ("lora_A.weight", "lora_B.weight", "alpha", "lora_B.bias", "dora_scale"), k=draw.randrange(3)
            ):
                shape = [draw.choice((0, 1, 2, 3, 8, 9)) for _ in range(draw.randrange(5))]
                count = 1
                for size in shape:
                    count *= size
                kind = draw.choice(TYPES)
                data = draw.randbytes(
                    count * {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8, "C64": 8}.get(kind, 1)
                )
                tensors[f"{module}.{leaf}"] = (kind, shape, data)
        settings = twisted({"unet.lora_alpha": 2, "unet.alpha_pattern": {"conv_.*": 4}, "unet.use_rslora": True}, draw)
        path = folder / "s.safetensors"
        path.write_bytes(packed_file(tensors, {"lora_adapter_metadata": json.dumps(settings)}))
        source: Any = SimpleNamespace(loras=[LoraFile(path)], class_name="UNet2DModel", config=NETWORK)
        return fuse_loras(STATE, source)

    def tensors(draw: random.Random) -> object:
        state = dict(packed)
        for key in draw.sample(sorted(state), draw.choice((1, 1, 2))):
            state[key] = _twisted_tensor(state[key], draw)
            if state[key] is None:
                del state[key]
        if draw.random() < 0.05:
            state["odd"] = torch.zeros(1)
        return packed_network(
            export["_class_name"], export, plans_from([unchecked(layer, LayerRecord) for layer in layers]), state
        )

    def statistics(draw: random.Random) -> object:
        state = dict(known)
        for key in draw.sample(sorted(state), draw.choice((1, 1, 2))):
            state[key] = _twisted_tensor(state[key], draw)
            if state[key] is None:
                del state[key]
        return check_tensors(calibrated.manifest, state, "here")

    def overrides(draw: random.Random) -> object:
        words = [
            "dilate.scaling",
            "calibrate.steps",
            "calibrate.samples",
            "model",
            "calibrate.eta",
            "calibrate.metrics",
        ]
        words += ["calibrate", "", "a.b.c", "=", "\0"]
        values = ["wd", "4", "1e999", "[1, 2]", "{a: b}", "*x", "!!python/object:os.system x", "", "1:30", "é" * 99]
        given = [
            draw.choice(words) + draw.choice(("=", "=", "", "==")) + draw.choice(values)
            for _ in range(draw.choice((1, 1, 3)))
        ]
        (folder / "set.yaml").write_bytes(RECIPE)
        return load_recipe(folder / "set.yaml", given, OPTIONS)

    def index(draw: random.Random) -> object:
        path = folder / "shards" / "model.safetensors.index.json"
        path.write_text(json.dumps(twisted(INDEX, draw)))
        return find_weights(path.parent, "shards")

    def components(draw: random.Random) -> object:
        (folder / "pipeline" / "model_index.json").write_text(json.dumps(twisted(PIPELINE, draw)))
        return resolve_model(str(folder / "pipeline"))

    return {
        "signed manifest": signed,
        "network config": network,
        "scheduler config": scheduler,
        "LoRA pattern": pattern,
        "name to path": name,
        "LoRA by structure": lora,
        "packed tensors": tensors,
        "calibrated tensors": statistics,
        "recipe with --set": overrides,
        "shards by structure": index,
        "pipeline by structure": components,
    }


def _twisted_tensor(tensor: torch.Tensor, draw: random.Random) -> Any:
    """Return the tensor with a wrong value, type or shape; None to leave it out."""
    kind, flat = draw.randrange(9), tensor.clone().flatten()
    if kind < 4 and flat.numel():
        value = draw.choice((float("nan"), float("inf"), -1.0, 0.0, 1e30, 255.0))
        whole = 0 if value != value else int(max(-128, min(127, value)))
        flat[draw.randrange(flat.numel())] = value if tensor.is_floating_point() else whole
        return flat.view(tensor.shape)
    types = (torch.float16, torch.float64, torch.int64, torch.bool, torch.complex64)
    return {
        4: lambda: tensor.to(draw.choice(types)),
        5: lambda: flat[: draw.randrange(flat.numel() + 1)],
        6: lambda: tensor[None],
        7: lambda: tensor.new_empty(0),
    }.get(kind, lambda: None)()


COMMANDS = ("inspect", "dilate", "calibrate", "distill", "export", "eval", "sample", "run", "stats", "report", "zoo")
_FILES = ("exported/dqtool.json", "exported/model_index.json", "exported/unet/config.json", "calibrated.json")
_FILES += ("exported/unet/diffusion_pytorch_model.safetensors", "model/unet/config.json", "distilled.json", "eval.json")
_FILES += (
    "model/unet/diffusion_pytorch_model.safetensors",
    "model/scheduler/scheduler_config.json",
    "model/model_index.json",
)
_FILES += ("calibrated.safetensors", "distilled.safetensors", "r.yaml")


def commands(chain: Path, draw: random.Random) -> str:
    """Run one command line with odd options on a chain of which a file was changed; return what came of it.

    Raises `AssertionError` for a traceback, a code that is none of dqtool's, or a message that is no paragraph.
    """
    (chain / "r.yaml").write_bytes(RECIPE.replace(b"tiny", b"model"))
    words = _command(draw)
    place = chain / draw.choice(_FILES)
    genuine = place.read_bytes()
    try:
        if draw.random() < 0.7:
            place.write_bytes(bent(genuine, draw))
        return _invoke(words)
    finally:
        place.write_bytes(genuine)
        for leftover in ("new", "new.json", "new.safetensors", "new.png"):
            path = chain / leftover
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _command(draw: random.Random) -> list[str]:
    """Return a command line, without the program's name, that at most reads and plans."""
    name = draw.choice(COMMANDS)
    given = ["model", "exported", "calibrated.safetensors", "distilled.safetensors", "eval.json", "r.yaml", ".", "gone"]
    given += ["zoo:nothing", "", "a\0b", "\x1b[2J", "-", "x" * 5000, "model/unet", "/dev/zero"]
    fitting = {"dilate": "model", "calibrate": "wd.safetensors", "distill": "calibrated.safetensors", "run": "r.yaml"}
    fitting |= {"export": "distilled.safetensors", "eval": "exported", "sample": "exported", "zoo": "list"}
    words = [name, fitting.get(name, "exported") if draw.random() < 0.6 else draw.choice(given)]
    types = option_types(name) if name in STAGES else {"json": bool, "set": str, "output": str}
    for option in draw.sample(sorted(types), min(len(types), draw.randrange(4))):
        words.append(f"--{option}")
        if types[option] is not bool:
            words.append(draw.choice((*map(str, ODD), "4/4", "fast", "ddim", "1", "new.json", "(", "a=4/4")))
    if name != "inspect":
        words.append("--dry-run")
    return words


def _invoke(words: list[str]) -> str:
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["dqtool", *words]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = command_line.main()
    finally:
        sys.argv = argv
    said = err.getvalue()
    assert code in (0, 2, 3, 4, 5), f"code {code} of {words}: {said[-300:]}"
    assert "Traceback" not in said, f"{words}: {said[-300:]}"
    last = said.splitlines()[-1] if said.splitlines() else ""
    assert code == 0 or len(last) < 700, f"{words}: {len(last)} characters"
    return f"code {code}" if code else "read"
