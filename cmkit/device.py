"""The device that computes, and the precision that it computes in."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import platform
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from cmkit import files
from cmkit.errors import CheckpointError, RecipeError, ResourceError


def pick_device(name: str) -> torch.device:
    """The device that `--device` names ("auto" prefers CUDA); ResourceError when it is not here,
    RecipeError for several devices or processes.

    From then on float32 has all its digits on a GPU as well: TF32, 10 bits of them, is off.
    """
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
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
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
    return auto_precision(device)[0] if name == "auto" else name


@functools.cache
def auto_precision(device: torch.device) -> tuple[str, str]:
    """What "auto" means on `device`, and why.

    bf16 on GPUs that have it. A CPU that has its instructions may be slower by them, so that there
    both are tried for half a second; the times are kept by CPU, torch and device.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "the GPU has it") if native else ("fp32", "the GPU has no bf16")
    if not (device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()):
        return "fp32", f"{cpu_model() if device.type == 'cpu' else device.type} has no bf16"
    machine = f"{cpu_model()}, torch {torch.__version__}, {device}"
    kept = files.cache_folder("precision") / files.digest_of(machine)
    try:
        times = {name: float(files.read_json(kept)[name]) for name in ("fp32", "bf16")}
    except (CheckpointError, KeyError, TypeError, ValueError):  # none kept yet, or damaged
        times = {name: _seconds(name, device) for name in ("fp32", "bf16")}
        with contextlib.suppress(ResourceError, OSError):  # then the next start measures again
            kept.parent.mkdir(parents=True, exist_ok=True)
            files.atomic_write(kept, json.dumps(times))
    faster, slower = sorted(times, key=times.__getitem__)
    ratio = times[slower] / times[faster]
    return faster, f"{ratio:.2g} times as fast as {slower} on {cpu_model()}, as measured"


def _seconds(name: str, device: torch.device) -> float:
    """The least time that a small stack of convolutions took in this precision, within half a
    second."""
    x, weight = torch.full((4, 128, 32, 32), 0.1), torch.full((128, 128, 3, 3), 1e-3)
    x, weight = (t.to(device).to(memory_format=torch.channels_last) for t in (x, weight))
    least, began = float("inf"), time.perf_counter()
    with torch.inference_mode(), autocast(name, device):
        while time.perf_counter() - began < 0.5 or least == float("inf"):
            start, h = time.perf_counter(), x
            for _ in range(3):
                h = F.silu(F.conv2d(h, weight, padding=1))
            least = min(least, time.perf_counter() - start)
    return least


def cpu_model() -> str:
    """The processor's name, as the system has it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8", "replace").splitlines() if info.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def autocast(name: str, device: torch.device) -> torch.autocast:
    """The autocast context of a `precision` key."""
    enabled = precision(name, device) == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)
