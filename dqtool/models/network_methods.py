"""Methods of loaded networks: saving with the manifest, and conversion back to float layers."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dqtool.artifacts import DIRECTORY_MANIFEST as MANIFEST
from dqtool.artifacts import Manifest, dqtool_version, sha256_file
from dqtool.artifacts.jsonvalues import JsonObject
from dqtool.artifacts.records import FileRecord, LayerRecord, ModelRecord, ParametersRecord, PipelineRecord
from dqtool.artifacts.schema import unchecked
from dqtool.core.device import device_of
from dqtool.errors import ArtifactError
from dqtool.graph.tied_modules import restore_copies
from dqtool.models.families import family_of
from dqtool.models.hub.quantizer import quantization_config
from dqtool.models.networks.packed import is_static, plan_records, prediction_rows
from dqtool.models.sampling.fitted import FITTED
from dqtool.nn.call_lock import give
from dqtool.nn.packed_form import add_count_methods, is_quantized_tensor, packed_form
from dqtool.nn.surgery import quant_layers

__all__ = ["MANIFEST", "Origin", "add_methods", "float_copy", "float_state", "origin_of", "to_float"]

ORIGIN = "_dqtool_origin"
OURS = ("quantization_config", "_pre_quantization_dtype")
"""Config entries of a quantized network that are removed when it becomes float."""


@dataclass(frozen=True)
class Origin:
    """Export that a network was loaded from: its `quantization_config`, and its manifest where there is one."""

    quantization: JsonObject
    manifest: Manifest | None

    @property
    def layers(self) -> list[JsonObject]:
        """Layers of the network, as its `quantization_config` lists them."""
        layers = self.quantization["layers"]
        assert isinstance(layers, list)
        return layers


def origin_of(manifest: Manifest, packed: nn.Module) -> Origin:
    """Return the origin of a network that was loaded from a manifest; `packed` is its packed form."""
    state = packed.state_dict()
    count = len(state["timesteps"])
    records, rows = plan_records(manifest.layers), prediction_rows(state)
    fitted = manifest.metrics.as_read.get(FITTED)
    return Origin(quantization_config(records, count, rows, is_static(manifest, count), fitted), manifest)


def add_methods(network: nn.Module, origin: Origin) -> nn.Module:
    """Install the methods for saving, counting and dequantizing on a packed network or an integer network made from one."""
    network.__dict__[ORIGIN] = origin
    give(network, "save_pretrained", _save_pretrained)
    give(network, "dequantize", to_float)
    add_count_methods(network)
    return network


def _save_pretrained(
    network: Any,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    save_function: Any = None,
    safe_serialization: bool = True,
    variant: str | None = None,
    max_shard_size: int | str = "10GB",
    push_to_hub: bool = False,
    **kwargs: Any,
) -> None:
    """Save as `ModelMixin.save_pretrained` does, with a manifest, so that `dqtool.load` reads the directory as well.

    Files are renamed into place when they are complete, because the network may be mapped from the files it replaces.
    """
    target = Path(save_directory)
    target.mkdir(parents=True, exist_ok=True)
    origin: Origin = network.__dict__[ORIGIN]
    network.register_to_config(quantization_config=dict(origin.quantization))
    with tempfile.TemporaryDirectory(prefix=".dqtool-", dir=target) as area:
        type(network).save_pretrained(
            network,
            area,
            is_main_process=is_main_process,
            save_function=save_function,
            safe_serialization=safe_serialization,
            variant=variant,
            max_shard_size=max_shard_size,
        )
        written = sorted(os.listdir(area))
        for stale in target.glob("diffusion_pytorch_model*"):
            if variant is None and stale.name not in written and "-of-" in stale.name:
                stale.unlink()  # shards of an earlier save, as diffusers removes them
        for name in written:
            os.replace(Path(area) / name, target / name)
    if is_main_process:
        _write_manifest(network, origin, target, written)
    if push_to_hub:
        _push(network, target, kwargs)


def _write_manifest(network: Any, origin: Origin, target: Path, written: list[str]) -> None:
    made = origin.manifest
    if made is None:
        config = {k: v for k, v in network.config.items() if not k.startswith("_") and k != "quantization_config"}
        family = family_of(type(network).__name__, str(target))
        made = Manifest(
            stage="export",
            fingerprint="0" * 64,
            model=ModelRecord(type(network).__name__, config, family.name, str(target)),
            parameters=ParametersRecord(format="dq"),
            layers=[unchecked(layer, LayerRecord) for layer in origin.layers],
        )
    pipeline = made.pipeline and _of_component(made.pipeline)
    files = {name: FileRecord((target / name).stat().st_size, sha256_file(target / name)) for name in written}
    kept = pipeline if pipeline is not None and pipeline.to_json() else None
    note = replace(made, pipeline=kept, files=files, version=dqtool_version())
    partial = target / f".{MANIFEST}.tmp"
    partial.write_text(note.to_json(), encoding="utf-8")
    os.replace(partial, target / MANIFEST)


def _of_component(pipeline: PipelineRecord) -> PipelineRecord:
    """Return a pipeline's record for its network alone."""
    kept = {key: value for key, value in pipeline.as_read.items() if key not in ("component", "model_index")}
    return replace(pipeline, component=None, model_index=None, as_read=kept)


def _push(network: Any, target: Path, kwargs: dict[str, Any]) -> None:
    from huggingface_hub import create_repo

    upload = {name: kwargs.get(name) for name in ("token", "commit_message", "create_pr")}
    repo = create_repo(
        kwargs.get("repo_id", target.name), exist_ok=True, private=kwargs.get("private"), token=upload["token"]
    )
    network._upload_folder(str(target), repo.repo_id, **upload)


def float_state(packed: nn.Module) -> dict[str, Tensor]:
    """Return the float network's state: dequantized weights without their dilation, and no step tables."""
    layers = quant_layers(packed)
    state = {k: v for k, v in packed.state_dict().items() if not is_quantized_tensor(packed, k)}
    for name, layer in layers.items():
        state[f"{name}.weight"] = layer.float_weight().clone()
        if layer.bias is not None:
            state[f"{name}.bias"] = layer.bias
    return state


def float_copy(network: Any) -> Any:
    """Return a new network of diffusers' float layers with the dequantized weights of `network`, in its dtype."""
    packed = packed_form(network)
    dtype = network.dtype
    config = {k: v for k, v in network.config.items() if k != "quantization_config"}
    family = family_of(type(network).__name__, "config.json")
    fresh = family.build(config)
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in float_state(packed).items()}
    try:
        fresh.load_state_dict(restore_copies(state, family.tied_modules(config)), assign=True)
    except RuntimeError as e:
        raise ArtifactError(f"The packed tensors don't fit the network: {e}", where="config.json") from e
    return nn.Module.to(fresh, device_of(network), dtype).eval()


def to_float(network: Any) -> nn.Module:
    """Convert a quantized network in place into one of diffusers' float layers, with dequantized weights.

    Activations are no longer quantized, and predictions no longer corrected.
    """
    fresh = float_copy(network)
    kept = {k: v for k, v in network.__dict__.items() if k in ("_internal_dict", "training")}
    network.__dict__.clear()
    network.__dict__.update(fresh.__dict__ | kept)
    network._internal_dict = type(network.config)({k: v for k, v in network.config.items() if k not in OURS})
    network.is_quantized = False
    converted: nn.Module = network
    return converted
