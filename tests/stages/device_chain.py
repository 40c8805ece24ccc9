"""All five stages on a device that is not the CPU. Run by test_device.py in a process of its own.

python device_chain.py MODEL DIR cpu|fenced|cuda
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils import checkpoint

sys.path.insert(0, str(Path(__file__).parent.parent))

from dqtool.core import device as devices
from dqtool.stages.calibrate import CalibrateOptions, calibrate
from dqtool.stages.dilate import DilateOptions, dilate
from dqtool.stages.distill import DistillOptions, distill
from dqtool.stages.eval import EvalOptions, evaluate
from dqtool.stages.export import ExportOptions, export
from dqtool.stages.sample import SampleOptions, sample
from dqtool.stages.shared.settings import RunSettings


def main() -> None:
    model, directory, where = sys.argv[1:]
    if where == "fenced":
        from fenced import DEVICE

        devices.resolve_device = lambda _text: DEVICE
        # A device written in Python has no autocast, which checkpointing would enter again; the process dies of it.
        checkpoint._infer_device_type = lambda *_: "cpu"
    torch.set_num_threads(1)
    work, quiet = Path(directory), RunSettings(quiet=True, device="cuda" if where == "cuda" else "cpu")
    at = {stage: str(work / f"{stage}.safetensors") for stage in ("dilated", "calibrated", "distilled")}
    metrics = ("similarity", "layers", "cost")
    dilate(DilateOptions(model, at["dilated"]), quiet)
    calibrate(
        CalibrateOptions(at["dilated"], at["calibrated"], steps=2, samples=8, eta=0.5, batch_size=2, draw="density"),
        quiet,
    )
    trained = DistillOptions(at["calibrated"], at["distilled"], iters=2, refine_iters=1, batch_size=4)
    distill(trained, quiet)
    if where == "cpu":
        return
    distill(replace(trained, output=str(work / "low.safetensors"), low_memory=True), quiet)
    measured = replace(
        trained, output=str(work / "protected.safetensors"), iters=0, refine_iters=0, protect=20, passes=2
    )
    distill(measured, quiet)
    export(ExportOptions(at["distilled"], str(work / "exported")), quiet)
    evaluate(EvalOptions(str(work / "exported"), str(work / "eval.json"), metrics=metrics, samples=2), quiet)
    sample(SampleOptions(str(work / "exported"), 2, str(work / "samples.png")), quiet)


main()
