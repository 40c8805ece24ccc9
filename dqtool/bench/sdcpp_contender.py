"""stable-diffusion.cpp as a contender: its command `sd-cli`, with weights at q8_0, and the times that its log tells.

It takes Stable Diffusion 1.x as a whole pipeline, so that a random text encoder and autoencoder stand beside the network.
Its log says how long sampling took; with guidance a step evaluates both halves, the work of our batch of two.
"""

from __future__ import annotations

import re
import resource
import shutil
import subprocess
from pathlib import Path
from typing import Any

from dqtool.bench.float_contenders import prepare_float
from dqtool.bench.subject import Subject
from dqtool.errors import ArtifactError, EnvironmentFault

__all__ = ["NAME", "find_command", "measure_sdcpp", "prepare_sdcpp", "read_log"]

NAME = "sdcpp-q8_0"
COMMANDS = ("sd-cli", "sd")
STEPS = 3
MIB = 1 << 20
CLASS = "UNet2DConditionModel"
CONTEXT = 768
FIX = "Build github.com/leejet/stable-diffusion.cpp with -DCMAKE_BUILD_TYPE=Release, and put its sd-cli on the PATH"

_SAMPLING = re.compile(r"sampling completed, taking ([0-9.]+)s")
_BUFFER = re.compile(r"(?:unet|diffusion)[^\n]*?(?:compute|params backend) buffer[^\n]*?([0-9.]+) ?MB", re.IGNORECASE)


def read_log(text: str, steps: int) -> tuple[float, int | None]:
    """Return seconds of one step, and bytes of the network's buffers (None where the log does not tell them).

    Raises:
        EnvironmentFault: the log has no time, because the program failed.
    """
    found = _SAMPLING.findall(text)
    if not found:
        last = next((line for line in reversed(text.splitlines()) if line.strip()), "it printed nothing")
        raise EnvironmentFault(f"stable-diffusion.cpp did not sample: {last.strip()[:300]}", where=NAME, fix=FIX)
    buffers = [float(size) for size in _BUFFER.findall(text)]
    return float(found[-1]) / steps, int(sum(buffers) * MIB) if buffers else None


def find_command() -> str:
    """Return the path of `sd-cli`.

    Raises:
        EnvironmentFault: it is missing.
    """
    found = next((path for name in COMMANDS if (path := shutil.which(name))), None)
    if found is None:
        raise EnvironmentFault(f"The contender {NAME} needs the command sd-cli", where="--against", fix=FIX)
    return found


def _folder(subject: Subject) -> Path:
    return Path(subject.workspace) / "sdcpp"


def prepare_sdcpp(subject: Subject) -> None:
    """Write the network, a random text encoder and a random autoencoder, and convert the network to q8_0.

    Raises:
        EnvironmentFault: `sd-cli` is missing.
        ArtifactError: the network is not Stable Diffusion 1.x.
    """
    command = find_command()
    if subject.class_name != CLASS or subject.config.get("cross_attention_dim") != CONTEXT:
        raise ArtifactError(
            "stable-diffusion.cpp runs Stable Diffusion 1.x here, and this network is another",
            where=f"--against {NAME}",
            fix="Leave it out",
        )
    import torch
    from diffusers import AutoencoderKL
    from safetensors.torch import save_file
    from transformers import CLIPTextConfig, CLIPTextModel

    prepare_float(subject)
    folder = _folder(subject)
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    text = CLIPTextModel(
        CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    )
    save_file({k: v.half().contiguous() for k, v in text.state_dict().items()}, folder / "clip_l.safetensors")
    blocks = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    vae: Any = AutoencoderKL(
        down_block_types=blocks[0],
        up_block_types=blocks[1],
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
    )
    save_file({k: v.half().contiguous() for k, v in vae.state_dict().items()}, folder / "vae.safetensors")
    weights = next(subject.float_directory.glob("*.safetensors"))
    done = subprocess.run(
        [command, "-M", "convert", "-m", str(weights), "-o", str(folder / "unet.gguf"), "--type", "q8_0"],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise EnvironmentFault(f"sd-cli could not convert the network: {done.stderr[-300:]}", where=NAME, fix=FIX)


def measure_sdcpp(subject: Subject, _batch: int, _seconds: float) -> dict[str, Any]:
    """Sample one image with guidance, and return the figures of `Alone`.

    Processor seconds are the program's, shared among the steps, but no more than all threads have in a step."""
    folder, size = _folder(subject), int(subject.config.get("sample_size", 64)) * 8
    network = folder / "unet.gguf"
    command = [
        find_command(), "--diffusion-model", str(network), "--clip_l", str(folder / "clip_l.safetensors"), "--vae",
        str(folder / "vae.safetensors"), "-p", "a picture", "--steps", str(STEPS), "--cfg-scale", "7.5", "-W", str(size),
        "-H", str(size), "-t", str(subject.threads), "-o", str(folder / "out.png"), "-v",
    ]  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    wall, buffers = read_log(done.stdout, STEPS)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "wall": wall,
        "processor": min(wall * subject.threads, used / STEPS),
        "calls": STEPS,
        "peak_bytes": buffers,
        "file_bytes": network.stat().st_size,
    }
