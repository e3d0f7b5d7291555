"""Trains the two emoji classifiers that `fidelity` and `emoji_judge` ship, and prints how they
do on held-out glyphs, on a style that they never saw, and on garbage.

    OMP_NUM_THREADS=1 python benchmarks/train_emoji_nets.py --work DOWNLOADS

They see the train split in two styles, Noto Color Emoji and Fluent Emoji (MIT), never Twemoji. The
downloads are those of make_emoji.py. Deterministic on one machine. Copy the printed SHA-256 into
plugins/cmkit_std/metrics/emoji_net.py; --check prints the figures of the shipped nets.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from cmkit_std.datasets.emoji import GROUPS, Glyph, glyphs, pixels
from cmkit_std.metrics import emoji_net
from cmkit_std.metrics.emoji_net import FeatureNet, JudgeNet, to_net
from make_emoji import styled
from safetensors.torch import save_file
from torch import Tensor, nn
from train_digits_nets import jittered, logits, no_digits

FOLDER = Path(emoji_net.__file__).parent


class Style(NamedTuple):
    """Pictures (N, 3, 32, 32) in [-1, 1], their groups, and which are held out, (N,) each."""

    x: Tensor
    y: Tensor
    held_out: Tensor

    def only(self, held_out: bool) -> Style:
        """Those that are held out, or the others."""
        return Style(*(of[self.held_out == held_out] for of in self))


def main() -> None:
    """Train both, save both, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, nargs=2, default=(1500, 1500))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs=2, default=(1, 2))
    parser.add_argument("--only", choices=["emoji_features", "emoji_judge"])
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--check", action="store_true", help="report on the shipped nets only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    styles = {"noto": style_of(glyphs(), pixels())}
    for name in ("fluent", "twemoji"):
        told, pictures = zip(*styled(name, args.work), strict=True)
        drawn = [Glyph(n, t["code"], t["group"], t["family"], t) for n, t in enumerate(told)]
        styles[name] = style_of(drawn, np.stack(pictures).transpose(0, 3, 1, 2))
    nets = {"emoji_features": FeatureNet, "emoji_judge": JudgeNet}
    for (name, net_class), seed, steps in zip(nets.items(), args.seeds, args.steps, strict=True):
        if args.only not in (None, name):
            continue
        if args.check:
            net = emoji_net.shipped(net_class, name, emoji_net.SHA256)
        else:
            seen = [styles[style].only(False) for style in ("noto", "fluent")]
            net = train(net_class, seen, seed, steps, args.batch)
            file = args.out / f"{name}.safetensors"
            save_file(net.state_dict(), file)
            print(f'    "{name}": "{hashlib.sha256(file.read_bytes()).hexdigest()}",')
        report(name, net, styles)


def style_of(shown: list[Glyph], pictures: np.ndarray) -> Style:
    """The pictures, uint8 (N, 3, 32, 32), of the glyphs `shown`."""
    groups = torch.tensor([glyph.group for glyph in shown])
    held_out = torch.tensor([glyph.held_out for glyph in shown])
    return Style(to_net(torch.from_numpy(np.ascontiguousarray(pictures))), groups, held_out)


