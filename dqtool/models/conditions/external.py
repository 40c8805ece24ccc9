"""Conditions that come from outside a model: precomputed tensors, or another pipeline's text encoders.

`--conditions FILE` holds one tensor `[K, ...]` for each condition of the network, with the same K for all, and for
guidance the null condition `null.NAME` `[1, ...]`:

| network | tensors |
| --- | --- |
| UNet2DConditionModel | `encoder_hidden_states` [K, tokens, width]; SDXL also `text_embeds` [K, width] (and `time_ids` [K, 6]) |
| DiTTransformer2DModel, UNet2DModel with classes | `class_labels` [K] |
| PixArtTransformer2DModel | `encoder_hidden_states` (and `encoder_attention_mask` [K, tokens]) |
| SD3Transformer2DModel, FluxTransformer2DModel | `encoder_hidden_states`, `pooled_projections` [K, width] |
| others (`--family generic`) | the arguments of the example |

Names in brackets are optional and derived from the others. A guidance that the network takes as an input (FLUX.1-dev,
latent consistency models) is set by `--guidance`, not in the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqtool.artifacts import check_finite, sha256_file
from dqtool.artifacts.jsonvalues import ForeignConfig, Json
from dqtool.artifacts.named import may_read
from dqtool.artifacts.names import path_within
from dqtool.artifacts.reading import FILE_BYTES, read_file
from dqtool.artifacts.records import ConditionsRecord, SamplingRecord
from dqtool.errors import ArtifactError, EnvironmentFault, UsageError
from dqtool.models.components.companion_files import companion_files, listed_digest
from dqtool.models.components.companions import TEXTS, Companions
from dqtool.models.sources.reading import read_json
from dqtool.models.sources.resolve import NETWORKS, resolve_model
from dqtool.report import warn

if TYPE_CHECKING:
    from torch import Tensor

    from dqtool.models.conditions.conditioning import Conditions, Request
    from dqtool.models.families import Family

__all__ = ["ConditionSource"]

NULL = "null."


@dataclass(frozen=True)
class ConditionSource:
    """Origin of conditions that don't come from the model's own components: a file, a pipeline, or a random generator.

    `images` is a folder whose images stand beside the latents, or are where trajectories begin.
    """

    file: str | None = None
    pipeline: str | None = None
    random: bool = False
    images: str | None = None

    @classmethod
    def of(cls, options: Any, sampling: SamplingRecord | None = None, beside: str = "") -> ConditionSource:
        """Return the source that the stage's options name, else the one recorded in a manifest's `sampling`.

        A recorded path is read if it lies in the directory of the artifact `beside` or the user named it before on this
        machine (`dqtool.artifacts.named`).

        Raises:
            UsageError: the options name two sources.
            EnvironmentFault: the recorded file or pipeline does not exist, or lies where the user never named it.
            ArtifactError: the recorded file or pipeline has other contents.
        """
        found = cls(options.conditions, options.pipeline, options.random_conditions, options.images)
        for pair in (("conditions", "pipeline"), ("conditions", "images"), ("pipeline", "images")):
            if all(getattr(options, name) is not None for name in pair):
                raise UsageError(
                    "Conditions come from one place, not from two",
                    where=", ".join(f"--{name}" for name in pair),
                    fix="Leave one of the two out",
                )
        recorded = None if sampling is None else sampling.conditions
        return cls._recorded(recorded, beside) if found == cls() and recorded is not None else found

    @classmethod
    def _recorded(cls, recorded: ConditionsRecord, beside: str) -> ConditionSource:
        path, is_file, of_images = str(recorded.path), recorded.origin == "file", recorded.origin == "images"
        if recorded.origin == "random":
            return cls(random=True)
        option = "--conditions" if is_file else "--images" if of_images else "--pipeline"
        if not may_read(path, [beside] if beside else []) or (is_file and not Path(path).is_file()):
            raise EnvironmentFault(
                f"The conditions that this model was calibrated with are not at {path!a:.200}, or you never named that place",
                where=option,
                fix=f"Name them with {option}",
            )
        found = cls(file=path) if is_file else cls(images=path) if of_images else cls(pipeline=path)
        now = found.record()
        if now is None or now.sha256 != recorded.sha256:
            raise ArtifactError(
                "These are not the conditions that this model was calibrated with",
                where=path,
                fix=f"Name those, or others, with {option}",
            )
        return found

    def record(self) -> ConditionsRecord | None:
        """Return the manifest's entry: origin, path and digest; None for the model's own components."""
        if self.file is not None:
            return ConditionsRecord("file", self.file, sha256_file(self.file))
        if self.pipeline is not None:
            return ConditionsRecord("pipeline", self.pipeline, self._pipeline_digest())
        if self.images is not None:
            return ConditionsRecord("images", self.images, _folder_digest(self.images))
        return ConditionsRecord("random") if self.random else None

    def parameters(self) -> dict[str, Json]:
        """Return the part of a fingerprint: the record without its path."""
        found = self.record()
        return {} if found is None else {"conditions": replace(found, path=None).to_json()}

    def conditions(
        self, family: Family, config: ForeignConfig, request: Request, companions: Companions | None
    ) -> Conditions:
        """Return the conditions of a network with this config; `companions` are the model's own.

        Raises:
            UsageError: the file or pipeline does not fit the network, or there is no source of conditions.
            ArtifactError: the file or a text encoder is damaged.
        """
        if self.file is not None:
            return _of_file(self.file, family, config, request)
        request = replace(request, random=self.random)
        if self.pipeline is None:
            return family.make_conditions(config, request, companions)
        found = family.make_conditions(config, request, self.companions())
        _check(found.table, family, config, f"--pipeline {self.pipeline}")
        return found

    def check_there(self, family: Family, config: ForeignConfig, companions: Companions | None) -> None:
        """Raise `UsageError` where nothing makes the network's conditions. No encoder is loaded: a dry run calls this."""
        encodes = companions is not None and (companions.encodes_text or companions.has("class_embedder"))
        if self == ConditionSource() and not encodes:
            from dqtool.models.conditions.conditioning import Request

            self.conditions(family, config, Request(1, 0), companions)

    def companions(self) -> Companions:
        """Return the text encoders and tokenizers of `pipeline`.

        Raises:
            UsageError: the pipeline has none.
        """
        assert self.pipeline is not None
        index, files = _pipeline_files(self.pipeline)
        component = next((name for name in NETWORKS if name in index), NETWORKS[0])
        return Companions(index, component, None, sorted(files), lambda name: read_file(files[name], FILE_BYTES))

    def _pipeline_digest(self) -> str:
        assert self.pipeline is not None
        _, files = _pipeline_files(self.pipeline)
        return listed_digest({name: path for name, path in files.items() if name.startswith(TEXTS)})


