"""Benchmarks of speed, load time and memory: a quantized network against its alternatives."""
