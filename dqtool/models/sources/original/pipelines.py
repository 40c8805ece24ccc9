"""Pipelines of single files: class, text encoders, and scaling factor of the autoencoder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from dqtool.artifacts.jsonvalues import ForeignConfig
from dqtool.models.sources.original.text_encoders import TextEncoder

__all__ = ["CLASSES", "SingleFilePipeline", "pipeline_of"]

CLASSES = "cond_stage_model.embedding.weight"
"""Tensor name of the class embedding of class-conditional latent diffusion."""


@dataclass(frozen=True)
class SingleFilePipeline:
    """A diffusers pipeline whose components, except tokenizers, a checkpoint provides.

    `network` and `decoder` are the names of the components for the denoiser and the autoencoder. `vae` holds config entries
    of the autoencoder that shapes don't determine; `index` holds further entries of `model_index.json`.
    """

    class_name: str
    network: str
    decoder: str
    texts: tuple[TextEncoder, ...] = ()
    vae: Mapping[str, float] = field(default_factory=dict)
    index: ForeignConfig = field(default_factory=dict)
    by_class: bool = False


_CLIP_L = TextEncoder("text_encoder", "tokenizer", "cond_stage_model.transformer.", "clip", quick=True)
_OPEN_H = TextEncoder("text_encoder", "tokenizer", "cond_stage_model.model.", "openclip", drops_last=True, pads="!")
_XL_L = TextEncoder("text_encoder", "tokenizer", "conditioner.embedders.0.transformer.", "clip", quick=True)
_XL_G = TextEncoder("text_encoder_2", "tokenizer_2", "conditioner.embedders.1.model.", "openclip", True, pads="!")
_REFINER_G = TextEncoder("text_encoder_2", "tokenizer_2", "conditioner.embedders.0.model.", "openclip", True, pads="!")
_IN_3 = "text_encoders.{}.transformer."
_SD3_L = TextEncoder("text_encoder", "tokenizer", _IN_3.format("clip_l"), "clip", True, quick=True)
_SD3_G = TextEncoder("text_encoder_2", "tokenizer_2", _IN_3.format("clip_g"), "clip", True, pads="!")
_SD3_T5 = TextEncoder("text_encoder_3", "tokenizer_3", _IN_3.format("t5xxl"), "t5")
_FLUX_L = TextEncoder("text_encoder", "tokenizer", _IN_3.format("clip_l"), "clip", quick=True)
_FLUX_T5 = TextEncoder("text_encoder_2", "tokenizer_2", _IN_3.format("t5xxl"), "t5")

_NOTHING = [None, None]
_SD_CLASSES = {9: "StableDiffusionInpaintPipeline", 8: "StableDiffusionInstructPix2PixPipeline"}
_XL_CLASSES = {9: "StableDiffusionXLInpaintPipeline", 8: "StableDiffusionXLInstructPix2PixPipeline"}
_SD_INDEX: ForeignConfig = {
    "safety_checker": _NOTHING,
    "feature_extractor": _NOTHING,
    "requires_safety_checker": False,
}
_XL_SCALE = {"scaling_factor": 0.13025}


def pipeline_of(config: ForeignConfig, names: Iterable[str]) -> SingleFilePipeline | None:
    """Return the pipeline of a network with this config whose checkpoint has tensors of these names.

    The text encoders may be missing from the checkpoint. Returns None for a network of no known pipeline.
    """
    return _pipeline(config, set(names))


def _pipeline(config: ForeignConfig, names: set[str]) -> SingleFilePipeline | None:
    index: ForeignConfig
    kind = config["_class_name"]
    if kind == "UNet2DModel":
        return SingleFilePipeline("LDMPipeline", "unet", "vqvae", vae={"scaling_factor": 1.0})
    if kind == "SD3Transformer2DModel":
        texts = (_SD3_L, _SD3_G, *([_SD3_T5] if _SD3_T5.marker in names else []))
        without = {} if _SD3_T5 in texts else {"text_encoder_3": _NOTHING, "tokenizer_3": _NOTHING}
        scales = {"scaling_factor": 1.5305, "shift_factor": 0.0609}
        index = {"image_encoder": _NOTHING, "feature_extractor": _NOTHING, **without}
        return SingleFilePipeline("StableDiffusion3Pipeline", "transformer", "vae", texts, scales, index)
    if kind == "FluxTransformer2DModel":
        scales = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
        index = {"image_encoder": _NOTHING, "feature_extractor": _NOTHING}
        return SingleFilePipeline("FluxPipeline", "transformer", "vae", (_FLUX_L, _FLUX_T5), scales, index)
    if kind != "UNet2DConditionModel":
        return None
    if CLASSES in names:
        return SingleFilePipeline("LatentClassPipeline", "unet", "vae", vae={"scaling_factor": 1.0}, by_class=True)
    channels = config["in_channels"]
    if channels not in (4, 8, 9) or config.get("class_embed_type") is not None:
        return None
    if config.get("addition_embed_type") == "text_time":
        index = {"image_encoder": _NOTHING, "feature_extractor": _NOTHING}
        if _REFINER_G.marker in names or config["cross_attention_dim"] == 1280:
            index |= {"text_encoder": _NOTHING, "tokenizer": _NOTHING, "requires_aesthetics_score": True}
            index["force_zeros_for_empty_prompt"] = False
            name = "StableDiffusionXLImg2ImgPipeline"
            return SingleFilePipeline(name, "unet", "vae", (_REFINER_G,), _XL_SCALE, index)
        index["force_zeros_for_empty_prompt"] = True
        name = _XL_CLASSES.get(channels, "StableDiffusionXLPipeline")
        return SingleFilePipeline(name, "unet", "vae", (_XL_L, _XL_G), _XL_SCALE, index)
    text = _OPEN_H if _OPEN_H.marker in names or config["cross_attention_dim"] == 1024 else _CLIP_L
    name = _SD_CLASSES.get(channels, "StableDiffusionPipeline")
    index = {**_SD_INDEX, "image_encoder": _NOTHING}
    return SingleFilePipeline(name, "unet", "vae", (text,), {"scaling_factor": 0.18215}, index)
