"""Pipeline directory made from a single file's autoencoder, text encoders and class embedding, without the network.

It is written once, under `$DQTOOL_CACHE` (default `~/.cache/dqtool`), and `ModelSource.pipeline` points at it. The network is
always read from the checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dqtool.artifacts.cache import cache_directory
from dqtool.artifacts.files import content_digest, os_fault
from dqtool.artifacts.jsonvalues import ForeignConfig
from dqtool.artifacts.names import path_within
from dqtool.models.components.companion_files import CARD, companion_files
from dqtool.models.sources.original.checkpoint import read_checkpoint
from dqtool.models.sources.original.first_stage import build_first_stage
from dqtool.models.sources.original.pipelines import CLASSES, SingleFilePipeline
from dqtool.models.sources.original.text_encoders import TextEncoder, build_text_encoder
from dqtool.models.sources.reading import read_json
from dqtool.models.sources.tokenizers import load_tokenizer

__all__ = ["Shell", "pipeline_shell"]

_VERSION = 2


@dataclass(frozen=True)
class Shell:
    """Contents of the directory.

    `texts` are the file's text encoders, `tokenizers` is `{component: directory}`, and `prefix` that of the autoencoder's
    tensors (None: the file has none). Components that the file lacks come from the pipeline directory `base`, if any.
    """

    parts: SingleFilePipeline
    class_name: str
    scheduler: ForeignConfig
    prefix: str | None
    texts: tuple[TextEncoder, ...]
    tokenizers: Mapping[str, Path]
    base: Path | None = None

    def digest(self) -> str:
        """Return a short digest of everything that the directory depends on except the checkpoint."""
        inputs: list[Any] = [self.parts.class_name, self.class_name, dict(self.scheduler), self.prefix]
        inputs += [[text.component for text in self.texts], [str(self.base and self.base.resolve())]]
        for place in [*self.tokenizers.values(), *([self.base] if self.base else [])]:
            stats = [(p, p.stat()) for p in sorted(place.rglob("*")) if p.is_file()]
            inputs += [[str(p.relative_to(place)), stat.st_size, stat.st_mtime_ns] for p, stat in stats]
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:12]


def pipeline_shell(path: Path, shell: Shell) -> Path:
    """Return the pipeline directory of the checkpoint at `path`.

    Raises:
        ArtifactError: diffusers or transformers has no equivalent of a component.
        EnvironmentFault: the cache can't be written.
    """
    root = cache_directory("originals")
    target = root / f"{content_digest(path)[:32]}-{shell.digest()}-{_VERSION}"
    if (target / "model_index.json").is_file():
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        area = Path(tempfile.mkdtemp(dir=root, prefix=".new-"))
    except OSError as error:
        raise os_fault(error, root) from error
    try:
        _write(area, path, shell)
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


def _write(area: Path, path: Path, shell: Shell) -> None:
    state, parts = read_checkpoint(path), shell.parts
    index: dict[str, Any] = {"_class_name": parts.class_name}
    if shell.base is not None:
        index = dict(read_json(path_within(shell.base, "model_index.json", str(shell.base), links=shell.base)))
    index |= {
        parts.network: ["diffusers", shell.class_name],
        "scheduler": ["diffusers", shell.scheduler["_class_name"]],
    }
    written = {parts.network, "scheduler"}
    if shell.prefix is not None:
        known: dict[str, Any] = dict(parts.vae)
        if "edm_mean" in state:  # Playground v2.5
            known |= {"scaling_factor": 0.5, "latents_mean": state["edm_mean"].flatten().tolist()}
            known["latents_std"] = state["edm_std"].flatten().tolist()
        vae = build_first_stage(state, shell.prefix, known, str(path))
        vae.save_pretrained(area / parts.decoder)
        index[parts.decoder] = ["diffusers", type(vae).__name__]
        written.add(parts.decoder)
    for text in shell.texts:
        tokenizer = load_tokenizer(text, shell.tokenizers[text.tokenizer])
        encoder = build_text_encoder(text, state, tokenizer, str(path))
        if text.kind != "t5":
            tokenizer.model_max_length = encoder.config.max_position_embeddings
        encoder.save_pretrained(area / text.component)
        tokenizer.save_pretrained(area / text.tokenizer)
        index[text.component] = ["transformers", text.class_name]
        index[text.tokenizer] = ["transformers", type(tokenizer).__name__]
        written |= {text.component, text.tokenizer}
    if parts.by_class:
        _write_classes(area, state[CLASSES])
        index["class_embedder"] = ["dqtool.models.latent_class", "ClassEmbedder"]
    if shell.base is None:
        index |= parts.index
    else:
        _link(area, shell.base, {name: entry for name, entry in index.items() if name not in written})
    (area / "scheduler").mkdir()
    (area / "scheduler" / "scheduler_config.json").write_text(json.dumps(dict(shell.scheduler), indent=2) + "\n")
    (area / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_classes(area: Path, rows: Any) -> None:
    from dqtool.models.latent_class import ClassEmbedder

    embedder = ClassEmbedder(classes=rows.shape[0] - 1, dim=rows.shape[1])  # the last row means "no class"
    embedder.load_state_dict({"embedding.weight": rows.float()})
    embedder.save_pretrained(area / "class_embedder")


def _link(area: Path, base: Path, index: ForeignConfig) -> None:
    """Link the files of the pipeline's components that `index` lists, and its card, into `area`.

    Raises:
        ArtifactError: a component's name is no plain word, or a link of the pipeline leads out of it.
    """
    files = companion_files(base, index, "")
    card = path_within(base, CARD, str(base), links=base)
    for name, path in (files | ({CARD: card} if card.is_file() else {})).items():
        link = path_within(area, name, str(base))
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.resolve())
