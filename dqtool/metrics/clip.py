"""CLIP score: agreement of images with their prompts (Hessel et al., arXiv 2104.08718), and the embeddings it uses."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dqtool.artifacts.reading import load_json
from dqtool.artifacts.schema import Bounds, find_mismatch
from dqtool.core.device import to_cpu, to_device_of
from dqtool.errors import ArtifactError, DqtoolError, EnvironmentFault
from dqtool.models.sources.library_models import (
    check_model_directory,
    check_token_numbers,
    library_faults,
    load_library_tokenizer,
)

if TYPE_CHECKING:
    from transformers import CLIPModel

__all__ = ["ClipEncoder", "clip_score"]

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
_DIRECTORY = "Give a CLIPModel directory as transformers writes it, with its tokenizer (such as clip-vit-large-patch14)"


class ClipEncoder:
    """Unit embeddings, of length `features`, of images and texts by a CLIPModel directory.

    Raises:
        EnvironmentFault: the directory does not exist, or `transformers` is not installed.
        ArtifactError: the directory holds no CLIP model.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.given = os.fspath(path)
        root = Path(path)
        if not root.is_dir():
            raise EnvironmentFault("There is no such directory", where=self.given, fix=_DIRECTORY)
        self.model = _load_model(root)
        self._tokenizer: Any = None
        config: Any = self.model.config
        self.features: int = config.projection_dim
        self._size: int = config.vision_config.image_size
        self._vocabulary: int = config.text_config.vocab_size
        self._context: int = config.text_config.max_position_embeddings
        self._mean, self._std = MEAN, STD
        preprocessor = root / "preprocessor_config.json"
        if preprocessor.is_file():
            settings = load_json(preprocessor)
            self._mean = _channels(settings.get("image_mean", MEAN), -1e3, str(preprocessor))
            self._std = _channels(settings.get("image_std", STD), 1e-6, str(preprocessor))

    @torch.inference_mode()
    def images(self, images: Tensor) -> Tensor:
        """Return unit embeddings `[N, D]` of `images` uint8 `[N, H, W, 3]`.

        Images are resized (bicubic) to the model's side, cropped to the centre and normalised.
        """
        from PIL import Image
        from PIL.Image import Resampling

        side, prepared = self._size, []
        for image in images:
            picture = Image.fromarray(image.numpy())
            scale = side / min(picture.size)
            # transformers and OpenAI's CLIP truncate the longer side.
            width, height = (max(side, int(length * scale)) for length in picture.size)
            picture = picture.resize((width, height), Resampling.BICUBIC)
            left, top = (width - side) // 2, (height - side) // 2
            prepared.append(torch.from_numpy(_array(picture.crop((left, top, left + side, top + side)))))
        pixels = torch.stack(prepared).permute(0, 3, 1, 2).float() / 255  # [N, 3, side, side]
        pixels = (pixels - torch.tensor(self._mean).view(1, 3, 1, 1)) / torch.tensor(self._std).view(1, 3, 1, 1)
        vision = self.model.vision_model(pixel_values=to_device_of(self.model, pixels))
        return to_cpu(F.normalize(self.model.visual_projection(vision.pooler_output), dim=-1))

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Return unit embeddings `[N, D]` of texts, truncated to the model's context.

        Raises:
            ArtifactError: the directory holds no usable tokenizer.
        """
        if self._tokenizer is None:
            self._tokenizer = _load_tokenizer(self.given)
        with library_faults("The CLIP tokenizer", self.given, _DIRECTORY):
            tokens = self._tokenizer(
                list(texts), padding="max_length", truncation=True, max_length=self._context, return_tensors="pt"
            )
        check_token_numbers(tokens["input_ids"], self._vocabulary, self.given)
        given = to_device_of(self.model, {name: tokens[name] for name in ("input_ids", "attention_mask")})
        text = self.model.text_model(**given)
        return to_cpu(F.normalize(self.model.text_projection(text.pooler_output), dim=-1))


def clip_score(images: Tensor, texts: Tensor) -> Tensor:
    """Return 100 times the cosine of each image and its text, `[N]` float64, from embeddings `[N, D]`."""
    return 100 * F.cosine_similarity(images.double(), texts.double(), dim=-1)


def _channels(values: Any, least: float, where: str) -> tuple[float, float, float]:
    """Return one number for each of three channels, from a file."""
    found = find_mismatch(values, Annotated[list[Annotated[float, Bounds(least, 1e3)]], Bounds(3, 3)])
    if found is not None:
        raise ArtifactError(f"The mean and deviation of a channel must be {found.what}", where=where, fix=_DIRECTORY)
    red, green, blue = values
    return red, green, blue


def _load_model(root: Path) -> CLIPModel:
    """Load the CLIP model of a directory."""
    try:
        from transformers import CLIPModel
    except ImportError as error:
        raise EnvironmentFault(
            "CLIP figures need transformers, which is not installed", fix='Run: pip install "dqtool[text]"'
        ) from error
    try:
        kind = load_json(root / "config.json").get("model_type")
    except DqtoolError as error:
        raise ArtifactError("This directory has no config.json of a model", where=str(root), fix=_DIRECTORY) from error
    if kind != "clip":
        raise ArtifactError(f"This is a model of type {kind}, not clip", where=str(root), fix=_DIRECTORY)
    check_model_directory(CLIPModel, root, str(root))
    with library_faults("The CLIP model", str(root), _DIRECTORY):
        loaded: Any = CLIPModel.from_pretrained(
            root, local_files_only=True, output_loading_info=True, use_safetensors=True
        )
    model, problems = loaded
    if problems["missing_keys"]:
        missing = sorted(problems["missing_keys"])[0]
        raise ArtifactError(f"The CLIP model lacks weights, {missing} among them", where=str(root), fix=_DIRECTORY)
    result: CLIPModel = model.float().eval().requires_grad_(False)
    return result


def _load_tokenizer(given: str) -> Any:
    """Load the tokenizer of a directory."""
    from transformers import CLIPTokenizer

    return load_library_tokenizer(CLIPTokenizer, Path(given), given, _DIRECTORY)


def _array(picture: Any) -> Any:
    import numpy as np

    return np.array(picture, dtype=np.uint8)
