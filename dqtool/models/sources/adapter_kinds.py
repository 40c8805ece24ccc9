"""Kinds of adapters by the names of their tensors: a plain LoRA, or one that dqtool neither adds nor merges."""

from __future__ import annotations

from collections.abc import Collection

__all__ = ["MERGE_ELSEWHERE", "other_kind"]

MERGE_ELSEWHERE = "Merge it into the full-precision model with the program that made it, and quantize the result"
"""Advice for an adapter of another kind."""

_KINDS = (
    ("DoRA", ("dora_scale", "lora_magnitude_vector"), "scales the weight's columns"),
    ("LoHa", (".hada_",), "multiplies two products of matrices elementwise"),
    ("LoKr", (".lokr_",), "is a Kronecker product"),
    ("OFT", (".oft_",), "rotates the weight"),
    ("GLoRA", (".a1.weight", ".b1.weight"), "also scales the weight"),
    ("LoRA with a Tucker core", (".lora_mid.",), "has a third factor"),
)
_ALONE = (
    ("IA3", (".on_input",), "scales the weight"),
    ("full difference of weights", (".diff",), "is as large as the weight"),
)
"""Kinds that count only where the file holds no LoRA: diffusers understands such tensors beside one."""


def other_kind(names: Collection[str]) -> tuple[str, str] | None:
    """Return the kind of an adapter that is no plain LoRA, and a phrase that says what it does; None for a LoRA."""
    plain = any(".lora_" in name or ".lora." in name for name in names)
    for kind, marks, what in _KINDS + (() if plain else _ALONE):
        if any(mark in name for mark in marks for name in names):
            return kind, what
    return None
