"""Dry runs and estimates: the work, size, time and memory of a stage before it runs."""
