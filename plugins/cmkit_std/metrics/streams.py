"""Statistics of features that come in batches: all rows, mean and covariance, or Inception scores.
Only `Rows` grows with the number of images. `tensors` gives the result, which is also what is
stored of a reference; `restore(state)` goes on from an earlier state to the same bits."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cmkit_std.metrics.fidelity_options import IS_SPLITS

SHUFFLE_SEED = 2020
"""Of torch-fidelity: its Inception score splits the images in this random order."""


def widened(x: Tensor) -> Tensor:
    """float64, on the CPU where the device (MPS) knows none."""
    return (x.cpu() if x.device.type == "mps" else x).double()


class Rows:
    """Every feature, float32 (N, d)."""

    def __init__(self, count: int):
        self.parts: list[Tensor] = []

    def add(self, features: Tensor) -> None:
        """Take a batch of features (B, d); the one place where features leave the device."""
        self.parts.append(features.float().cpu())

    def tensors(self) -> dict[str, Tensor]:
        """{"rows": (N, d)} float32 on the CPU."""
        return {"rows": torch.cat(self.parts)}

    def state(self) -> dict[str, Tensor]:
        return self.tensors() if self.parts else {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.parts = [rows.cpu() for rows in state.values()]


class Gaussian:
    """Mean and covariance, float64, by Chan's pairwise update; of d images or fewer their rows,
    which take less room than the covariance and give the Frechet distance exactly."""

    def __init__(self, count: int):
        self.few: list[Tensor] = []
        self.count = 0
        self.folded = 0

    def add(self, features: Tensor) -> None:
        """Take a batch of features (B, d), which stay on their device."""
        self.few.append(features)
        self.count += len(features)
        if self.count > features.shape[1]:
            self._fold(widened(torch.cat(self.few)))
            self.few.clear()

    def _fold(self, x: Tensor) -> None:
        """mean and S = sum (x - mean)(x - mean)^T of all so far: with n folded, m new and
        delta = mean_new - mean, S += S_new + n m / (n + m) delta delta^T."""
        if not self.folded:
            self.mean = x.new_zeros(x.shape[1])
            self.scatter = x.new_zeros(x.shape[1], x.shape[1])
        n, m = self.folded, len(x)
        centre = x.mean(0)
        delta = centre - self.mean
        rows = torch.cat([x - centre, delta[None] * (n * m / (n + m)) ** 0.5])
        self.scatter.addmm_(rows.T, rows)
        self.mean += delta * (m / (n + m))
        self.folded += m

    def tensors(self) -> dict[str, Tensor]:
        """{"mu": (d,), "sigma": (d, d)} float64, or {"rows": (N, d)} if N <= d, on the CPU."""
        if self.few:
            return {"rows": torch.cat(self.few).float().cpu()}
        return {"mu": self.mean.cpu(), "sigma": (self.scatter / (self.folded - 1)).cpu()}

    def state(self) -> dict[str, Tensor]:
        state = {"few": torch.cat(self.few)} if self.few else {}
        if self.folded:
            state |= {"mean": self.mean.clone(), "scatter": self.scatter.clone()}
        return {**state, "folded": torch.tensor(self.folded)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.few = [state["few"]] if "few" in state else []
        self.folded = int(state["folded"])
        self.count = self.folded + sum(map(len, self.few))
        if self.folded:
            self.mean, self.scatter = state["mean"], state["scatter"]


class Score:
    """Sums over each split of p = softmax(logits) and of sum_c p_c log p_c, all that the Inception
    score needs: the mean of sum_c p_c (log p_c - log q_c), with q the mean of p, is
    mean(sum_c p_c log p_c) - sum_c q_c log q_c."""

    def __init__(self, count: int):
        order = np.random.RandomState(SHUFFLE_SEED).permutation(count)
        bounds = np.arange(IS_SPLITS + 1) * count // IS_SPLITS
        split = np.empty(count, dtype=np.int64)
        split[order] = np.repeat(np.arange(IS_SPLITS), np.diff(bounds))
        self.split = torch.from_numpy(split)  # of each image
        self.seen = 0
        self.sums = self.negentropies = torch.zeros(())

    def add(self, logits: Tensor) -> None:
        """Take a batch of logits (B, C), which stay on their device."""
        log_p = widened(logits).log_softmax(1)
        p = log_p.exp()
        split = self.split[self.seen : self.seen + len(p)].to(p.device, non_blocking=True)
        members = F.one_hot(split, IS_SPLITS).to(p.dtype).T  # (splits, B)
        self.sums = self.sums + members @ p
        self.negentropies = self.negentropies + members @ (p * log_p).sum(1)
        self.seen += len(p)

    def tensors(self) -> dict[str, Tensor]:
        """{"scores": (splits,)} float64 on the CPU."""
        sizes = self.split.bincount(minlength=IS_SPLITS)
        q = self.sums.cpu() / sizes[:, None]
        mean = self.negentropies.cpu() / sizes
        return {"scores": (mean - torch.xlogy(q, q).sum(1)).exp()}

    def state(self) -> dict[str, Tensor]:
        if not self.seen:
            return {}
        sums = {"sums": self.sums, "negentropies": self.negentropies}
        return {**sums, "seen": torch.tensor(self.seen), "count": torch.tensor(len(self.split))}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        if state:
            self.sums, self.negentropies = state["sums"], state["negentropies"]
            self.seen = int(state["seen"])


def whole(stream: str, tensors: Mapping[str, Tensor], count: int) -> bool:
    """Whether these are the finite tensors that "rows" or "gaussian" gives of `count` images."""
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    if not all(x.isfinite().all() for x in tensors.values()):
        return False
    if shapes.keys() == {"rows"} and len(shapes["rows"]) == 2:
        rows, width = shapes["rows"]
        return rows == count and (stream == "rows" or count <= width)
    mu = shapes.get("mu", ())
    gaussian = len(mu) == 1 and shapes == {"mu": mu, "sigma": mu * 2}
    return stream == "gaussian" and gaussian and count > mu[0]


STREAMS: dict[str, type[Rows | Gaussian | Score]] = {
    "rows": Rows,
    "gaussian": Gaussian,
    "score": Score,
}
