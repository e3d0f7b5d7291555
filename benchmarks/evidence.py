"""Every objective at one budget on real data: scores, cost and pictures of each, as RESULTS.md.

python benchmarks/evidence.py --out runs/evidence
Each row is trained with three seeds by `cmkit run`, so that an interrupted call goes on; the
recipes that it writes into OUT/recipes run by themselves as well. `--data fashion_mnist` wants a
GPU and the weights of Inception, or `--extractor` and `--weights` of another network; `--rows ict
ct` runs some rows, `--jobs 2` two seeds at once. The rows ect, sct, scd and meanflow want the
packages in plugins/ installed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import tomlkit
import torch

from cmkit import __version__
from cmkit.files import atomic_write
from cmkit.pictures import grid_png

SECOND = 0.821
"""Noise level of a second step: that of iCT and ECT on small images."""
SHOWN = 20
"""Samples of each row in the picture."""


@dataclass(frozen=True)
class Setting:
    """What all rows share."""

    dataset: Mapping[str, Any]
    backbone: Mapping[str, Any]
    train: Mapping[str, Any]
    images: int
    metric: Sequence[Mapping[str, Any]]


DIGITS = Setting(
    dataset={"use": "digits"},
    backbone={
        "use": "adm",
        "channels": 32,
        "channel_mult": [1, 2],
        "num_res_blocks": 2,
        "attention_resolutions": [4],
        "num_head_channels": 32,
        "use_scale_shift_norm": True,
        "resblock_updown": True,
    },
    train={
        "steps": 500,
        "batch": 128,
        "lr": 1e-3,
        "warmup": 30,
        "decay": True,
        "optimizer": "adamw",
        "betas": [0.9, 0.99],
        "ema": [0.99],
        "save_every": 250,
        "log_every": 20,
        "precision": "fp32",
    },
    images=1000,
    metric=[
        {"use": "fidelity", "fid": True, "precision_recall": True},
        {"use": "digits_judge"},
    ],
)
FASHION = Setting(
    dataset={"use": "fashion_mnist"},
    backbone={**DIGITS.backbone, "channels": 64, "channel_mult": [1, 2, 2]}
    | {"attention_resolutions": [16, 8]},
    train={**DIGITS.train, "steps": 20_000, "batch": 256, "lr": 4e-4, "warmup": 500}
    | {"ema": [0.999], "save_every": 2000, "log_every": 100, "precision": "bf16"},
    images=10_000,
    metric=[{"use": "fidelity", "fid": True, "precision_recall": True}],
)
SETTINGS = {"digits": DIGITS, "fashion_mnist": FASHION}


@dataclass(frozen=True)
class Row:
    """What makes an objective's recipe: its tables, and what it starts from."""

    objective: Mapping[str, Any]
    tables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Keys over those of the setting; a table that the setting lacks is new."""
    teacher: str | None = None
    """The row whose run is the teacher."""
    start: str | None = None
    """The row whose run the weights come from."""
    samplers: Mapping[int, Mapping[str, Any]] = field(
        default_factory=lambda: {
            1: {"use": "multistep"},
            2: {"use": "multistep", "sigmas": [SECOND]},
        }
    )
    """By evaluations of the network."""
    note: str = ""


SLOW = {"time_scale": 4.0}
"""Of derivatives by the noise level: they are not to be mostly the embedding's."""
DISTILLED = {"denoiser": {"init": "teacher"}, "backbone": {"null_class": True}}
ROWS = {
    "edm": Row(
        {"use": "edm", "label_dropout": 0.1},
        {"denoiser": {"precond": "edm"}, "backbone": {"null_class": True}},
        samplers={35: {"use": "heun", "steps": 18}},
        note="teacher of the rows below it; Heun, 18 steps",
    ),
    "ct": Row(
        {"use": "ct", "end_scales": 20, "distance": "l2"},
        note="N 2 to 21, l2",
    ),
    "ict": Row(
        {"use": "ict", "start_scales": 10, "end_scales": 80},
        note="N 11 to 81",
    ),
    "cd": Row(
        {"use": "cd", "num_sigmas": 18, "distance": "l2"},
        DISTILLED,
        teacher="edm",
        note="N = 18, Heun, l2",
    ),
    "ctm": Row(
        {"use": "ctm", "num_sigmas": 18, "max_gap": 6, "distance": "l2", "target_ema": 0.95},
        {"denoiser": {"init": "teacher", "precond": "edm"}, "backbone": {"null_class": True}},
        teacher="edm",
        samplers={
            1: {"use": "gamma"},
            2: {"use": "gamma", "gamma": 1.0, "sigmas": [SECOND]},
        },
        note="N = 18, at most 6 Heun steps, l2, score matching, no GAN",
    ),
    "lcm": Row(
        {
            "use": "lcm",
            "num_sigmas": 181,
            "skip": 10,
            "w_min": 0.0,
            "w_max": 2.0,
            "distance": "l2",
        },
        {
            "denoiser": {"init": "teacher", "guidance": 0.5},
            "backbone": {"null_class": True},
        },
        teacher="edm",
        samplers={
            1: {"use": "lcm", "steps": 1, "grid": 18},
            2: {"use": "multistep", "sigmas": [SECOND]},
        },
        note="181 levels, 10 at a time, guided by w of 0 to 2, sampled at w = 0.5",
    ),
    "ct-long": Row(
        {"use": "ct", "end_scales": 20, "distance": "l2"},
        {"train": {"steps": 2000, "save_every": 500}},
        note="`ct` with four times the steps",
    ),
    "ict-long": Row(
        {"use": "ict", "start_scales": 10, "end_scales": 80},
        {"train": {"steps": 1000, "save_every": 500}},
        note="`ict` with the steps of a teacher besides its own",
    ),
    "ect": Row(
        {"use": "ect", "stage_steps": 125},
        {"denoiser": {"precond": "edm"}, "backbone": {"null_class": True}},
        start="edm",
        samplers={1: {"use": "ect"}, 2: {"use": "ect", "sigmas": [SECOND]}},
        note="from `edm`, 4 stages",
    ),
    "sct": Row(
        {"use": "scm", "warmup": 150},
        {"denoiser": {"precond": "edm"}, "backbone": SLOW},
        note="time_scale 4",
    ),
    "sct-plain": Row(
        {"use": "scm", "warmup": 150, "learned_weight": False},
        {"denoiser": {"precond": "edm"}, "backbone": SLOW},
        note="time_scale 4, without the learned weight",
    ),
    "edm-slow": Row(
        {"use": "edm"},
        {"denoiser": {"precond": "edm"}, "backbone": SLOW},
        samplers={35: {"use": "heun", "steps": 18}},
        note="teacher of `scd`, time_scale 4",
    ),
    "scd": Row(
        {"use": "scm", "distil": True, "warmup": 150},
        {
            "denoiser": {"precond": "edm", "init": "teacher"},
            "backbone": SLOW,
            "train": {"lr": 3e-4},
        },
        teacher="edm-slow",
        note="time_scale 4, learning rate 3e-4",
    ),
    "meanflow": Row(
        {"use": "meanflow", "p_std": 1.4},
        {"denoiser": {"precond": "edm", "sigma_max": 20.0}, "backbone": SLOW},
        samplers={1: {"use": "meanflow", "steps": 1}, 2: {"use": "meanflow", "steps": 2}},
        note="from sigma 20, time_scale 4",
    ),
}
BUILT_IN = ("edm", "ct", "ict", "cd", "ctm", "lcm")
"""Rows of the table by default; the others are controls, or need a package of plugins/."""


