"""Layouts of Stable Diffusion 3 and FLUX.1: config from shapes, tensors through diffusers' own converters."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from dqtool.artifacts.jsonvalues import ForeignConfig
from dqtool.errors import ArtifactError
from dqtool.models.sources.original.layout import Description, Known, Layout, Shapes, register
from dqtool.models.sources.original.openai_unet import PREFIX

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FluxFile", "StableDiffusion3File"]

_FLUX_WIDTH = 3072
"""Width of the networks that diffusers' converter supports."""

_BESIDE = ("text_encoders.", "first_stage_model.", "vae.", "model_ema.")


class SingleFileTransformer(Layout):
    """Layout of a transformer under bare names or `model.diffusion_model.`, in a file that may hold encoders and decoder."""

    class_name: ClassVar[str]

    def network(self, names: Iterable[str]) -> set[str]:
        """Return the names without those of text encoders and autoencoder."""
        names = set(names)
        inside = {name for name in names if name.startswith(PREFIX)}
        return inside or {name for name in names if not name.startswith(_BESIDE)}

    def describe(self, shapes: Shapes, known: Known, where: str) -> Description:
        """Return config and schedule of the published models of these shapes.

        Raises:
            ArtifactError: the shapes are not those of this kind of network.
        """
        network = {name.removeprefix(PREFIX): shapes[name] for name in self.network(shapes)}
        try:
            config: ForeignConfig = dict(known.config) if known.config is not None else self.config(network, where)
        except KeyError as error:
            raise ArtifactError(f"The checkpoint lacks the tensor {error} of a {self.title}", where=where) from error
        return Description({"_class_name": self.class_name, **config}, self.schedule(network))

    def convert(self, state: Mapping[str, Tensor], config: ForeignConfig, where: str) -> dict[str, Tensor]:
        """Convert the tensors with the converter of diffusers' `from_single_file` for the class."""
        from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

        network = {name.removeprefix(PREFIX): state[name] for name in self.network(state)}
        functions: Any = SINGLE_FILE_LOADABLE_CLASSES[self.class_name]
        result: dict[str, Tensor] = functions["checkpoint_mapping_fn"](network, config=dict(config))
        return result

    @abstractmethod
    def config(self, network: Shapes, where: str) -> ForeignConfig:
        """Return the network's config from the shapes of its tensors under their bare names."""

    @abstractmethod
    def schedule(self, network: Shapes) -> ForeignConfig:
        """Return the flow schedule of the published models."""


@register
class StableDiffusion3File(SingleFileTransformer):
    """`MMDiTX`: Stable Diffusion 3 and 3.5."""

    name = "stable-diffusion-3"
    title = "Stable Diffusion 3"
    class_name = "SD3Transformer2DModel"

    def matches(self, shapes: Shapes) -> bool:
        """Return whether the network has joint blocks."""
        name = "joint_blocks.0.context_block.adaLN_modulation.1.bias"
        return name in shapes or PREFIX + name in shapes

    def config(self, network: Shapes, where: str) -> ForeignConfig:
        """Return the config; heads are as wide as the norms of q and k, or 64 without norms, as in `MMDiT`."""
        width, channels, patch, _ = network["x_embedder.proj.weight"]
        blocks = _count(network, "joint_blocks.")
        norm = "joint_blocks.0.x_block.attn.ln_q.weight"
        head = network[norm][0] if norm in network else 64
        if width % head:
            raise ArtifactError(f"{width} channels don't divide into heads of {head}", where=where)
        positions = math.isqrt(network["pos_embed"][1])
        return {
            "sample_size": 128,
            "patch_size": patch,
            "in_channels": channels,
            "num_layers": blocks,
            "attention_head_dim": head,
            "num_attention_heads": width // head,
            "joint_attention_dim": network["context_embedder.weight"][1],
            "caption_projection_dim": network["context_embedder.weight"][0],
            "pooled_projection_dim": network["y_embedder.mlp.0.weight"][1],
            "out_channels": network["final_layer.linear.weight"][0] // patch**2,
            "pos_embed_max_size": positions,
            "dual_attention_layers": [
                block for block in range(blocks) if f"joint_blocks.{block}.x_block.attn2.qkv.weight" in network
            ],
            "qk_norm": "rms_norm" if norm in network else None,
        }

    def schedule(self, network: Shapes) -> ForeignConfig:
        """Return flow matching with a shift of 3."""
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}


@register
class FluxFile(SingleFileTransformer):
    """FLUX.1: dev and its editing variants (guidance is an input), schnell (no guidance)."""

    name = "flux"
    title = "FLUX.1"
    class_name = "FluxTransformer2DModel"

    def matches(self, shapes: Shapes) -> bool:
        """Return whether double blocks have their own modulations and there is pooled text; FLUX.2 and Chroma lack both."""
        names = ("double_blocks.0.img_mod.lin.weight", "vector_in.in_layer.weight")
        return all(name in shapes or PREFIX + name in shapes for name in names)

    def config(self, network: Shapes, where: str) -> ForeignConfig:
        """Return the config; heads are as wide as the norms of q and k."""
        width, channels = network["img_in.weight"]
        head = network["double_blocks.0.img_attn.norm.key_norm.scale"][0]
        if (width, head) != (_FLUX_WIDTH, 128):
            raise ArtifactError(
                f"diffusers converts FLUX.1 files of {_FLUX_WIDTH} channels in heads of 128; this one has {width} in heads "
                f"of {head}",
                where=where,
                fix="Give the model as a diffusers directory",
            )
        out = network["final_layer.linear.weight"][0]
        return {
            "patch_size": 1,
            "in_channels": channels,
            "out_channels": None if out == channels else out,
            "num_layers": _count(network, "double_blocks."),
            "num_single_layers": _count(network, "single_blocks."),
            "attention_head_dim": head,
            "num_attention_heads": width // head,
            "joint_attention_dim": network["txt_in.weight"][1],
            "pooled_projection_dim": network["vector_in.in_layer.weight"][1],
            "guidance_embeds": "guidance_in.in_layer.weight" in network,
            "axes_dims_rope": [16, 56, 56],
        }

    def schedule(self, network: Shapes) -> ForeignConfig:
        """Return the flow schedule: dev shifts by the size of the image, schnell not at all."""
        flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
        if "guidance_in.in_layer.weight" not in network:
            return {**flow, "shift": 1.0, "use_dynamic_shifting": False}
        return {**flow, "shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}


def _count(network: Shapes, prefix: str) -> int:
    """Return the number of numbered blocks under `prefix`."""
    return len({name[len(prefix) :].split(".")[0] for name in network if name.startswith(prefix)})