def train(
    net_class: type[nn.Module], seen: list[Style], seed: int, steps: int, batch: int
) -> nn.Module:
    """The average of the weights over the last third of the steps.

    Cross entropy of the group on augmented pictures; of which picture it is, through a layer that
    is not kept, so that features tell more than eight groups apart; and with the uniform
    distribution on pictures that are no emoji (outlier exposure, Hendrycks et al., 2019).
    """
    torch.manual_seed(seed)
    x_all, y_all = (torch.cat(parts) for parts in list(zip(*seen, strict=True))[:2])
    net = net_class()
    which = nn.Linear(64, len(x_all))
    average = torch.optim.swa_utils.AveragedModel(net)
    parameters = [*net.parameters(), *which.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.05)
    began = time.process_time()
    for step in range(steps):
        rate = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(rate, (step + 1) / 100)
        chosen = torch.randint(len(x_all), (batch,))
        x, y = x_all[chosen], y_all[chosen]
        few = batch // 4
        every = torch.cat([varied(x), no_digits(x[:few], y[:few])])
        hidden, found = pooled(net, every)
        uniform = -F.log_softmax(found[batch:], 1).mean(1)
        loss = F.cross_entropy(found[:batch], y, label_smoothing=0.05) + 0.1 * uniform.mean()
        told_apart = F.cross_entropy(which(hidden[:batch]), chosen)
        (loss + 0.2 * told_apart).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step >= 2 * steps // 3:
            average.update_parameters(net)
        if (step + 1) % 100 == 0:
            right = (found[:batch].argmax(1) == y).float().mean().item()
            print(
                f"  step {step + 1}: loss {loss.item():.3f}, which {told_apart.item():.3f},"
                f" accuracy {right:.2f}, {time.process_time() - began:.0f} CPU-s",
                flush=True,
            )
    trained = average.module.eval().requires_grad_(False)
    if isinstance(trained, FeatureNet):
        features, _ = trained(seen[0].x)
        trained.deviation, trained.mean = torch.std_mean(features, 0)
    return trained


def pooled(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the picture is told by, (B, d), and logits of its group, of either net."""
    if isinstance(net, FeatureNet):
        return net(x)
    assert isinstance(net, JudgeNet)
    hidden = net.pooled(x)
    return hidden, net.logits(hidden)


def varied(x: Tensor) -> Tensor:
    """x in other colours, moved by up to 2 pixels, turned and scaled on white, half of it mirrored,
    a little noisy."""
    n = len(x)
    ink = (1 - x) * (0.75 + 0.5 * torch.rand(n, 3, 1, 1))
    ink = torch.where(torch.rand(n, 1, 1, 1) < 0.5, ink.flip(-1), ink)
    grey = ink.mean(1, keepdim=True)
    ink = ink + (grey - ink) * 0.5 * torch.rand(n, 1, 1, 1)
    return -jittered((ink - 1).clamp(-1, 1), shift=2.0, turn=0.2, size=0.15)


@torch.no_grad()
def report(name: str, net: nn.Module, styles: dict[str, Style], threshold: float = 0.8) -> None:
    """Print accuracies by style, and the share called confident of several sets."""
    print(f"{name}: {sum(p.numel() for p in net.parameters()):,} parameters")
    for title, style in styles.items():
        for held_out in (False, True):
            x, y, _ = style.only(held_out)
            right = (logits(net, x).argmax(1) == y).float()
            by_group = [f"{right[y == group].mean():.2f}" for group in range(len(GROUPS))]
            glyphs = "held-out glyphs" if held_out else "glyphs of the train split"
            print(
                f"  {title:8s} {glyphs:25s} {len(x):5d}  {right.mean():.4f}  {' '.join(by_group)}"
            )
    torch.manual_seed(0)
    x, y, _ = styles["noto"].only(True)
    sets = {
        "held-out glyphs": x,
        "uniform noise": torch.rand(1000, 3, 32, 32) * 2 - 1,
        "gaussian noise, sd 0.5": (0.5 * torch.randn(1000, 3, 32, 32)).clamp(-1, 1),
        "averages of two glyphs": (x + x[torch.randperm(len(x))]) / 2,
        "blurred once (3x3 box)": blurred(x),
        "blurred three times": blurred(blurred(blurred(x))),
        "shuffled pixels": x.flatten(2)[:, :, torch.randperm(1024)].view_as(x),
        "negatives": -x,
        "white": torch.ones(1, 3, 32, 32),
    }
    for title, pictures in sets.items():
        share = (logits(net, pictures).softmax(1).amax(1) > threshold).float().mean().item()
        print(f"  {title:26s} {len(pictures):5d}  confident {share:.3f}")


def blurred(x: Tensor) -> Tensor:
    """x averaged over squares of 3x3 pixels."""
    return F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)


if __name__ == "__main__":
    main()
