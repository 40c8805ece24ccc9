"""Text encoders of single files as transformers models: configs from shapes, tensors through diffusers' converters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dqtool.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TextEncoder", "build_text_encoder"]

HEAD = 64
"""Channels of a head in every text tower of CLIP and OpenCLIP that these files hold (L, H, bigG) and in T5."""


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder of a pipeline: its component and tokenizer, the prefix of its tensors, and its kind.

    `kind` is "clip" (transformers' names), "openclip" or "t5". `projects`: the pipeline reads its projection. `drops_last`:
    its last block is left out, since SD 2 reads the states before it. `pads` is the padding token of its tokenizer (None:
    the end of the text). `quick`: it uses CLIP's approximation of GELU.
    """

    component: str
    tokenizer: str
    prefix: str
    kind: str
    projects: bool = False
    drops_last: bool = False
    pads: str | None = None
    quick: bool = False

    @property
    def class_name(self) -> str:
        """Return the name of its transformers class."""
        if self.kind == "t5":
            return "T5EncoderModel"
        return "CLIPTextModelWithProjection" if self.projects else "CLIPTextModel"

    @property
    def marker(self) -> str:
        """Return the name of a tensor that every file with this encoder has."""
        if self.kind == "t5":
            return f"{self.prefix}shared.weight"
        if self.kind == "openclip":
            return f"{self.prefix}token_embedding.weight"
        return f"{self.prefix}text_model.embeddings.token_embedding.weight"


def build_text_encoder(which: TextEncoder, state: Mapping[str, Tensor], tokenizer: Any, where: str) -> Any:
    """Return the encoder with its tensors from `state`, in their precision, in eval mode.

    Its special tokens are those of `tokenizer`.

    Raises:
        ArtifactError: tensors are missing, or the tokenizer has more tokens than the encoder.
    """
    import torch
    import transformers

    own = {name: tensor for name, tensor in state.items() if name.startswith(which.prefix)}
    config = _t5(own, which) if which.kind == "t5" else _clip(own, which, tokenizer)
    if len(tokenizer) > config.vocab_size:
        raise ArtifactError(
            f"The tokenizer has {len(tokenizer)} tokens, {which.component} in the file {config.vocab_size}",
            where=where,
            fix="Give the model's own tokenizer with --tokenizer DIR or --pipeline DIR",
        )
    with torch.device("meta"):
        model = getattr(transformers, which.class_name)(config)
    tensors = _converted(own, which, model)
    expected = model.state_dict()
    if which.kind != "t5" and not any(name.startswith("text_model.") for name in expected):
        tensors = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items() if name in expected}
    if which.kind == "t5" and "shared.weight" in tensors:
        tensors |= dict.fromkeys(expected.keys() & {"encoder.embed_tokens.weight"}, tensors["shared.weight"])
    wrong = [n for n, t in expected.items() if n not in tensors or tensors[n].shape != t.shape]
    if wrong:
        raise ArtifactError(
            f"The file's {which.component} lacks '{wrong[0]}', or has it in another shape",
            where=f"{where}, {which.prefix}*",
        )
    model.load_state_dict(tensors, strict=True, assign=True)
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:  # position ids are not part of the state
            parent, _, leaf = name.rpartition(".")
            model.get_submodule(parent).register_buffer(
                leaf, torch.arange(buffer.shape[-1]).expand(buffer.shape).clone(), persistent=False
            )
    return model.eval()


def _clip(own: Mapping[str, Tensor], which: TextEncoder, tokenizer: Any) -> Any:
    from transformers import CLIPTextConfig

    if which.kind == "openclip":
        blocks, positions = f"{which.prefix}transformer.resblocks.", f"{which.prefix}positional_embedding"
        inner = f"{blocks}0.mlp.c_fc.weight"
        projection, axis = own.get(f"{which.prefix}text_projection"), 1
    else:
        blocks = f"{which.prefix}text_model.encoder.layers."
        positions = f"{which.prefix}text_model.embeddings.position_embedding.weight"
        inner = f"{blocks}0.mlp.fc1.weight"
        projection, axis = own.get(f"{which.prefix}text_projection.weight"), 0
    tokens, width = own[which.marker].shape
    layers = len({name[len(blocks) :].split(".")[0] for name in own if name.startswith(blocks)})
    return CLIPTextConfig(
        vocab_size=tokens,
        hidden_size=width,
        intermediate_size=own[inner].shape[0],
        projection_dim=width if projection is None else projection.shape[axis],
        num_hidden_layers=layers - which.drops_last,
        num_attention_heads=max(width // HEAD, 1),
        max_position_embeddings=own[positions].shape[0],
        hidden_act="quick_gelu" if which.quick else "gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _t5(own: Mapping[str, Tensor], which: TextEncoder) -> Any:
    from transformers import T5Config

    tokens, width = own[which.marker].shape
    first = f"{which.prefix}encoder.block.0.layer."
    blocks = f"{which.prefix}encoder.block."
    buckets, heads = own[f"{first}0.SelfAttention.relative_attention_bias.weight"].shape
    gated = f"{first}1.DenseReluDense.wi_0.weight"
    inner = own[gated] if gated in own else own[f"{first}1.DenseReluDense.wi.weight"]
    return T5Config(
        vocab_size=tokens,
        d_model=width,
        d_kv=own[f"{first}0.SelfAttention.q.weight"].shape[0] // heads,
        d_ff=inner.shape[0],
        num_layers=len({name[len(blocks) :].split(".")[0] for name in own if name.startswith(blocks)}),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu" if gated in own else "relu",
    )


def _converted(own: Mapping[str, Tensor], which: TextEncoder, model: Any) -> dict[str, Tensor]:
    """Return the tensors under transformers' names."""
    import torch
    from diffusers.loaders import single_file_utils as conversion

    if which.kind == "openclip":
        result: dict[str, Tensor] = conversion.convert_open_clip_checkpoint(model, dict(own), prefix=which.prefix)
        return result
    plain: dict[str, Tensor] = conversion.convert_ldm_clip_checkpoint(dict(own), which.prefix)
    if which.projects and "text_projection.weight" not in plain:  # files of SD 3 lack CLIP-L's, which has no effect
        width = own[which.marker].shape[1]
        plain["text_projection.weight"] = torch.eye(width, dtype=own[which.marker].dtype)
    return plain
