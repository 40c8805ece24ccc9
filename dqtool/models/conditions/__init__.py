"""Conditions of the denoiser: class labels, prompt embeddings or precomputed tensors, and the strength of guidance."""
