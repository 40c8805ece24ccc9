"""Companions: the components of a pipeline that stay float (text encoders, class embedders, autoencoders).

Artifacts carry their files (`Artifact.attachments`), so that no stage needs a path to the original model. `export` writes
them into its directory unchanged.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqtool.artifacts import Artifact
from dqtool.artifacts.jsonvalues import ForeignConfig
from dqtool.artifacts.library_files import check_library_directory
from dqtool.artifacts.names import check_component, check_shards, path_within
from dqtool.artifacts.reading import FILE_BYTES, json_object, read_file
from dqtool.artifacts.tensorfile import file_tensor
from dqtool.core.device import place, to_cpu, to_device_of
from dqtool.errors import ArtifactError, EnvironmentFault
from dqtool.models.components.companion_files import CARD, companion_files, components_of, config_in_float32
from dqtool.models.config_schema import check_network_config, diffusers_class
from dqtool.models.sources.library_models import (
    check_model_directory,
    check_token_numbers,
    library_faults,
    without_pickles,
)
from dqtool.models.sources.resolve import ModelSource

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Companions", "attachments_of", "companions_of_artifact", "companions_of_source", "in_float32"]

DECODERS = ("vae", "vqvae", "movq")
TEXTS = ("text_encoder", "tokenizer")
"""Prefixes of the names of components that encode prompts."""
LIBRARIES = ("diffusers", "transformers")
"""Packages that may provide a text model's class. The name comes from a file, and importing a package runs its code."""


