"""Extend diffusers with dqtool's quantizer when, and only when, diffusers is imported."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

__all__ = ["install"]


def _register_quantizer(auto: ModuleType) -> None:
    started = sys.modules.get("dqtool.runtimes.quantizer")
    if started is not None and not hasattr(started, "READY"):
        return  # it imports diffusers itself, and registers at its end
    from dqtool.runtimes.quantizer import register

    register(auto)


def _register_in_transformers(auto: ModuleType) -> None:
    if "dqtool.runtimes.quantizer" not in sys.modules:
        return  # diffusers is not in use: it registers here when it is imported
    from dqtool.runtimes.quantizer import register_in_transformers

    register_in_transformers(auto)


def _register_runs(pipeline_utils: ModuleType) -> None:
    from dqtool.models.hub.pipeline_runs import register

    register(pipeline_utils)


def _register_adapters(config: ModuleType) -> None:
    from dqtool.models.hub.adapters import register

    register(config)


def _refuse_other_kinds(loaders: ModuleType) -> None:
    from dqtool.models.hub.adapters import refuse_other_kinds

    refuse_other_kinds(loaders)


def _copy_float_weights(module: ModuleType) -> None:
    from dqtool.models.hub.derived import copy_float_weights

    copy_float_weights(module)


DERIVED = (
    *(
        f"controlnets.controlnet{name}"
        for name in ("", "_union", "_xs", "_sparsectrl", "_sd3", "_flux", "_qwenimage", "_hunyuan", "_z_image")
    ),
    "unets.unet_motion_model",
)
"""Modules below `diffusers.models` whose classes start from the weights of a denoiser."""

TARGETS = {
    "diffusers.quantizers.auto": _register_quantizer,
    "diffusers.pipelines.pipeline_utils": _register_runs,
    "transformers.quantizers.auto": _register_in_transformers,
    "peft.tuners.lora.config": _register_adapters,
    "diffusers.loaders.lora_pipeline": _refuse_other_kinds,
    "diffusers.loaders.peft": _refuse_other_kinds,
    **{f"diffusers.models.{name}": _copy_float_weights for name in DERIVED},
}
"""Modules of diffusers, transformers and peft and what is done with each once it has been imported: they hold the tables of
quantizers, the pipelines' base class, and the settings of LoRA."""


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the other finders find the modules of `TARGETS` and wraps their loaders."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in TARGETS:
            return None
        for finder in sys.meta_path:
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(fullname, path, target)
                if spec is not None and spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                    return spec
        return None


class _Loader(importlib.abc.Loader):
    def __init__(self, inner: importlib.abc.Loader) -> None:
        self.inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        TARGETS[module.__name__](module)


def install() -> None:
    """Register in what is loaded of diffusers already, and in the rest when it is. Idempotent."""
    for name, register in TARGETS.items():
        if name in sys.modules:
            register(sys.modules[name])
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
