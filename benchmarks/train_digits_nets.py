"""Trains the two digit classifiers that `fidelity` and `digits_judge` ship, on the train split
alone, and prints how they do on the held-out digits and on garbage.

    OMP_NUM_THREADS=1 python benchmarks/train_digits_nets.py          # about 8 minutes, one core

Deterministic on one machine. Copy the printed SHA-256 into plugins/cmkit_std/metrics/digits_net.py;
--check prints the figures of the shipped nets and trains nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from cmkit_std.datasets.digits import digits
from cmkit_std.metrics import digits_net
from cmkit_std.metrics.digits_net import FeatureNet, JudgeNet
from safetensors.torch import save_file
from torch import Tensor, nn

FOLDER = Path(digits_net.__file__).parent


def main() -> None:
    """Train both, save both, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seeds", type=int, nargs=2, default=(1, 2))
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--check", action="store_true", help="report on the shipped nets only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    nets = {"digits_features": FeatureNet, "digits_judge": JudgeNet}
    for (name, net_class), seed in zip(nets.items(), args.seeds, strict=True):
        if args.check:
            shipped = {"digits_features": digits_net.feature_net, "digits_judge": judge}
            net = shipped[name]()
        else:
            net = train(net_class, seed, args.steps, args.batch)
            file = args.out / f"{name}.safetensors"
            save_file(net.state_dict(), file)
            print(f'    "{name}": "{hashlib.sha256(file.read_bytes()).hexdigest()}",')
        report(name, net)


def judge() -> JudgeNet:
    """The shipped judge."""
    return digits_net.judge_net(torch.device("cpu"))


def train(net_class: type[nn.Module], seed: int, steps: int, batch: int) -> nn.Module:
    """The average of the weights over the last half of the steps.

    Cross entropy on augmented digits, plus cross entropy with the uniform distribution on
    pictures that are no digits (outlier exposure, Hendrycks et al., 2019).
    """
    torch.manual_seed(seed)
    images, labels = digits("train")
    x_all = torch.from_numpy(images).float() / 127.5 - 1
    y_all = torch.from_numpy(labels)
    net = net_class()
    average = torch.optim.swa_utils.AveragedModel(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    for step in range(steps):
        rate = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(rate, (step + 1) / 100)
        chosen = torch.randint(len(x_all), (batch,))
        x, y = x_all[chosen], y_all[chosen]
        digit, garbage = logits(net, torch.cat([jittered(x), no_digits(x, y)])).split(batch)
        uniform = -F.log_softmax(garbage, 1).mean(1)
        loss = F.cross_entropy(digit, y) + 0.15 * uniform.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= steps // 2:
            average.update_parameters(net)
        if (step + 1) % 1000 == 0:
            print(f"  step {step + 1}: loss {loss.item():.4f}")
    trained = average.module.eval().requires_grad_(False)
    if isinstance(trained, FeatureNet):
        features, _ = trained(x_all)
        trained.deviation, trained.mean = torch.std_mean(features, 0)
    return trained


def logits(net: nn.Module, x: Tensor) -> Tensor:
    """Logits, (B, 10), of either net."""
    found = net(x)
    return found[1] if isinstance(found, tuple) else found


def jittered(x: Tensor, shift: float = 0.6, turn: float = 0.12, size: float = 0.08) -> Tensor:
    """x moved by up to `shift` pixels, turned by up to `turn` radians, scaled, a little noisy."""
    n = len(x)
    angle = (torch.rand(n) * 2 - 1) * turn
    scale = 1 + (torch.rand(n) * 2 - 1) * size
    move = (torch.rand(n, 2) * 2 - 1) * shift * 2 / x.shape[-1]
    cos, sin = scale * angle.cos(), scale * angle.sin()
    matrix = torch.stack([cos, -sin, move[:, 0], sin, cos, move[:, 1]], 1).view(n, 2, 3)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    moved = F.grid_sample(x + 1, grid, align_corners=False) - 1
    sharp = torch.rand(n, 1, 1, 1) < 0.4  # moving blurs: the scans as they are must be seen too
    noise = torch.rand(n, 1, 1, 1) * 0.15
    return (torch.where(sharp, x, moved) + noise * torch.randn_like(x)).clamp(-1, 1)


def no_digits(x: Tensor, y: Tensor) -> Tensor:
    """As many pictures that are no digit: noise, shuffles, mixtures of two classes, blurs, .."""
    kinds = [_uniform, _gaussian, _shuffled, _drowned, _blurred, _constant]
    mixtures = [_averaged, _averaged, _averaged]
    other = _other_class(y)
    makers = [maker(x) for maker in kinds] + [maker(x, x[other]) for maker in mixtures]
    which = torch.randint(len(makers), (len(x),))
    return torch.stack(makers)[which, torch.arange(len(x))].clamp(-1, 1)


def _other_class(y: Tensor) -> Tensor:
    """For each image the index of one of another class, (B,)."""
    weights = (y[:, None] != y[None, :]).float() + 1e-9
    return torch.multinomial(weights, 1)[:, 0]


def _uniform(x: Tensor) -> Tensor:
    return torch.rand_like(x) * 2 - 1


def _gaussian(x: Tensor) -> Tensor:
    scale, mean = torch.rand(len(x), 1, 1, 1) * 1.5, torch.rand(len(x), 1, 1, 1) * 2 - 1
    return mean + scale * torch.randn_like(x)


def _shuffled(x: Tensor) -> Tensor:
    order = torch.rand(len(x), x[0].numel()).argsort(1)
    return x.flatten(1).gather(1, order).view_as(x)


def _drowned(x: Tensor) -> Tensor:
    return x + (0.9 + torch.rand(len(x), 1, 1, 1)) * torch.randn_like(x)


def _blurred(x: Tensor) -> Tensor:
    return _blur(_blur(_blur(x)))


def _blur(x: Tensor) -> Tensor:
    return F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)


