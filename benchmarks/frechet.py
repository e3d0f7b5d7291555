"""Frechet distance of few images: the Gram matrix beside torch-fidelity's square root, one run.

python benchmarks/frechet.py --images 200 --features 2048
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from cmkit_std.metrics.frechet import frechet_of_few
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric


def main() -> None:
    """Print both values, their relative difference, and both times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    few = rng.standard_normal((options.images, options.features))
    many = rng.standard_normal((2 * options.features, options.features))
    reference = {"mu": many.mean(0), "sigma": np.cov(many, rowvar=False)}

    began = time.perf_counter()
    ours = frechet_of_few(few, reference)
    gram = time.perf_counter() - began
    began = time.perf_counter()
    statistics = fid_features_to_statistics(torch.from_numpy(few))
    (full,) = fid_statistics_to_metric(statistics, reference, False).values()
    root = time.perf_counter() - began
    print(f"Gram {ours:.9g} in {gram:.3f} s; torch-fidelity {full:.9g} in {root:.3f} s;")
    print(f"relative difference {abs(ours / full - 1):.1e}, ratio of times {root / gram:.0f}")


if __name__ == "__main__":
    main()
