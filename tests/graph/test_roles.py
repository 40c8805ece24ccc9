"""Roles follow the data, whatever layers are called."""

from __future__ import annotations

from diffusers import UNet2DModel
from helpers import NETWORK

from dqtool.models.families import FAMILIES


def test_roles_of_a_unet() -> None:
    model = UNet2DModel(**NETWORK).eval()
    roles = FAMILIES["UNet2DModel"].graph(model, model.config).roles
    names = [name for name, _ in model.named_modules()]
    projections = {name for name in names if name.endswith("time_emb_proj")}
    assert set(roles.temporal) == projections | {"time_embedding.linear_1", "time_embedding.linear_2"}
    assert set(roles.temporal_ends) == projections
    assert set(roles.shortcuts) == {name for name in names if name.endswith("conv_shortcut")}
    assert set(roles.resized) == {name for name in names if name.endswith("upsamplers.0.conv")}