def _folder_digest(folder: str) -> str:
    """Return the hex digest of all files of a folder.

    Raises:
        EnvironmentFault: there is no such folder.
    """
    if not Path(folder).is_dir():
        raise EnvironmentFault("There is no such directory of images", where=f"--images {folder}")
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return listed_digest({path.relative_to(folder).as_posix(): path for path in paths})


def _pipeline_files(given: str) -> tuple[ForeignConfig, dict[str, Path]]:
    """Return a pipeline's `model_index.json` and its companion files by relative path; the denoiser may be missing.

    Raises:
        UsageError: `given` is no pipeline, or has no text encoder.
    """
    root = Path(given)
    if not (root / "model_index.json").is_file():
        source = resolve_model(given)
        if source.pipeline is None or source.layout is not None:
            raise UsageError(
                "This is no pipeline directory",
                where=f"--pipeline {given}",
                fix="Name a directory that holds model_index.json",
            )
        root = source.pipeline
    index = read_json(path_within(root, "model_index.json", given, links=root))
    component = next((name for name in NETWORKS if name in index), NETWORKS[0])
    files = companion_files(root, index, component)
    if not any(name.startswith((*TEXTS, "class_embedder")) for name in files):
        raise UsageError(
            "This pipeline has no text encoder",
            where=f"--pipeline {given}",
            fix="Give the directory of a pipeline with text_encoder and tokenizer",
        )
    return index, files