def _constant(x: Tensor) -> Tensor:
    return (torch.rand(len(x), 1, 1, 1) * 2 - 1).expand_as(x) + 0.05 * torch.randn_like(x)


def _averaged(a: Tensor, b: Tensor) -> Tensor:
    share = 0.4 + 0.2 * torch.rand(len(a), 1, 1, 1)
    return share * a + (1 - share) * b


def _cut(a: Tensor, b: Tensor) -> Tensor:
    halves = torch.where(torch.arange(8) < 4, a, b)
    across = torch.where(torch.arange(8)[:, None] < 4, a, b)
    return torch.where(torch.rand(len(a), 1, 1, 1) < 0.5, halves, across)


@torch.no_grad()
def report(name: str, net: nn.Module, threshold: float = 0.8) -> None:
    """Print accuracy on the held-out digits, and the share called confident of several sets."""
    images, labels = digits("test")
    x, y = torch.from_numpy(images).float() / 127.5 - 1, torch.from_numpy(labels)
    torch.manual_seed(0)
    parameters = sum(p.numel() for p in net.parameters())
    right = (logits(net, x).argmax(1) == y).float().mean().item()
    print(f"{name}: {parameters:,} parameters, held-out accuracy {right:.4f} of {len(x)}")
    thousand = torch.randint(len(x), (1000,))
    partner = thousand[torch.randperm(1000)]
    different = y[thousand] != y[partner]
    half = (x[thousand] + x[partner]) / 2
    sets = {
        "held-out digits": x,
        "uniform noise": torch.rand(1000, 1, 8, 8) * 2 - 1,
        "gaussian noise, sd 0.5": (0.5 * torch.randn(1000, 1, 8, 8)).clamp(-1, 1),
        "averages of two digits": half,
        "averages of two classes": half[different],
        "blurred once (3x3 box)": _blur(x),
        "blurred three times": _blurred(x),
        "shuffled pixels": _shuffled(x),
        "digits + noise of sd 0.5": (x + 0.5 * torch.randn_like(x)).clamp(-1, 1),
        "negatives": -x,
        "mean image of each class": torch.stack([x[y == c].mean(0) for c in range(10)]),
    }
    for title, pictures in sets.items():
        top = logits(net, pictures).softmax(1).amax(1)
        share = (top > threshold).float().mean().item()
        print(f"  {title:26s} {len(pictures):5d}  confident {share:.3f}")


if __name__ == "__main__":
    main()