class Companions:
    """Companion files of a pipeline. `names` lists them by relative path; `read(name)` returns the bytes of one."""

    def __init__(
        self,
        index: ForeignConfig,
        component: str,
        scheduler: ForeignConfig | None,
        names: list[str],
        read: Callable[[str], bytes],
    ) -> None:
        self.index, self.component, self.scheduler = index, component, scheduler or {}
        self.names, self._read = names, read
        for name in (self.component, *components_of(self.index, "model_index.json")):
            check_component(name, "model_index.json")

    def has(self, component: str) -> bool:
        """Return whether the pipeline has files of this component."""
        return any(name.startswith(component + "/") for name in self.names)

    def json(self, name: str) -> ForeignConfig:
        """Return the object in a JSON file; `{}` where the file is missing.

        Raises:
            ArtifactError: the file holds something else.
        """
        return json_object(self._read(name), name) if name in self.names else {}

    @property
    def encodes_text(self) -> bool:
        """Return whether the pipeline has any text encoder (the first one is null in SDXL's refiner)."""
        return any(name.startswith("text_encoder") for name in self.names)

    def missing_encoders(self) -> list[str]:
        """Return the text encoders that the pipeline's class takes and the pipeline lacks."""
        return [name for name in self.index if name.startswith("text_encoder") and not self.has(name)]

    @property
    def card(self) -> ForeignConfig:
        """Return the card, the pipeline's sampling defaults: guidance, prompts."""
        return {k: v for k, v in self.json(CARD).items() if k in ("guidance", "prompts")}

    @property
    def decoder_name(self) -> str | None:
        """Return the name of the autoencoder's component; None for a pipeline on pixels."""
        return next((name for name in DECODERS if self.has(name)), None)

    def image_shape(self, latent: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape `(C, H, W)` of the image that a latent of shape `latent` decodes to."""
        if self.decoder_name is None:
            return latent
        config = self.json(f"{self.decoder_name}/config.json")
        factor = 2 ** (len(config.get("block_out_channels", ())) - 1)
        return (config.get("out_channels", 3), *(side * factor for side in latent[1:]))

    @contextlib.contextmanager
    def directory(self, *components: str) -> Iterator[Path]:
        """Write a temporary pipeline directory with these components and the scheduler; a context manager.

        Raises:
            ArtifactError: a file's name leads out of the directory, or an index of shards names a file elsewhere.
        """
        with tempfile.TemporaryDirectory(prefix="dqtool-") as folder:
            root = Path(folder)
            for name in self.names:
                if name.split("/")[0] in components:
                    path, content = path_within(root, name, "the files of this pipeline"), self._read(name)
                    if name.endswith(".index.json"):  # a library will open every file that an index lists
                        check_shards(json_object(content, name), name)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)
            for component in components:
                without_pickles(root / component)
            (root / "scheduler").mkdir(exist_ok=True)
            (root / "scheduler" / "scheduler_config.json").write_text(json.dumps(dict(self.scheduler)))
            (root / "model_index.json").write_text(json.dumps(dict(self.index)))
            yield root

    def load(self, component: str) -> Any:
        """Load one component as a float32 module in eval mode.

        Raises:
            ArtifactError: the component is damaged, or its class is unknown.
        """
        import torch

        config, place_of = self.json(f"{component}/config.json"), f"{component}/config.json"
        class_name = config.get("_class_name") or self.index[component][1]
        if class_name == "ClassEmbedder":
            from dqtool.models import latent_class

            cls: Any = latent_class.ClassEmbedder
        else:
            cls = diffusers_class(class_name, "ModelMixin", place_of)
        check_network_config(cls, config, place_of)
        with self.directory(component) as root:
            check_model_directory(cls, root / component, component)
            with library_faults(f"The pipeline's {component}", component):
                module = cls.from_pretrained(
                    root / component, torch_dtype=torch.float32, low_cpu_mem_usage=False, use_safetensors=True
                )
        return module.eval().requires_grad_(False)

    @contextlib.contextmanager
    def text_pipeline(self) -> Iterator[Any]:
        """Load the diffusers pipeline with its text models and tokenizers alone, in float32.

        Raises:
            EnvironmentFault: transformers is not installed.
            ArtifactError: the pipeline can't be loaded.
        """
        import diffusers
        import torch

        try:
            import transformers
        except ImportError as e:
            raise EnvironmentFault(
                "Text encoders need the package transformers", fix='pip install "dqtool[text]"'
            ) from e
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        texts = [name for name in self.index if name.startswith(TEXTS) and self.index[name][0] and self.has(name)]
        others = [k for k, v in self.index.items() if isinstance(v, list) and k not in (*texts, "scheduler")]
        for name in texts:
            if self.index[name][0] not in LIBRARIES:
                raise ArtifactError(
                    f"The pipeline's {name} is of the package '{self.index[name][0]}', and dqtool imports no package "
                    "that a file names",
                    where=f"model_index.json, key {name}",
                    fix=f"Use a pipeline whose text models are of {' or '.join(LIBRARIES)}",
                )
        named = self.index.get("_class_name")
        kind = getattr(diffusers, named, None) if isinstance(named, str) else None
        if not (isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)):
            raise ArtifactError(f"diffusers has no pipeline {named!a:.80}", where="model_index.json, key _class_name")
        with self.directory(*texts) as root:
            for name in texts:
                library, class_name = self.index[name]
                cls = _text_class(library, class_name, name)
                if hasattr(cls, "from_config") or hasattr(cls, "config_class"):
                    check_model_directory(cls, root / name, name)
                else:
                    check_library_directory(root / name, name)
            with library_faults("The pipeline's text models", "text_encoder"):
                pipeline = kind.from_pretrained(
                    root,
                    torch_dtype=torch.float32,
                    local_files_only=True,
                    use_safetensors=True,
                    trust_remote_code=False,
                    **dict.fromkeys(others),
                )
                check_vocabularies(pipeline, texts)
            yield place(pipeline)

    def encoder(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None:
        """Return two functions: from images in [-1, 1] to latents `[N, C, H, W]`, and from those to the denoiser's samples.

        None on pixels. Latents are the mode of the autoencoder's distribution, on the CPU.
        """
        if self.decoder_name is None:
            return None
        import torch

        vae = place(self.load(self.decoder_name))
        scale, shift = vae.config.get("scaling_factor") or 1.0, vae.config.get("shift_factor") or 0.0

        def encode(images: Tensor) -> Tensor:
            found = []
            with torch.no_grad():
                for part in to_device_of(vae, images).split(4):
                    encoded = vae.encode(part)
                    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded[0]
                    found.append(to_cpu(latents))
            return torch.cat(found)

        return encode, lambda latents: (latents - shift) * scale

    def decoder(self) -> Callable[[Tensor], Tensor] | None:
        """Return a function from latents `[N, C, H, W]` to images in [-1, 1], on the decoder's device; None on pixels."""
        if self.decoder_name is None:
            return None
        import torch

        vae = place(self.load(self.decoder_name))
        scale, shift = vae.config.get("scaling_factor") or 1.0, vae.config.get("shift_factor") or 0.0

        def decode(latents: Tensor) -> Tensor:
            latents = to_device_of(vae, latents)
            part = max(1, 65536 // latents[0, 0].numel())
            with torch.no_grad():
                images = [vae.decode(z / scale + shift, return_dict=False)[0] for z in latents.split(part)]
            return torch.cat(images).clamp(-1, 1)

        return decode


def check_vocabularies(pipeline: Any, names: Sequence[str]) -> None:
    """Check that each text encoder of a loaded pipeline has a row for every token of its tokenizer."""
    for name in names:
        tokenizer = getattr(pipeline, name, None) if name.startswith("tokenizer") else None
        encoder = getattr(pipeline, name.replace("tokenizer", "text_encoder"), None)
        size = getattr(getattr(encoder, "config", None), "vocab_size", None)
        if tokenizer is not None and size is not None:
            check_token_numbers(list(tokenizer.get_vocab().values()), size, name)


def _text_class(library: str, name: object, component: str) -> Any:
    """Return the class of a text model or tokenizer that `model_index.json` names.

    Raises:
        ArtifactError: the library has no model or tokenizer of this name.
    """
    import diffusers
    import transformers

    cls = getattr({"diffusers": diffusers, "transformers": transformers}[library], str(name), None)
    kinds = (transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase, diffusers.ModelMixin)
    if not (isinstance(cls, type) and issubclass(cls, kinds)):
        raise ArtifactError(
            f"{library} has no text model or tokenizer {name!a:.80}", where=f"model_index.json, key {component}"
        )
    return cls


def attachments_of(source: ModelSource) -> dict[str, Tensor]:
    """Return a model's companion files as an artifact carries them: uint8 tensors, mapped but not read."""
    if source.pipeline is None:
        return {}
    files = companion_files(source.pipeline, source.model_index or {}, source.component, source.variant)
    return {name: file_tensor(path) for name, path in files.items()}


def companions_of_source(source: ModelSource) -> Companions | None:
    """Return the companions of a model on disk; None for a bare component."""
    if source.pipeline is None:
        return None
    index = source.model_index or {}
    files = companion_files(source.pipeline, index, source.component, source.variant)
    return Companions(
        index, source.component, source.scheduler, sorted(files), lambda name: read_file(files[name], FILE_BYTES)
    )


def companions_of_artifact(artifact: Artifact) -> Companions | None:
    """Return the companions in an artifact or an exported directory; None for a bare component."""
    pipeline = artifact.manifest.pipeline
    if pipeline is None or pipeline.model_index is None or pipeline.component is None:
        return None
    return Companions(
        pipeline.model_index,
        pipeline.component,
        pipeline.scheduler,
        artifact.attachment_names(),
        artifact.attachment,
    )


def in_float32(name: str, data: Tensor) -> Tensor:
    """Return the bytes of a companion's file, uint8, in float32: tensors of a safetensors file, precision of a config.

    The embedded models are stored in half precision to be small, and are float32 wherever they are used: transformers
    would load a text encoder in the precision of its config, which does not mix with the rest of a pipeline.
    """
    import torch
    from safetensors.torch import load, save

    content = data.numpy().tobytes()
    if name.endswith(".safetensors"):
        tensors = {key: t.float() if t.is_floating_point() else t for key, t in load(content).items()}
        content = save(tensors, metadata={"format": "pt"})
    elif name.endswith("/config.json"):
        content = config_in_float32(content)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