def _of_file(path: str, family: Family, config: ForeignConfig, request: Request) -> Conditions:
    import torch

    from dqtool.models.conditions.conditioning import IMAGE_CONDITION, Conditions, with_embedded

    if request.prompts is not None:
        raise UsageError(
            "The conditions of a file are not made from prompts", where="--prompts, --conditions", fix="Leave one out"
        )
    tensors = _read(path)
    table = {name: value for name, value in tensors.items() if not name.startswith(NULL)}
    null = {name.removeprefix(NULL): value for name, value in tensors.items() if name.startswith(NULL)}
    table = _completed(table, family, config, path)
    embed = family.embedder(config)
    default = family.default_guidance(config)
    asked = request.guidance
    if embed is not None:
        return with_embedded(Conditions(table), request.weight(default), embed)
    if not null:
        if asked is not None and asked > 1:
            raise UsageError(
                "Guidance needs the condition of none, and the file has no tensor null.NAME",
                where=f"--guidance, --conditions {path}",
                fix=f"Add {', '.join(NULL + name for name in sorted(table))} [1, ...] to it, or leave --guidance out",
            )
        warn(f"{path} holds no null.NAME: sampling goes without guidance")
        return Conditions(table)
    null |= (
        {IMAGE_CONDITION: table[IMAGE_CONDITION][:1]} if IMAGE_CONDITION in table else {}
    )  # this condition is the same with and without guidance
    null = _completed(null, family, config, path)
    guidance = request.weight(default)
    if guidance <= 1:
        return Conditions(table)
    return Conditions({name: torch.cat([value, null[name][:1]]) for name, value in table.items()}, guidance)


def _read(path: str) -> dict[str, Tensor]:
    """Return all tensors of a .safetensors or .npz file.

    Raises:
        EnvironmentFault: there is no such file.
        ArtifactError: the file is damaged, or of another format.
        NumericError: a tensor holds NaN or infinity.
    """
    import torch

    from dqtool.artifacts.tensorfile import load_tensors

    if not Path(path).is_file():
        raise EnvironmentFault("There is no such file", where=f"--conditions {path}")
    if not path.endswith(".npz"):
        tensors = load_tensors(Path(path))
    else:
        from dqtool.artifacts.npz import LARGEST, npz_arrays, npz_names

        arrays = npz_arrays(path, npz_names(path), LARGEST + 20 * Path(path).stat().st_size)
        try:
            tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        except (TypeError, ValueError) as e:  # ValueError: the other byte order
            raise ArtifactError(f"This is no .npz file of numbers: {e}", where=path) from e
    check_finite(tensors, path)
    return tensors


def _completed(given: dict[str, Tensor], family: Family, config: ForeignConfig, path: str) -> dict[str, Tensor]:
    """Return the checked conditions, with derived ones added."""
    where = f"--conditions {path}"
    table = _check(given, family, config, where)
    counts = {len(value) for value in table.values()}
    if len(counts) != 1:
        raise UsageError(
            "The tensors differ in their number of rows",
            where=where,
            fix="Give every tensor the same first dimension, [K, ...]",
        )
    derived = family.complete(config, table)
    return {name: value.contiguous() for name, value in (derived | table).items()}


def _check(given: Mapping[str, Tensor], family: Family, config: ForeignConfig, where: str) -> dict[str, Tensor]:
    """Return `given` in the network's dtypes; raise `UsageError` where names, ranks or widths don't fit its conditions."""
    import torch

    wanted = family.conditions(config, 1, torch.Generator().manual_seed(0))
    if family.embeds_guidance(config):
        wanted = {name: value for name, value in wanted.items() if name not in family.embed_guidance(config, 1.0, 1)}
    shapes = ", ".join(
        f"{name} [{', '.join(map(str, ['K', *value.shape[1:]]))}]" for name, value in sorted(wanted.items())
    )
    fix = f"The network takes {shapes or 'no condition'}"
    extra = [name for name in given if name not in wanted and not family.embeds_guidance(config)]
    present = {name: value for name, value in given.items() if name in wanted}
    if extra or not present:
        raise UsageError(f"These conditions are not the network's: {', '.join(given)}", where=where, fix=fix)
    for name, value in present.items():
        expected = wanted[name]
        wide = expected.dim() > 1 and not name.endswith("mask")
        if value.dim() != expected.dim() or (wide and value.shape[-1] != expected.shape[-1]):
            raise UsageError(f"{name} has the shape {list(value.shape)}", where=where, fix=fix)
    first = next(iter(present.values()))
    can_follow = family.complete(config, present) if "encoder_hidden_states" in present else {}
    missing = [name for name in wanted if name not in present and name not in can_follow]
    if missing or len(first) < 1:
        raise UsageError(f"{', '.join(missing) or 'Every row'} is missing", where=where, fix=fix)
    return {
        name: value.to(wanted[name].dtype) if not wanted[name].is_floating_point() else value.float()
        for name, value in present.items()
    }
