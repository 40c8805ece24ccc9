"""Sampling and measuring: engines, references, images and figures, for `eval` and `sample`."""
