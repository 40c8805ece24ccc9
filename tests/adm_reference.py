"""Figures of the ADM suite, written a second time from its formulas in numpy and scipy, without dqtool."""

from __future__ import annotations

import warnings

import numpy as np
from scipy import linalg


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Return the Fréchet distance, with the square root of the product itself and without its imaginary round-off."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # singular, as of fewer samples than features: the suite goes on too
        root = np.real(linalg.sqrtm(sigma1 @ sigma2))
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root))


def statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return features.mean(axis=0), np.cov(features, rowvar=False)


def inception_score(probabilities: np.ndarray, split_size: int = 5000) -> float:
    scores = []
    for start in range(0, len(probabilities), split_size):
        part = probabilities[start : start + split_size]
        divergence = part * (np.log(part) - np.log(part.mean(axis=0, keepdims=True)))
        scores.append(np.exp(divergence.sum(axis=1).mean()))
    return float(np.mean(scores))


def pairwise(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Squared distances in the type of the features."""
    norm_u = np.square(u).astype(np.float32).sum(1).astype(u.dtype)[:, None]
    norm_v = np.square(v).astype(np.float32).sum(1).astype(u.dtype)[None]
    products = (u.astype(np.float32) @ v.T.astype(np.float32)).astype(u.dtype)
    return np.maximum(norm_u - u.dtype.type(2) * products + norm_v, u.dtype.type(0)).astype(np.float32)


def suite_distances(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Squared distances in float16, or in float32 where one of them is not finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        half = pairwise(u.astype(np.float16), v.astype(np.float16))
    return half if np.isfinite(half).all() else pairwise(u.astype(np.float32), v.astype(np.float32))


def precision_recall(
    reference: np.ndarray, samples: np.ndarray, dtype: type | None = None, k: int = 3
) -> tuple[float, float]:
    """Radii are the (k + 1)-th smallest squared distance within a set; a point is in where any ball covers it. Without
    `dtype` by the suite's distances."""
    distances = suite_distances if dtype is None else pairwise
    if dtype is not None:
        reference, samples = reference.astype(dtype), samples.astype(dtype)
    radii_reference = np.partition(distances(reference, reference), k, axis=1)[:, k]
    radii_samples = np.partition(distances(samples, samples), k, axis=1)[:, k]
    between = distances(reference, samples)
    return (
        float((between <= radii_reference[:, None]).any(axis=0).mean()),
        float((between <= radii_samples[None]).any(axis=1).mean()),
    )
