"""Model card of an exported directory: how it is loaded, and what it was calibrated and corrected for."""

from __future__ import annotations

from collections.abc import Mapping

from dqtool.artifacts import Manifest
from dqtool.models.sampling.fitted import FITTED, fitted_with, sentence

__all__ = ["model_card"]

_HEAD = """---
library_name: diffusers
tags: [dqtool, quantized]
---

# {title}

A diffusion model that [dqtool](https://arxiv.org/abs/2409.14307) quantized (`--format {format}`).
"""
_LOAD = """
```python
import dqtool
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("DIRECTORY")
```
"""
_LOAD_COMPONENT = """
```python
import dqtool

network = dqtool.load("DIRECTORY")
```
"""
_FITTED = """
At each step the network corrects its predictions by a few numbers, which were fitted with {fitted}.
A pipeline with a scheduler that this harms (PNDM) or that was not measured runs without the correction and warns. `dqtool
sample` and `dqtool eval` do the same; `--correction on` or `DqtoolConfig(correction="on")` keeps it.
"""


def model_card(manifest: Manifest, format_name: str, bits: str, corrected: bool) -> str:
    """Return the text of `README.md`. `manifest` is that of the distilled artifact, `bits` its label."""
    text = _HEAD.format(title=f"{manifest.network.class_name} at {bits}", format=format_name)
    if format_name == "dq":
        text += (
            _LOAD if manifest.pipeline is not None and manifest.pipeline.model_index is not None else _LOAD_COMPONENT
        )
    sampling = manifest.sampling
    if sampling is not None:
        text += f"\nIts quantizers were calibrated with {sentence(fitted_with(sampling))}.\n"
    fitted = manifest.metrics.as_read.get(FITTED)
    if corrected and isinstance(fitted, Mapping):
        text += _FITTED.format(fitted=sentence(fitted))
    return text
