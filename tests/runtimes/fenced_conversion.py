"""Conversion of a network to the `cuda` runtime on a device that refuses to mix its tensors with the CPU's.

Run by test_cuda_network.py in a process of its own. Prints nothing; an assertion fails where a tensor differs or is elsewhere.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
from pathlib import Path

os.environ |= {"TRITON_INTERPRET": "1", "DQTOOL_CUDA_ON_CPU": "1"}
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from families import component_directory
from fenced import DEVICE
from synthetic import synthetic_network

from dqtool.runtimes import cuda

with tempfile.TemporaryDirectory() as folder:
    packed = synthetic_network(str(component_directory("sdxl", Path(folder) / "model")), "4/4", steps=2, low_rank=2)
    for name, module in packed.named_modules():
        if name.endswith("to_k"):  # merged with layers that have no bias
            module.bias = torch.ones(module.out_features)
    here, there = cuda.convert(copy.deepcopy(packed)), cuda.convert(packed.to(DEVICE))
    pairs = list(zip(sorted(here.named_buffers()), sorted(there.named_buffers()), strict=True))
    assert any("to_kv.planes" in name for (name, _), _ in pairs)
    for (name, a), (other, b) in pairs:
        assert name == other and b.device == DEVICE and torch.equal(a, b.cpu()), name
