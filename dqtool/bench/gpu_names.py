"""Contenders of a benchmark on a CUDA device, by name."""

from __future__ import annotations

__all__ = ["GPU_CONTENDERS"]

GPU_CONTENDERS = {
    "ours": "dqtool cuda, float16 between products, eager",
    "ours-graph": "the same in a CUDA graph",
    "fp32": "float32, eager, channels last",
    "fp16": "float16, eager, channels last",
    "fp16-graph": "the same in a CUDA graph",
    "bf16": "bfloat16, eager, channels last",
    "fp16-compile": 'float16, torch.compile(mode="reduce-overhead")',
    "ours-compile": 'dqtool cuda, torch.compile(mode="reduce-overhead")',
    "fp16-max-autotune": 'float16, torch.compile(mode="max-autotune")',
    "sdnq-int8": "SDNQ int8 with int8 products, as its documentation has it, where installed",
    "torchao-int8": "torchao int8 dynamic, torch.compile, where installed",
}
"""Contenders by name, in the order in which they are timed: what matters most comes first."""
