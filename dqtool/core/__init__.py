"""Numerics on tensors alone: no files, no modules."""
