"""The Frechet distance of few images, exactly, without the square root of a large matrix."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def frechet_of_few(features: np.ndarray, reference: Mapping[str, np.ndarray]) -> float:
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), of features (N, d) with N <= d.

    With X the centred features and S1 = X^T X / (N - 1), the eigenvalues of S1 S2 that are not zero
    are those of X S2 X^T / (N - 1), which is N by N and symmetric: the trace of the root is the sum
    of their roots. For N = 200 and d = 2048 that is hundreds of times cheaper than the d by d form,
    which the rank-deficient S1 also makes inaccurate.
    """
    x = features.astype(np.float64)
    mu1, mu2 = x.mean(0), reference["mu"].astype(np.float64)
    x = (x - mu1) / np.sqrt(len(x) - 1)
    sigma2 = reference["sigma"].astype(np.float64)
    eigenvalues = np.linalg.eigvalsh(x @ sigma2 @ x.T)
    root_trace = np.sqrt(eigenvalues.clip(min=0)).sum()
    difference = mu1 - mu2
    return float(difference @ difference + (x * x).sum() + np.trace(sigma2) - 2 * root_trace)
