"""Inputs that `make fuzz` found and that ended in a traceback once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dqtool.errors import ArtifactError
from dqtool.metrics.batches import ImageFolder
from dqtool.models.conditions.conditioning import Request
from dqtool.models.conditions.external import ConditionSource
from dqtool.models.families import FAMILIES
from dqtool.models.sources.lora import lora_delta


def test_conditions_in_the_other_byte_order(tmp_path: Path) -> None:
    path = tmp_path / "c.npz"
    np.savez(path, class_labels=np.arange(3, dtype=np.int64).astype(np.dtype(np.int64).newbyteorder()))
    config = {"sample_size": 8, "in_channels": 1, "num_class_embeds": 4}
    with pytest.raises(ArtifactError, match="no .npz file of numbers"):
        ConditionSource(str(path)).conditions(FAMILIES["UNet2DModel"], config, Request(2), None)


@pytest.mark.parametrize(("up", "down"), [((0, 2), (2, 9)), ((8, 0), (0, 9)), ((8, 2), (2, 0)), ((0,), (2, 9))])
def test_lora_factors_without_rows(up: tuple[int, ...], down: tuple[int, ...]) -> None:
    with pytest.raises(ArtifactError, match="no two matrices"):
        lora_delta(torch.zeros(down), torch.zeros(up), torch.Size((8, 9)), "here")


def test_an_image_whose_parser_raises_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    Image.new("RGB", (4, 4)).save(tmp_path / "a.tiff")

    def load(_self: object) -> None:
        raise TypeError("'float' object cannot be interpreted as an integer")

    monkeypatch.setattr("PIL.TiffImagePlugin.TiffImageFile.load", load)
    with pytest.raises(ArtifactError, match="can't be read"):
        list(ImageFolder(tmp_path).read(1))
