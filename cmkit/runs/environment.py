"""What decides the bits of a run: packages, device, threads; and whom to cite."""

from __future__ import annotations

import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import cmkit
from cmkit.plan import Plan
from cmkit.plugins import Registry


def describe_environment(plan: Plan, registry: Registry, device: torch.device) -> dict[str, Any]:
    """Versions, device and threads, which decide the bits of a run; no path of this machine."""
    packages = {"cmkit", "torch", "torchvision", "torch-fidelity", "numpy", "safetensors"}
    packages |= {registry.find(kind, name).dist for kind, name in plan.recipe.used()}
    return {
        "cmkit": cmkit.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "tf32": torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32,
        "torch": torch.__version__,
        "packages": {name: _version(name) for name in sorted(packages)},
    }


def changed_environment(starts: Sequence[Mapping[str, Any]], environment: Mapping[str, Any]) -> str:
    """What is not as it was at the start before, if anything; it may change bits."""
    if not starts:
        return ""
    then, now = ({**e, **e["packages"]} for e in (starts[-1], environment))
    changed = [
        f"{key} {now[key]}, before {then[key]}"
        for key in now
        if key != "packages" and key in then and now[key] != then[key]
    ]
    return f"going on under another environment: {'; '.join(changed)}; bits will differ" * bool(
        changed
    )


def citations(plan: Plan, registry: Registry) -> list[str]:
    """The references of the parts that a recipe composes, each once, in its order."""
    found = [registry.find(kind, name).plugin for kind, name in plan.recipe.used()]
    return list(dict.fromkeys(plugin.cite for plugin in found if plugin and plugin.cite))


def peak_memory_mib(device: torch.device) -> float:
    """Most memory held so far: of the GPU's allocator there, of the process elsewhere; MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "?"