def recipe(setting: Setting, name: str, row: Row, seed: int, folders: Mapping[str, str]) -> Any:
    """The recipe that trains a row, with the folders of the runs that it goes on from."""
    tables = {
        "name": f"{name}-s{seed}",
        "seed": seed,
        "dataset": setting.dataset,
        "backbone": setting.backbone,
        "denoiser": {},
        "objective": row.objective,
        "train": setting.train,
        "sampler": row.samplers[min(row.samplers)],
        "sample": {"images": setting.images, "batch": 500, "labels": "uniform"},
        "metric": list(setting.metric),
    }
    if setting.train["precision"] == "fp32":
        tables["sample"]["precision"] = "fp32"
    tables = copy.deepcopy(tables)
    for table, keys in row.tables.items():
        tables[table] = {**tables.get(table, {}), **keys}
    if row.teacher:
        tables["teacher"] = {"weights": folders[row.teacher]}
    if row.start:
        tables["denoiser"]["weights"] = folders[row.start]
    return tables


def resampled(trained: Mapping[str, Any], row: Row, nfe: int, folder: str) -> Any:
    """The recipe that samples a trained row in `nfe` evaluations."""
    tables = copy.deepcopy(dict(trained))
    del tables["train"]  # the objective stays, since what the network embeds follows from it
    tables["denoiser"] = {k: v for k, v in tables["denoiser"].items() if k != "init"}
    tables["denoiser"]["weights"] = folder
    tables["name"] = f"{tables['name']}-nfe{nfe}"
    tables["sampler"] = row.samplers[nfe]
    return tables


