"""Precision where it is needed: what quantizing each operand costs in the samples, and bits chosen by it."""
