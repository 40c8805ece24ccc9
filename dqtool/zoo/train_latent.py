"""Train the embedded models that work on latents (`make zoo`), each a diffusers pipeline around the shared autoencoder.

    python -m dqtool.zoo.train_latent ldm|sd|dit [--iters N] [--out DIR]

``ldm`` is a UNet conditioned on a class through cross-attention (LDM-4 ImageNet), ``sd`` one conditioned on a prompt
(Stable Diffusion), ``dit`` a transformer conditioned on a class (DiT-XL/2). One sample in ten is trained without its
condition, for classifier-free guidance. `sampling.json` beside the pipeline says how it is sampled.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dqtool.core.allocator import keep_freed_memory
from dqtool.zoo.data import digits
from dqtool.zoo.fitting import LATENT_SCHEDULE, fit
from dqtool.zoo.prompts import prompt, prompts, write_tokenizer

WEIGHTS = Path(__file__).parent / "weights"
CLASSES = 10
DROPPED = 0.1
"""Share of samples trained without their condition."""

UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (48, 96),
    "cross_attention_dim": 64,
    "attention_head_dim": 4,  # heads, for this class
    "norm_num_groups": 8,
}
LDM = {
    **UNET,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
SD = {
    **UNET,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "projection_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
}
DIT = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "patch_size": 2,
    "num_layers": 6,
    "num_attention_heads": 6,
    "attention_head_dim": 20,
    "num_embeds_ada_norm": CLASSES,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}
CARDS = {
    "ldm": {
        "description": "handwritten digits, 4x8x8 latents, a class through cross-attention",
        "like": "LDM-4 ImageNet",
    },
    "sd": {"description": "handwritten digits, 4x8x8 latents, from a prompt", "like": "Stable Diffusion"},
    "dit": {"description": "handwritten digits, 4x8x8 latents, a transformer with a class", "like": "DiT-XL/2"},
}
GUIDANCE = 1.2
"""Weight of classifier-free guidance. A higher weight makes every digit certain and all of them alike."""


class Conditioned(nn.Module):
    """Denoiser and the module that makes its condition, trained together."""

    def __init__(self, denoiser: Any, conditioner: Any, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.denoiser, self.conditioner, self.call = denoiser, conditioner, call


def build(kind: str, out: Path) -> tuple[Conditioned, Callable[[Tensor], Any]]:
    """Return the modules to train and the function `labels [N] -> condition`; the label `CLASSES` means no condition."""
    from diffusers import DiTTransformer2DModel, UNet2DConditionModel

    if kind == "dit":

        def predict_dit(parts: Conditioned, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            return parts.denoiser(x, timestep=t, class_labels=condition).sample

        return Conditioned(DiTTransformer2DModel(**DIT), None, predict_dit), lambda labels: labels

    conditioner: Any
    if kind == "ldm":
        from dqtool.models.latent_class import ClassEmbedder

        conditioner = ClassEmbedder(classes=CLASSES, dim=LDM["cross_attention_dim"])

        def predict_class(parts: Conditioned, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            context = parts.conditioner(condition)
            return parts.denoiser(x, t, encoder_hidden_states=context).sample

        return Conditioned(UNet2DConditionModel(**LDM), conditioner, predict_class), lambda labels: labels

    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    vocabulary = write_tokenizer(out / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    settings: dict[str, Any] = {"vocab_size": vocabulary, "pad_token_id": tokenizer.pad_token_id, **special, **TEXT}
    conditioner = CLIPTextModel(CLIPTextConfig(**settings))
    texts = [text for digit in range(CLASSES) for text in prompts(digit)] + [""]
    tokens = tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
    each = len(prompts(0))

    def tokens_of(labels: Tensor) -> Tensor:
        rows = labels * each + torch.randint(each, labels.shape)
        return tokens[rows.clamp(max=len(texts) - 1)]

    def predict_text(parts: Conditioned, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        context = parts.conditioner(condition)[0]
        return parts.denoiser(x, t, encoder_hidden_states=context).sample

    return Conditioned(UNet2DConditionModel(**SD), conditioner, predict_text), tokens_of


def pipeline_of(kind: str, parts: Conditioned, autoencoder: Any, out: Path) -> Any:
    """Return the diffusers pipeline of trained modules in float16."""
    from diffusers import DDIMScheduler, DiTPipeline, StableDiffusionPipeline

    parts = copy.deepcopy(parts).half()
    scheduler = DDIMScheduler(**LATENT_SCHEDULE)
    if kind == "dit":
        names = {i: str(i) for i in range(CLASSES)}
        return DiTPipeline(parts.denoiser, autoencoder, scheduler, id2label=names)
    if kind == "ldm":
        from dqtool.models.latent_class import LatentClassPipeline

        return LatentClassPipeline(
            unet=parts.denoiser, vae=autoencoder, class_embedder=parts.conditioner, scheduler=scheduler
        )
    from transformers import CLIPTokenizer

    return StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=parts.conditioner,
        tokenizer=CLIPTokenizer.from_pretrained(out / "tokenizer"),
        unet=parts.denoiser,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def train(kind: str, out: Path, iters: int, batch_size: int, lr: float, seed: int) -> None:
    """Train from scratch and write a diffusers pipeline directory to `out` (also every 1000 iterations)."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    images, labels = digits()["train"]
    autoencoder: Any = AutoencoderKL.from_pretrained(WEIGHTS / "digits-autoencoder").float().requires_grad_(False)
    latents = autoencoder.encode(images).latent_dist.mode() * autoencoder.config.scaling_factor
    parts, condition_of = build(kind, out)

    def draw(n: int) -> tuple[Tensor, Callable[[Conditioned, Tensor, Tensor], Tensor]]:
        chosen = torch.randint(len(latents), (n,))
        given = torch.where(torch.rand(n) < DROPPED, CLASSES, labels[chosen])
        condition = condition_of(given)
        return latents[chosen], lambda modules, x, t: modules.call(modules, x, t, condition)

    stored: Any = AutoencoderKL.from_pretrained(WEIGHTS / "digits-autoencoder", torch_dtype=torch.float16)
    stored.register_to_config(_name_or_path="digits-autoencoder")  # not a path of the machine it was trained on

    def save(average: Conditioned) -> None:
        pipeline_of(kind, average, stored, out).save_pretrained(out)
        sampling: dict[str, Any] = {"guidance": GUIDANCE}
        if kind == "sd":
            sampling["prompts"] = [[prompt(digit), digit] for digit in range(CLASSES)]
        (out / "sampling.json").write_text(json.dumps(sampling, indent=1) + "\n")
        (out / "card.json").write_text(json.dumps(CARDS[kind], indent=1) + "\n")

    fit(parts, draw, save, iters=iters, batch_size=batch_size, lr=lr)


def main() -> None:
    """Parse the command line and train."""
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=sorted(CARDS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--iters", type=int, default=3500)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    out = args.out or WEIGHTS / f"digits-{args.kind}"
    train(args.kind, out, args.iters, args.batch_size, args.lr, args.seed)


if __name__ == "__main__":
    main()