def run(out: Path, tables: Mapping[str, Any], threads: int, device: str) -> tuple[str, Any]:
    """(folder, report) of `cmkit run` on a recipe, as paths from `out`."""
    path = out / "recipes" / f"{tables['name']}.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, tomlkit.dumps(tables))
    cmkit = Path(sys.executable).with_name("cmkit")
    command = [cmkit, "run", f"recipes/{path.name}", "--out", "."]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [*command, "--device", device, "--json"],
        cwd=out,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{tables['name']}: {done.stderr.strip().splitlines()[-1]}")
    folder = json.loads(done.stdout)["folder"]
    return folder, json.loads((out / folder / "report.json").read_text("utf-8"))


def chain(
    out: Path, setting: Setting, names: Sequence[str], seed: int, threads: int, device: str
) -> dict[str, dict[str, Any]]:
    """What the rows `names` came to with one seed, teachers first."""
    folders: dict[str, str] = {}
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        row = ROWS[name]
        tables = recipe(setting, name, row, seed, folders)
        folders[name], trained = run(out, tables, threads, device)
        scores = {min(row.samplers): trained["stages"]["metric"]["values"]}
        shown = {min(row.samplers): folders[name]}
        for nfe in sorted(row.samplers)[1:]:
            again = resampled(tables, row, nfe, folders[name])
            shown[nfe], report = run(out, again, threads, device)
            scores[nfe] = report["stages"]["metric"]["values"]
        found[name] = {
            "folder": folders[name],
            "scores": scores,
            "folders": shown,
        }
        print(f"seed {seed} {name}: {found[name]}", file=sys.stderr, flush=True)
    return found


def cost(
    out: Path, setting: Setting, name: str, folders: Mapping[str, str], threads: int, device: str
) -> float:
    """Milliseconds of a training step: the mean of thirty, after ten."""
    tables = recipe(setting, name, ROWS[name], 0, folders)
    for stage in ("sampler", "sample", "metric"):
        del tables[stage]
    tables["name"] = f"{name}-cost"
    tables["train"] |= {"steps": 40, "log_every": 10, "save_every": 40, "warmup": 0}
    folder, _ = run(out, tables, threads, device)
    lines = (out / folder / "log.jsonl").read_text("utf-8").splitlines()
    return statistics.fmean(1000 / json.loads(line)["rate"] for line in lines[1:])


