"""Waits for a device in an iteration of each training loop: a device written in Python counts what would wait for a GPU.

Run by test_losses.py in a process of its own: python waits.py CALIBRATED DIR
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parent.parent))

import fenced
from fenced import DEVICE, Fenced

from dqtool.core import device as devices

waits: Counter[str] = Counter()
inside = False
"""True in an iteration, which reads nothing."""

READS = ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::is_nonzero")


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """`dqtool.core.device.to_device` as it is for a GPU."""
    return x.to(device, non_blocking=x.device.type == "cpu")


run = fenced.run


def counting(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation of the device and count it where a GPU would keep the host waiting."""
    name = func._schema.name
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    here = [isinstance(x, Fenced) for x in tensors]
    waiting = name in READS and any(here)
    if name == "aten::_to_copy":
        target = kwargs.get("device")
        crosses = target is not None and (torch.device(target).type == DEVICE.type) != isinstance(args[0], Fenced)
        waiting = crosses and (isinstance(args[0], Fenced) or not kwargs.get("non_blocking"))
    if name == "aten::copy_":
        crosses = isinstance(args[0], Fenced) != isinstance(args[1], Fenced) and args[1].dim() > 0
        waiting = crosses and (isinstance(args[1], Fenced) or not any(args[2:]))
    if name.startswith("aten::index") and any(here):
        waiting = any(not isinstance(x, Fenced) or x.dtype == torch.bool for x in tree_leaves(args[1]) if x is not None)
    if waiting and inside:
        waits[name] += 1
    return run(func, args, kwargs)


fenced.run = counting
devices.to_device = to_device
devices.resolve_device = lambda _text: DEVICE
checkpoint._infer_device_type = lambda *_: "cpu"  # a device written in Python has no autocast


ITERATIONS = 18
"""Iterations of each loop: more than lookups of timesteps that are read together (`dqtool.nn.steps.PENDING`)."""


def main() -> None:
    """Train a little by two methods, which have all four loops, and print their waits."""
    from dqtool.stages.distill import DistillOptions, distill
    from dqtool.stages.shared.settings import RunSettings
    from dqtool.training import losses
    from dqtool.training.losses import Losses
    from dqtool.training.methods.qat_partial import QatPartialOptions
    from dqtool.training.recovery import WINDOW

    losses.window = lambda _loss: WINDOW
    add, read = Losses.add, Losses.read
    counts: list[Counter[str]] = []

    def noted(self: Losses, loss: Tensor) -> bool:
        """The end of an iteration; the next one begins."""
        global inside
        counts.append(Counter(waits))
        waits.clear()
        inside = True
        return add(self, loss)

    def outside(self: Losses) -> bool:
        """Reading is allowed here."""
        global inside
        inside = False
        return read(self)

    Losses.add, Losses.read = noted, outside
    QatPartialOptions.iters = QatPartialOptions.temporal_iters = ITERATIONS  # its lengths where --iters is that
    torch.set_num_threads(1)
    calibrated, directory = sys.argv[1], Path(sys.argv[2])
    settings = RunSettings(quiet=True, device="cpu")
    found: dict[str, Any] = {}
    for method, more in (
        ("bkd", {"blocks": "mid_block.resnets.0", "refine_iters": ITERATIONS, "correct_noise": False}),
        ("qat-partial", {}),
    ):
        counts.clear()
        made = str(directory / f"{method}.safetensors")
        distill(DistillOptions(calibrated, made, iters=ITERATIONS, batch_size=4, method=method, **more), settings)
        found[method] = {"iterations": len(counts), "waits": dict(sum(counts, Counter()))}
    print(json.dumps(found))


main()
