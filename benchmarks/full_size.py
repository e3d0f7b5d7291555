"""Whole paths at full size, on weights of invented content: the scores mean nothing.

python benchmarks/full_size.py --folder /tmp/full_size
writes a checkpoint in the layout of the published LSUN-256 models (2.1 GB, filled by a formula),
Inception weights and reference statistics of random content, and runs
recipes/search_ct_bedroom.toml on them with few images. Reported are times and peak memory.

python benchmarks/full_size.py --model lcm_sd15 --resolution 256
writes a folder of Stable Diffusion 1.5 (network and autoencoder, 3.8 GB of fresh weights; prompts
are vectors of words), and runs one step of recipes/lcm_sd15.toml and one row of a search on what it
left; with --model lcm_lora_sd15 the same of an adapter. It needs the package cmkit-latent.
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
from cmkit.runs import RunFinished, run
from cmkit.runs.environment import peak_memory_mib
from cmkit.stop import StopSignal
from cmkit.weights import find, read

RECIPE = Path(__file__).parent.parent / "recipes" / "search_ct_bedroom.toml"
FEATURES = 2048
MODELS = ("bedroom", "lcm_sd15", "lcm_lora_sd15")


def main() -> None:
    """Run what the options name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/full_size"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--model", choices=MODELS, default=MODELS[0])
    parser.add_argument("--resolution", type=int, default=512, help="of Stable Diffusion")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    (bedroom if options.model == "bedroom" else stable_diffusion)(options)


def stable_diffusion(options: argparse.Namespace) -> None:
    """One step of distillation, and one row of a search on what it left, with what each took."""
    folder, recipes = options.folder / "sd15", RECIPE.parent
    if not folder.exists():
        pipeline(folder)
    side, device = options.resolution, pick_device(options.device)
    shared = [
        f'dataset={{use="invented", channels=3, resolution={side}, images=8, texts=4}}',
        f"codec.weights={folder}",
        'text={use="words", length=77, width=768}',
    ]
    step = [
        f"teacher.weights={folder}",
        "train.steps=1",
        "train.batch=1",
        "train.accumulate=1",
        "sampler.steps=1",
        "sample.images=1",
        "metric=[]",
    ]
    row = [
        'rescaler={use="global"}',
        f"search.images={options.images}",
        f"search.batch={options.images}",
        "search.grid={skip=[0.9, 1.0], emb=[1.0]}",
        "search.rerank=0",
        "search.confirm_seeds=2",
        f"search.confirm_images={options.images}",
        f"sample.images={options.images}",
    ]
    inception = options.folder / "inception.pth"
    if not inception.exists():
        torch.save(inception_weights(), inception)
    digest = hashlib.sha256(inception.read_bytes()).hexdigest()
    trusted = extractor_weights.Weights(inception.name, "nowhere", digest)
    made = plan(load(recipes / f"{options.model}.toml", [*shared, *step], discover()))
    print(
        f"{made.parameters:,} parameters, {made.trained:,} of them trained,"
        f" {made.flops / 1e12:.3f} TFLOP a forward pass; weights, gradients, optimizer and copies"
        f" take {made.memory / 2**30:.1f} GiB"
    )
    trained = finished(made, options.folder / "runs", device)
    told(trained, device)
    if options.model == "lcm_sd15":
        weights = [f"denoiser.weights={trained['folder']}"]
    else:
        precond = "{use='discrete', timestep_scaling=10.0, unit_start=true}"
        weights = [
            f"denoiser={{weights={str(folder)!r}, precond={precond}}}",
            f"adapter={{use='lora', weights={trained['folder']!r}}}",
        ]
    student = [
        *weights,
        f'metric=[{{use="fidelity", weights="{inception}"}}]',
    ]
    with mock.patch.dict(extractor_weights.PUBLIC, {"inception-v3-compat": trusted}):
        searched = load(recipes / "search_lcm_sd15.toml", [*shared, *student, *row], discover())
        told(finished(plan(searched), options.folder / "runs", device), device)


def pipeline(folder: Path) -> None:
    """A folder of Stable Diffusion 1.5, network, autoencoder and schedule, with fresh weights."""
    from cmkit_latent.backbone import PRESETS
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    torch.manual_seed(0)
    UNet2DConditionModel(**PRESETS["sd15"]).save_pretrained(folder / "unet")
    widths = (128, 256, 512, 512)
    AutoencoderKL(
        block_out_channels=widths,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
    ).save_pretrained(folder / "vae")
    DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    ).save_pretrained(folder / "scheduler")


def told(report: dict[str, Any], device: torch.device) -> None:
    """Print what the stages of a run took."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for stage, result in report["stages"].items():
        print(f"{stage:8} {result['seconds']:8.1f} s, peak {result['peak_memory_mib']:,.0f} MiB")


def bedroom(options: argparse.Namespace) -> None:
    """Write what is missing in the folder, run the recipe, print what each stage took."""
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
    told(report, device)
    sampled = report["stages"]["sample"]
    # The stage draws the samples, and the pictures before and after scaling once more.
    per_image = sampled["seconds"] / (3 * options.images)
    print(f"about {per_image:.2f} s an image with loading; peak {peak_memory_mib(device):,.0f} MiB")
    print(f"scores, of invented weights: {json.dumps(report['stages']['metric']['values'])}")


def finished(made: Any, out: Path, device: torch.device) -> dict[str, Any]:
    """The report of the run."""
    for event in run(made, discover(), out, device, StopSignal()):
        if isinstance(event, RunFinished):
            return {**event.report, "folder": str(event.folder)}
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