def needed(names: Sequence[str]) -> list[str]:
    """The rows `names` and those that they start from, in the order of `ROWS`."""
    wanted = set(names)
    for name in names:
        wanted |= {other for other in (ROWS[name].teacher, ROWS[name].start) if other}
    return [name for name in ROWS if name in wanted]


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation over seeds."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def table(seeds: Sequence[Mapping[str, Mapping[str, Any]]], costs: Mapping[str, float]) -> str:
    """The rows of every seed as Markdown, means and standard deviations."""
    lines = [
        "| objective | NFE | FID | precision | recall | sure | ms a step | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in seeds[0]:
        row, runs = ROWS[name], [seed[name] for seed in seeds]
        for nfe in sorted(row.samplers):
            scores = [run["scores"][nfe] for run in runs]
            cells = [spread([s["fid"] for s in scores], 2)]
            cells += [
                spread([s[key] for s in scores], 3) if key in scores[0] else ""
                for key in ("precision", "recall", "confident")
            ]
            first = nfe == min(row.samplers)
            told = [f"{costs[name]:.0f}", row.note] if first else ["", ""]
            lines.append(f"| {name if first else ''} | {nfe} | {' | '.join([*cells, *told])} |")
    return "\n".join(lines)


def picture(out: Path, found: Mapping[str, Mapping[str, Any]]) -> bytes:
    """The first samples of every row and number of evaluations, a line each."""
    lines = []
    for name, entry in found.items():
        for nfe in sorted(ROWS[name].samplers):
            (first, *_) = sorted((out / entry["folders"][nfe] / "samples").glob("*.npz"))
            with np.load(first, allow_pickle=False) as arrays:
                lines.append(torch.from_numpy(arrays["arr_0"][:SHOWN]).permute(0, 3, 1, 2))
    return grid_png(torch.cat(lines), columns=SHOWN)


def machine(device: str) -> str:
    """What ran, in words."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} CPU with {capability}"


def main() -> None:
    """Train, sample and measure what is not there yet; write RESULTS.md and the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", choices=SETTINGS, default="digits")
    parser.add_argument("--extractor", help="features of FID, such as timm-tf_efficientnet_lite0")
    parser.add_argument("--weights", help="the file of that extractor's weights")
    parser.add_argument("--steps", type=int, help="another budget")
    parser.add_argument("--images", type=int, help="another number of samples")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(BUILT_IN))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="seeds that run at once")
    parser.add_argument("--threads", type=int, default=1, help="of each run, on a CPU")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    setting, names = SETTINGS[options.data], needed(options.rows)
    seen = {key: getattr(options, key) for key in ("extractor", "weights") if getattr(options, key)}
    first, *others = setting.metric
    train = {**setting.train, **({"steps": options.steps} if options.steps else {})}
    images = options.images or setting.images
    setting = replace(setting, metric=[{**first, **seen}, *others], train=train, images=images)
    options.out.mkdir(parents=True, exist_ok=True)

    def one(seed: int) -> dict[str, dict[str, Any]]:
        return chain(options.out, setting, names, seed, options.threads, options.device)

    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        seeds = list(pool.map(one, options.seeds))
    atomic_write(options.out / "samples.png", picture(options.out, seeds[0]))
    folders = {name: entry["folder"] for name, entry in seeds[0].items()}
    costs = {
        name: cost(options.out, setting, name, folders, options.threads, options.device)
        for name in names
    }
    told = (
        f"cmkit {__version__}, torch {torch.__version__}, {machine(options.device)},"
        f" {options.threads} threads a run; seeds"
        f" {', '.join(map(str, options.seeds))}; {setting.train['steps']} steps of"
        f" {setting.train['batch']} images a row, {setting.images} samples."
    )
    atomic_write(options.out / "RESULTS.md", f"{told}\n\n{table(seeds, costs)}\n")
    print((options.out / "RESULTS.md").read_text("utf-8"))


if __name__ == "__main__":
    main()
