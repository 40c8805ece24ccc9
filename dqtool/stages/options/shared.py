"""Options that several stages take, declared once."""

from __future__ import annotations

from dqtool.stages.options.declared import Option

__all__ = [
    "ARTIFACT",
    "CONDITIONS",
    "CORRECT_NOISE",
    "GUIDANCE",
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
    "The stage before's output. Left out: a line from a pipe, else that stage's default name.", positional=True
)
GUIDANCE = Option(
    "Weight of classifier-free guidance; left out: as calibrated, or as the model's card says.", "F", least=0
)
PROMPTS = Option("Prompts, one a line; left out: those of the model's card.", "FILE")
CONDITIONS = Option(
    "Precomputed conditions, .safetensors or .npz: NAME [K, ...] for each and, for guidance, null.NAME [1, ...].",
    "FILE",
)
PIPELINE = Option("A pipeline whose text encoders and tokenizers encode the prompts.", "DIR")
RANDOM_CONDITIONS = Option("Allow random conditions for a model without text encoder; costs quality.")
INCEPTION_WEIGHTS = Option("For fid, sfid, is, pr: FID's Inception network, .pth, .pt or .pb.", "FILE")
IMAGE_SIZE = Option("Measure the centre N x N, the shorter side brought to N (COCO: 300).", "N", least=1)
CORRECT_NOISE = Option("Take quantization's part out of predicted noise (PTQD), as measured first.")
OUTPUT = Option("Where to write.", "FILE", short="-o")
OUTPUT_DIRECTORY = Option("The directory to write.", "DIR", short="-o")
