"""Published models by name: their networks at full size, without weights. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from dqtool.artifacts.jsonvalues import ForeignConfig
from dqtool.errors import UsageError

__all__ = ["ARCHITECTURES", "Architecture", "architecture"]


@dataclass(frozen=True)
class Architecture:
    """A published network: its diffusers config and its published parameter counts and sampling settings.

    `parameters` is the published count of the network alone, `first_stage` that of the autoencoder (0 for pixel models).
    `batch` is the batch of one forward pass in deployment (2 under classifier-free guidance), `context` the shape of one
    sample's `encoder_hidden_states`. `steps`, `guidance` and `eta` are the sampling settings of arXiv 2409.14307.
    """

    name: str
    title: str
    class_name: str
    config: ForeignConfig = field(repr=False)
    parameters: int
    steps: int
    first_stage: int = 0
    batch: int = 1
    context: tuple[int, int] | None = None
    guidance: float | None = None
    eta: float = 0.0
    scheduler: ForeignConfig = field(default_factory=dict, repr=False)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Shape `(C, H, W)` of one input sample."""
        size = self.config["sample_size"]
        return self.config["in_channels"], size, size

    def network_config(self) -> ForeignConfig:
        """Return the config as a `config.json` holds it, class name included."""
        return {"_class_name": self.class_name, **self.config}


def architecture(name: str) -> Architecture:
    """Return the architecture called `name`.

    Raises:
        UsageError: no architecture has this name.
    """
    if name not in ARCHITECTURES:
        raise UsageError(
            f"There is no architecture '{name}'", where="--arch", fix=f"Known: {', '.join(sorted(ARCHITECTURES))}"
        )
    return ARCHITECTURES[name]


def _betas(schedule: str, start: float, end: float) -> ForeignConfig:
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_schedule": schedule,
        "beta_start": start,
        "beta_end": end,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }


