"""The device that computes, and the precision that it computes in."""

from __future__ import annotations

import ctypes
import os

import torch

from cmkit.errors import RecipeError, ResourceError


def pick_device(name: str) -> torch.device:
    """The device that `--device` names ("auto" prefers CUDA); ResourceError when it is not here,
    RecipeError for several devices or processes."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if "," in name or ("MASTER_ADDR" in os.environ and processes != "1"):
        said = f"--device {name}" if "," in name else f"a launcher of {processes} processes"
        raise RecipeError(
            f"{said}: a run is one process on one device; start `cmkit run` by itself, with such as"
            " --device cuda:0, and another recipe on each other device"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ResourceError(f"--device {name}: not usable here ({reason}); try auto") from error
    if device.type == "cpu":
        _keep_freed_memory()
    return device


def _keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors; other C libraries are left alone."""
    # Returning it, and faulting it in again for the next large tensor, took up to a quarter of the
    # time of a forward pass.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    trim_threshold, mmap_threshold = -1, -3
    if mallopt:
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**30) or mallopt(mmap_threshold, 2**25)


def precision(name: str, device: torch.device) -> str:
    """What a `precision` key means: "fp32" or "bf16"; "auto" is bf16 where the device gains."""
    if name != "auto":
        return name
    gains = (
        torch.cuda.is_bf16_supported(including_emulation=False)
        if device.type == "cuda"
        else device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    )
    return "bf16" if gains else "fp32"


def autocast(name: str, device: torch.device) -> torch.autocast:
    """The autocast context of a `precision` key."""
    enabled = precision(name, device) == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)
