"""Distances between two batches of images, (B, C, H, W) in [-1, 1] -> (B,)."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmkit import CheckpointError, DownloadError
from cmkit.functional import l2, pseudo_huber

LPIPS_BACKBONES = {
    "vgg": "vgg16-397923af.pth",
    "alex": "alexnet-owt-7be5be79.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}


def distance(
    name: str,
    a: Tensor,
    b: Tensor,
    c: float | None = None,
    lpips_net: str = "vgg",
    lpips_weights: str | None = None,
) -> Tensor:
    """The distance `name` of each pair of images, (B,), with the options that it takes."""
    if name == "pseudo_huber":
        return pseudo_huber(a, b, c)
    if name == "lpips":
        return lpips(a, b, lpips_net, lpips_weights)
    return {"l1": l1, "l2": l2, "l2-32": l2_32}[name](a, b)


def l1(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference of each image, (B,)."""
    return (a - b).abs().flatten(1).mean(1)


def l2_32(a: Tensor, b: Tensor) -> Tensor:
    """`l2` of the images resized to 32 pixels, (B,)."""
    return l2(
        F.interpolate(a, size=32, mode="bilinear", align_corners=False),
        F.interpolate(b, size=32, mode="bilinear", align_corners=False),
    )


def huber(a: Tensor, b: Tensor, c: float) -> Tensor:
    """Mean of sqrt((a - b)^2 + c^2) - c of each number of an image by itself, (B,), as the code of
    Latent Consistency Models has it."""
    return (((a - b).square() + c * c).sqrt() - c).flatten(1).mean(1)


def lpips(a: Tensor, b: Tensor, net: str = "vgg", weights: str | None = None) -> Tensor:
    """LPIPS of each image, (B,), as the consistency-model papers use it.

    Average pooling instead of max pooling, images below 256 pixels resized to 224, a single
    channel repeated. The `lpips` package takes [-1, 1]; piq, which the official code calls, takes
    [0, 1]: both normalise to the same numbers.
    """
    model = _lpips(net, weights, a.device)
    return model(_for_lpips(a), _for_lpips(b)).flatten()


def lpips_file(net: str, weights: str | None) -> Path:
    """The file of the weights of LPIPS; DownloadError or CheckpointError where it is not here."""
    if weights is not None:
        if not Path(weights).is_file():
            raise CheckpointError(f"lpips_weights = {weights!r}: no such file")
        return Path(weights)
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    name = LPIPS_BACKBONES[net]
    if not (folder / name).is_file():
        raise DownloadError(
            f"LPIPS needs torchvision's {name}: put download.pytorch.org/models/{name} into"
            f" {folder}, or name a .safetensors file of the same tensors in lpips_weights"
        )
    return folder / name


def limit(name: str, f: Tensor, v: Tensor, net: str = "vgg", weights: str | None = None) -> Tensor:
    """v H v / 2, (B,), with gradient H v in f (B, C, H, W): the limit of the discrete loss (Song,
    Dhariwal, Chen, Sutskever: Consistency Models, 2023, theorems 5 and 6).

    H is the Hessian of the distance `name` at f; v (B, C, H, W), without gradient, is the change of
    f over a gap. For "l2" the value is the distance of f and f - v; "l1" has no Hessian, its value
    is that distance too (theorem 4).
    """
    moved = f - f.detach()  # zero, with the gradient of f
    if name == "l1":
        return l1(moved, -v)
    return ((moved + v / 2) * _hessian_times(name, f.detach(), v, net, weights)).flatten(1).sum(1)


def _hessian_times(name: str, f: Tensor, v: Tensor, net: str, weights: str | None) -> Tensor:
    if name == "l2":
        return 2 * v / f[0].numel()
    with torch.enable_grad(), torch.autocast(f.device.type, enabled=False):
        a = f.clone().requires_grad_()
        d = distance(name, a, f, lpips_net=net, lpips_weights=weights)
        (gradient,) = torch.autograd.grad(d.sum(), a, create_graph=True)
        (product,) = torch.autograd.grad((gradient * v).sum(), a)
    return product


def _for_lpips(x: Tensor) -> Tensor:
    if x.shape[1] == 1:
        x = x.expand(-1, 3, -1, -1)
    if x.shape[-1] < 256:
        x = F.interpolate(x, size=224, mode="bilinear", align_corners=False)
    return x


@functools.lru_cache(maxsize=2)
def _lpips(net: str, weights: str | None, device: torch.device) -> nn.Module:
    from lpips import LPIPS

    lpips_file(net, weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision deprecates the arguments that lpips passes
        model = LPIPS(net=net, pnet_rand=weights is not None, verbose=False)
    if weights is not None:
        _load_backbone(model.net, weights)
    for slice_ in model.net.children():
        for name, module in slice_.named_children():
            if isinstance(module, nn.MaxPool2d):
                pool = nn.AvgPool2d(module.kernel_size, module.stride, module.padding)
                setattr(slice_, name, pool)
    return model.eval().requires_grad_(False).to(device)


def _load_backbone(net: nn.Module, weights: str) -> None:
    """Copy torchvision's `features.N.*` tensors into the slices of LPIPS, which keep the N."""
    from safetensors.torch import load_file

    tensors = load_file(weights)
    own = net.state_dict()
    found = {key: tensors.get("features." + key.split(".", 1)[1]) for key in own}
    bad = [key for key, value in found.items() if value is None or value.shape != own[key].shape]
    if bad:
        raise CheckpointError(
            f"lpips_weights = {weights!r}: no tensor of the right shape for features."
            f"{bad[0].split('.', 1)[1]}; export torchvision's state dict as it is"
        )
    net.load_state_dict(found)
