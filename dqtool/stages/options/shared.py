"""Options that several stages take, declared once."""

from __future__ import annotations

from dqtool.stages.options.declared import INPUT, Option

__all__ = [
    "ARTIFACT",
    "BATCH_HELP",
    "CONDITIONS",
    "CORRECTION",
    "CORRECT_NOISE",
    "GUIDANCE",
    "IMAGES",
    "IMAGE_SIZE",
    "INCEPTION_WEIGHTS",
    "LARGEST_SEED",
    "OUTPUT",
    "OUTPUT_DIRECTORY",
    "PIPELINE",
    "PROMPTS",
    "RANDOM_CONDITIONS",
]

LARGEST_SEED = 2**32 - 1

ARTIFACT = Option(
    "Output of the stage before. Default: the path that a pipe brings, else that stage's default output.",
    positional=True,
)
GUIDANCE = Option(
    "Weight of classifier-free guidance; higher follows prompts and classes more closely. Default: the value of the "
    "calibration, else that of the model's card.",
    "F",
    least=0,
)
PROMPTS = Option("Text file with one prompt a line. Default: the prompts of the model's card.", "FILE", panel=INPUT)
CONDITIONS = Option(
    "Precomputed conditions in .safetensors or .npz: a tensor NAME [K, ...] for each argument of the network and, "
    "for guidance, null.NAME [1, ...]. Give it when the text encoders are not at hand.",
    "FILE",
    panel=INPUT,
)
PIPELINE = Option(
    "Pipeline whose text encoders and tokenizers encode the prompts. Give it when the model has none.",
    "DIR",
    panel=INPUT,
)
IMAGES = Option(
    "Folder of images. Inpainting and editing networks get them beside their latents. For other networks, a half more "
    "trajectories begin at noised images, as img2img does: give it to calibrate a model that will start from images.",
    "DIR",
    panel=INPUT,
)
RANDOM_CONDITIONS = Option("Accept random conditions for a model without a text encoder. This costs quality.")
INCEPTION_WEIGHTS = Option(
    "File of FID's Inception network: .pth, .pt or .pb. The metrics fid, sfid, is and pr need it.", "FILE", panel=INPUT
)
IMAGE_SIZE = Option(
    "Side of the images that are measured: the shorter side is resized to N and the centre cropped (COCO: 300).",
    "N",
    least=1,
)
CORRECT_NOISE = Option(
    "Remove the quantization error from the predicted noise, as measured in a first pass (PTQD). Needs the "
    "full-precision model."
)
CORRECTION = Option(
    "Correction of predictions by the tables that distill fitted: on, off, or auto, which leaves it out for samplers that "
    "it harms, such as plms in place of ddim. Give off to see what it gains.",
    "NAME",
)
OUTPUT = Option("File to write. Its manifest is written next to it.", "FILE", short="-o", panel=INPUT)
OUTPUT_DIRECTORY = Option("Directory to write.", "DIR", short="-o", panel=INPUT)
BATCH_HELP = "Images sampled together at most; large networks take fewer. Lower it when memory runs out."
"""Help of the option `--batch-size`, which each stage declares with its own default."""