_ENTRIES = (
    Architecture(
        name="ddpm-cifar10",
        title="DDPM, CIFAR-10 32x32 (google/ddpm-cifar10-32)",
        class_name="UNet2DModel",
        parameters=35_750_000,
        steps=100,
        config={
            "sample_size": 32,
            "in_channels": 3,
            "out_channels": 3,
            "center_input_sample": False,
            "time_embedding_type": "positional",
            "freq_shift": 1,
            "flip_sin_to_cos": False,
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
            "block_out_channels": [128, 256, 256, 256],
            "layers_per_block": 2,
            "mid_block_scale_factor": 1,
            "downsample_padding": 0,
            "act_fn": "silu",
            "attention_head_dim": None,
            "norm_num_groups": 32,
            "norm_eps": 1e-6,
        },
        scheduler={**_betas("linear", 0.0001, 0.02), "clip_sample": True, "steps_offset": 0, "set_alpha_to_one": True},
    ),
    Architecture(
        name="ldm4-bedroom",
        title="LDM-4, LSUN-Bedroom 256x256",
        class_name="UNet2DModel",
        parameters=274_060_000,
        first_stage=55_320_000,
        steps=100,
        eta=1.0,
        config={
            "sample_size": 64,
            "in_channels": 3,
            "out_channels": 3,
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
            "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
            "block_out_channels": [224, 448, 672, 896],
            "layers_per_block": 2,
            "attention_head_dim": 32,
            "norm_num_groups": 32,
            "norm_eps": 1e-5,
        },
        scheduler=_betas("scaled_linear", 0.0015, 0.0195),
    ),
    Architecture(
        name="ldm8-church",
        title="LDM-8, LSUN-Church 256x256",
        class_name="UNet2DModel",
        parameters=294_960_000,
        first_stage=83_650_000,
        steps=100,
        config={
            "sample_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "down_block_types": [*["AttnDownBlock2D"] * 4, "DownBlock2D"],
            "up_block_types": ["ResnetUpsampleBlock2D", *["AttnUpBlock2D"] * 4],
            "block_out_channels": [192, 384, 384, 768, 768],
            "layers_per_block": 2,
            "downsample_type": "resnet",
            "upsample_type": "resnet",
            "resnet_time_scale_shift": "scale_shift",
            "attention_head_dim": 24,
            "norm_num_groups": 32,
            "attn_norm_num_groups": 32,
            "norm_eps": 1e-5,
            "original": {"attention_heads": 8},
        },
        scheduler=_betas("scaled_linear", 0.0015, 0.0155),
    ),
    Architecture(
        name="ldm4-imagenet",
        title="LDM-4, ImageNet 256x256, class-conditional",
        class_name="UNet2DConditionModel",
        parameters=400_920_000,
        first_stage=55_320_000,
        steps=20,
        batch=2,
        context=(1, 512),
        guidance=3.0,
        config={
            "sample_size": 64,
            "in_channels": 3,
            "out_channels": 3,
            "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 3],
            "up_block_types": [*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"],
            "block_out_channels": [192, 384, 576, 960],
            "layers_per_block": 2,
            "cross_attention_dim": 512,
            "attention_head_dim": 1,
            "norm_num_groups": 32,
            "norm_eps": 1e-5,
        },
        scheduler=_betas("scaled_linear", 0.0015, 0.0195),
    ),
    Architecture(
        name="sd14",
        title="Stable Diffusion v1.4, 512x512",
        class_name="UNet2DConditionModel",
        parameters=859_520_000,
        first_stage=83_650_000,
        steps=50,
        batch=2,
        context=(77, 768),
        guidance=7.5,
        config={
            "sample_size": 64,
            "in_channels": 4,
            "out_channels": 4,
            "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
            "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
            "block_out_channels": [320, 640, 1280, 1280],
            "layers_per_block": 2,
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
            "norm_num_groups": 32,
            "norm_eps": 1e-5,
        },
        scheduler=_betas("scaled_linear", 0.00085, 0.012),
    ),
    Architecture(
        name="dit-xl2",
        title="DiT-XL/2, ImageNet 256x256, class-conditional",
        class_name="DiTTransformer2DModel",
        parameters=675_130_000,
        first_stage=83_650_000,
        steps=250,
        batch=2,
        guidance=1.5,
        config={
            "sample_size": 32,
            "in_channels": 4,
            "out_channels": 8,
            "patch_size": 2,
            "num_layers": 28,
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "num_embeds_ada_norm": 1000,
            "attention_bias": True,
            "activation_fn": "gelu-approximate",
            "norm_type": "ada_norm_zero",
            "norm_elementwise_affine": False,
            "norm_num_groups": 32,
            "dropout": 0.0,
        },
        scheduler={**_betas("linear", 0.0001, 0.02), "steps_offset": 0},
    ),
    Architecture(
        name="sd21",
        title="Stable Diffusion v2.1, 768x768",
        class_name="UNet2DConditionModel",
        parameters=865_910_000,
        first_stage=83_650_000,
        steps=50,
        batch=2,
        context=(77, 1024),
        guidance=7.5,
        config={
            "sample_size": 96,
            "in_channels": 4,
            "out_channels": 4,
            "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
            "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
            "block_out_channels": [320, 640, 1280, 1280],
            "layers_per_block": 2,
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
            "norm_num_groups": 32,
            "norm_eps": 1e-5,
        },
        scheduler={**_betas("scaled_linear", 0.00085, 0.012), "prediction_type": "v_prediction"},
    ),
    Architecture(
        name="sdxl",
        title="Stable Diffusion XL 1.0, 1024x1024",
        class_name="UNet2DConditionModel",
        parameters=2_567_460_000,
        first_stage=83_650_000,
        steps=50,
        batch=2,
        context=(77, 2048),
        guidance=5.0,
        config={
            "sample_size": 128,
            "in_channels": 4,
            "out_channels": 4,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "block_out_channels": [320, 640, 1280],
            "layers_per_block": 2,
            "transformer_layers_per_block": [1, 2, 10],
            "cross_attention_dim": 2048,
            "attention_head_dim": [5, 10, 20],
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "norm_num_groups": 32,
            "norm_eps": 1e-5,
        },
        scheduler=_betas("scaled_linear", 0.00085, 0.012),
    ),
    Architecture(
        name="sd3-medium",
        title="Stable Diffusion 3 medium, 1024x1024",
        class_name="SD3Transformer2DModel",
        parameters=2_085_000_000,
        first_stage=83_820_000,
        steps=28,
        batch=2,
        context=(333, 4096),
        guidance=7.0,
        config={
            "sample_size": 128,
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 2,
            "num_layers": 24,
            "num_attention_heads": 24,
            "attention_head_dim": 64,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 192,
        },
        scheduler={"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
    ),
    Architecture(
        name="flux-dev",
        title="FLUX.1-dev, 1024x1024",
        class_name="FluxTransformer2DModel",
        parameters=11_900_000_000,
        first_stage=83_820_000,
        steps=28,
        context=(512, 4096),
        config={
            "in_channels": 64,
            "patch_size": 1,
            "num_layers": 19,
            "num_single_layers": 38,
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
        },
        scheduler={"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "use_dynamic_shifting": True},
    ),
    Architecture(
        name="pixart-alpha",
        title="PixArt-alpha XL/2, 1024x1024",
        class_name="PixArtTransformer2DModel",
        parameters=611_000_000,
        first_stage=83_650_000,
        steps=20,
        batch=2,
        context=(120, 4096),
        guidance=4.5,
        config={
            "sample_size": 128,
            "in_channels": 4,
            "out_channels": 8,
            "patch_size": 2,
            "num_layers": 28,
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "caption_channels": 4096,
            "cross_attention_dim": 1152,
            "num_embeds_ada_norm": 1000,
            "attention_bias": True,
            "activation_fn": "gelu-approximate",
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "norm_num_groups": 32,
            "dropout": 0.0,
        },
        scheduler={**_betas("linear", 0.0001, 0.02), "steps_offset": 0},
    ),
)

ARCHITECTURES = {entry.name: entry for entry in _ENTRIES}
"""Architectures by name, as `dqtool bench --arch NAME` takes them."""
