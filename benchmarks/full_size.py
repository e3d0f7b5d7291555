"""The paper's whole path at full size, on weights of invented content: its scores mean nothing.

python benchmarks/full_size.py --folder /tmp/full_size
writes a checkpoint in the layout of the published LSUN-256 models (2.1 GB, filled by a formula),
Inception weights and reference statistics of random content, and runs
recipes/search_ct_bedroom.toml on them with few images. Reported are times and peak memory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
import zlib
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from cmkit_std.backbones.adm import ADM
from cmkit_std.metrics import extractor_weights
from torch import Tensor

from cmkit import DataSpec, discover
from cmkit.device import pick_device
from cmkit.plan import plan
from cmkit.recipe import load
from cmkit.run import RunFinished, peak_memory_mib, run
from cmkit.stop import StopSignal
from cmkit.weights import find, read

RECIPE = Path(__file__).parent.parent / "recipes" / "search_ct_bedroom.toml"
FEATURES = 2048


def main() -> None:
    """Write what is missing in the folder, run the recipe, print what each stage took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/full_size"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--images", type=int, default=4)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    checkpoint, inception, statistics = (
        options.folder / name for name in ("lsun256.pt", "inception.pth", "reference.npz")
    )
    if not checkpoint.exists():
        torch.save(official_weights(), checkpoint)
    if not inception.exists():
        torch.save(inception_weights(), inception)
    if not statistics.exists():
        rng = np.random.default_rng(0)
        pictures = rng.integers(0, 256, (8, 256, 256, 3), np.uint8)
        np.savez(statistics, mu=np.zeros(FEATURES), sigma=np.eye(FEATURES), arr_0=pictures)

    device = pick_device(options.device)
    began = time.perf_counter()
    tensors = read(find(str(checkpoint), ADM()))
    spent = time.perf_counter() - began
    size = sum(tensor.nbytes for tensor in tensors.values())
    print(f"{checkpoint}: {len(tensors)} tensors, {size / 2**30:.2f} GiB, read in {spent:.1f} s")
    del tensors

    recipe = options.folder / RECIPE.name
    recipe.write_text(RECIPE.read_text().replace("download = true", f'weights = "{inception}"'))
    sets = [
        f"denoiser.weights=path:{checkpoint}",
        f"dataset.reference_npz={statistics}",
        f"search.images={options.images}",
        f"search.batch={options.images}",
        "search.grid.skip=[0.8, 1.0]",
        "search.grid.emb=[0.9, 1.0]",
        "search.rerank=2",
        f"search.rerank_images={options.images}",
        f"search.confirm_images={options.images}",
        "search.confirm_seeds=2",
        f"sample.images={options.images}",
        f"sample.batch={options.images}",
    ]
    digest = hashlib.sha256(inception.read_bytes()).hexdigest()
    trusted = extractor_weights.Weights(inception.name, "nowhere", digest)
    with mock.patch.dict(extractor_weights.PUBLIC, {"inception-v3-compat": trusted}):
        began = time.perf_counter()
        made = plan(load(recipe, sets, discover()))
        print(f"checked in {time.perf_counter() - began:.1f} s: {made.parameters:,} parameters")
        report = finished(made, options.folder / "runs", device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for stage, result in report["stages"].items():
        print(f"{stage:8} {result['seconds']:8.1f} s, peak {result['peak_memory_mib']:,.0f} MiB")
    sampled = report["stages"]["sample"]
    # The stage draws the samples, and the pictures before and after scaling once more.
    per_image = sampled["seconds"] / (3 * options.images)
    print(f"about {per_image:.2f} s an image with loading; peak {peak_memory_mib(device):,.0f} MiB")
    print(f"scores, of invented weights: {json.dumps(report['stages']['metric']['values'])}")


def finished(made: Any, out: Path, device: torch.device) -> dict[str, Any]:
    """The report of the run."""
    for event in run(made, discover(), out, device, StopSignal()):
        if isinstance(event, RunFinished):
            return event.report
    raise AssertionError("a run ends with its report")


def official_weights() -> dict[str, Tensor]:
    """LSUN-256 weights under their official names, each tensor a wave of its own phase."""
    backbone, data = ADM(preset="openai-lsun256"), DataSpec(3, 256)
    with torch.device("meta"):
        network = backbone.build(data, frozenset())
    (layout,) = (each for each in backbone.layouts(data) if each.name == "openai")
    shapes = {key: tuple(t.shape) for key, t in layout.write(network.state_dict()).items()}
    return {key: wave(key, shape) for key, shape in shapes.items()}


def wave(key: str, shape: tuple[int, ...]) -> Tensor:
    """sin(0.7 i + 0.013 (i^2 mod 997) + phase), scaled to unit gain; norms stay near 1."""
    n = math.prod(shape)
    i = torch.arange(n)
    phase = zlib.crc32(key.encode()) % 1000
    s = torch.sin(0.7 * i.double() + 0.013 * (i * i % 997).double() + phase).float()
    if len(shape) > 1:
        s = s / math.sqrt(n / shape[0])
    else:
        s = 1 + 0.1 * s if key.endswith("weight") else 0.1 * s
    return s.reshape(shape)


def inception_weights() -> dict[str, Tensor]:
    """Random weights of torch-fidelity's Inception, of a gain that keeps signals alive."""
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    class Unloaded(theirs.FeatureExtractorInceptionV3):
        def load_state_dict(self, state: Any) -> None:  # type: ignore[override]
            """Nothing to load."""

    generator = torch.Generator().manual_seed(0)
    with mock.patch.object(theirs, "load_state_dict_from_url", return_value={}):
        network = Unloaded("inception-v3-compat", ["2048"])
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
    return network.state_dict()


if __name__ == "__main__":
    main()
