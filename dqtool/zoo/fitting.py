"""Training loop of the embedded models: denoising with a moving average of the weights. An interrupted run goes on."""

from __future__ import annotations

import copy
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)

__all__ = ["LATENT_SCHEDULE", "PIXEL_SCHEDULE", "SCHEDULE", "fit"]

SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
"""Training schedule: v-prediction under a cosine schedule. With such small images and 20 steps both matter more than
the architecture."""

SAVED_EVERY = 1000
"""Iterations between two saves."""

PIXEL_SCHEDULE = {**SCHEDULE, "timestep_spacing": "trailing"}
LATENT_SCHEDULE = {**PIXEL_SCHEDULE, "clip_sample": False, "steps_offset": 1}
"""Schedules of the stored pipelines in pixels and in latents, which have no bounds."""


def fit(
    modules: M,
    draw: Callable[[int], tuple[Tensor, Callable[[M, Tensor, Tensor], Tensor]]],
    save: Callable[[M], None],
    *,
    iters: int,
    batch_size: int,
    lr: float,
    state: Path | None = None,
    half: bool = False,
) -> None:
    """Train `modules` to predict the velocity; call `save` with the moving average every `SAVED_EVERY` iterations and at the
    end.

    `draw(n)` returns clean samples `[n, C, H, W]` and the function `(modules, x_t, t) -> prediction` for them. All are on
    the device of `modules`. With `state` the run is kept in that file as often, and goes on from it. `half`
    computes products in bfloat16.
    """
    from diffusers import DDPMScheduler

    average = copy.deepcopy(modules).requires_grad_(False)
    scheduler: Any = DDPMScheduler(**SCHEDULE)
    optimizer = torch.optim.AdamW(modules.parameters(), lr=lr, weight_decay=1e-4, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=iters, pct_start=0.05)
    parts: dict[str, Any] = {"modules": modules, "average": average, "optimizer": optimizer, "schedule": schedule}
    first = 1
    if state is not None and state.is_file():
        kept = torch.load(state, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(kept[name])
        torch.set_rng_state(kept["random"])
        first = kept["step"] + 1
        print(f"{state}: goes on at iteration {first}", file=sys.stderr)
    device = next(modules.parameters()).device
    start, running = time.time(), 0.0
    for step in range(first, iters + 1):
        x, predict = draw(batch_size)
        noise = torch.randn_like(x)
        # One timestep per stratum of [0, 1000): lower gradient variance than independent draws.
        t = ((torch.arange(batch_size) + torch.rand(batch_size)) / batch_size * 1000).long().to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            predicted = predict(modules, scheduler.add_noise(x, noise, t), t)
        loss = F.mse_loss(predicted.float(), scheduler.get_velocity(x, noise, t))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(0.999, step / (step + 20))
        with torch.no_grad():
            for a, p in zip(average.parameters(), modules.parameters(), strict=True):
                a.lerp_(p, 1 - decay)
        running += loss.item()
        if step % 100 == 0:
            rate = (step - first + 1) / (time.time() - start)
            print(f"{step}/{iters} loss {running / 100:.4f} eta {(iters - step) / rate:.0f} s", file=sys.stderr)
            running = 0.0
        if step % SAVED_EVERY == 0 or step == iters:
            save(average)
            if state is not None:
                kept = {name: part.state_dict() for name, part in parts.items()}
                partial = state.with_name(state.name + ".partial")
                torch.save(kept | {"random": torch.get_rng_state(), "step": step}, partial)
                os.replace(partial, state)
