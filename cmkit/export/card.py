"""The model card: README.md with the hub's header, how to draw, figures, recipe, whom to cite."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmkit.files import read_json

if TYPE_CHECKING:
    from cmkit.plugins import Registry
    from cmkit.recipe import Recipe


@dataclass(frozen=True)
class Card:
    """Whose card it is."""

    title: str
    recipe: Recipe
    registry: Registry
    run: Path | None = None
    license: str | None = None


def card(about: Card, to: str, facts: Mapping[str, Any] = {}) -> str:
    """The text of the card of a model in the form `to`; `facts` are those of model.json, or what a
    pipeline is called with."""
    import cmkit

    recipe = about.recipe
    report = _report(about.run)
    known = "Data and figures: below." if report else "Figures: to be said."
    return "\n".join(
        [
            *_header(about, to),
            f"# {about.title}\n",
            f"The model of the recipe `{recipe.name}`, written by cmkit {cmkit.__version__}."
            f" {known} Licence: {about.license or 'to be said'}.\n",
            *([f"{alone}.\n"] if (alone := alone_in(recipe, to)) else []),
            "```python",
            *_CODE[to](about, facts),
            "```\n",
            *(_figures(report) if report else ()),
            *_data(recipe, report),
            "## Recipe\n",
            "```toml",
            _told(recipe).strip(),
            "```\n",
            "## Cite\n",
            *[f"- {what}: {cite}" for cite, what in _cited(about).items()],
            "",
        ]
    )


def alone_in(recipe: Recipe, to: str) -> str:
    """What a graph does not hold of what drawing takes; "" where it holds all."""
    lacking = [f"[{kind}]" for kind in ("codec", "text") if getattr(recipe, kind)]
    if to not in ("onnx", "torch") or not lacking:
        return ""
    return (
        f"--to {to} holds the denoiser alone, of latents and features of prompts, without"
        f" {' and '.join(lacking)}; --to diffusers writes the whole pipeline"
    )


def _header(about: Card, to: str) -> Iterator[str]:
    recipe = about.recipe
    task = "text-to-image" if recipe.text else "unconditional-image-generation"
    yield f"---\nlibrary_name: {'pytorch' if to == 'torch' else to}\npipeline_tag: {task}"
    if about.license:
        yield f"license: {json.dumps(about.license)}"
    parts = [recipe.resolved[kind]["use"] for kind in ("backbone", "objective", "sampler")
             if kind in recipe.resolved]  # fmt: skip
    tags = dict.fromkeys(["cmkit", "consistency-models", *parts])
    yield "tags:\n" + "\n".join(f"- {json.dumps(tag)}" for tag in tags)
    yield "---\n"


def _cited(about: Card) -> dict[str, str]:
    cited: dict[str, str] = {}
    for kind, name in dict.fromkeys(about.recipe.used()):
        plugin = about.registry.find(kind, name).plugin
        if plugin and plugin.cite:
            cited.setdefault(plugin.cite, f"{kind} `{name}`")
    return cited


def _report(run: Path | None) -> dict[str, Any]:
    file = run / "report.json" if run else None
    return read_json(file) if file and file.is_file() else {}


def _figures(report: Mapping[str, Any]) -> Iterator[str]:
    """The numbers of the run's metrics, each with what it was measured by."""
    found = report.get("stages", {}).get("metric", {})
    values, provenance = found.get("values", {}), found.get("provenance", [])
    if not values:
        return
    yield "## Figures\n"
    if report["recipe"].get("smoke"):
        yield "Of a smoke run: they mean nothing.\n"
    yield "| number | value | images | extractor | compared with |\n|---|---|---|---|---|"
    for one in provenance:
        for name in one.get("numbers", []):
            if name in values:
                extractor, other = one.get("extractor", "none"), one.get("compared_with", "")
                yield (
                    f"| {name} | {values[name]:.5g} | {one.get('images', '')} |"
                    f" {extractor} | {other} |"
                )
    yield ""


def _data(recipe: Recipe, report: Mapping[str, Any]) -> Iterator[str]:
    table, spec = recipe.resolved["dataset"], report.get("data", {})
    found = report.get("inputs", {}).get("dataset", {})
    yield "## Data\n"
    shape = f", {spec['channels']}x{spec['resolution']}x{spec['resolution']}" if spec else ""
    images = f", {found['images']} pictures" if "images" in found else ""
    yield f"Data set `{table['use']}`{shape}{images}. Their licence is to be said.\n"


def _told(recipe: Recipe) -> str:
    """The recipe, with the last part alone of whole paths: the others are of one machine."""
    lines = []
    for line in recipe.toml().splitlines():
        key, equals, value = line.partition(" = ")
        if equals and value.startswith('"/') and value.endswith('"'):
            value = json.dumps(Path(json.loads(value)).name)
        lines.append(f"{key}{equals}{value}")
    return "\n".join(lines)


def _with_diffusers(about: Card, call: Mapping[str, Any]) -> Iterator[str]:
    prompt = [json.dumps(call["prompt"], ensure_ascii=False)] if "prompt" in call else []
    others = [f"{key}={value!r}" for key, value in call.items() if key != "prompt"]
    yield "from diffusers import DiffusionPipeline"
    yield f"pipeline = DiffusionPipeline.from_pretrained({about.title!r})"
    yield f'pipeline({", ".join([*prompt, *others])}).images[0].save("picture.png")'


def _with_cmkit(about: Card, _: Mapping[str, Any]) -> Iterator[str]:
    yield "import cmkit"
    place = f"hub:{about.title}" if "/" in about.title else about.title
    yield f"images = cmkit.load({json.dumps(place)}).sample(16, seed=0)  # uint8 (16, C, H, W)"


def _with_onnx(about: Card, facts: Mapping[str, Any]) -> Iterator[str]:
    yield "import json"
    yield ""
    yield "import numpy as np"
    yield "import onnxruntime"
    yield "from PIL import Image"
    yield ""
    yield 'about = json.load(open("model.json"))'
    yield 'session = onnxruntime.InferenceSession("model.onnx")'
    yield "rng, batch = np.random.default_rng(0), 4"
    yield from _given(facts, "np.", ", np.")
    yield 'shape = (batch, *about["inputs"]["x"]["shape"][1:])'
    yield "x0 = np.zeros(shape, np.float32)"
    yield from _loop(facts)
    yield '    x = x0 + np.float32(step["noise"]) * rng.standard_normal(shape, np.float32)'
    yield '    sigma = np.full(batch, step["sigma"], np.float32)'
    yield '    (x0,) = session.run(None, {"x": x, "sigma": sigma, **given})'
    if "clamp" in facts:
        yield '    x0 = x0.clip(*about["clamp"])'
    if "pixels" in facts:
        yield "pixels = ((x0 + 1) * 127.5).round().clip(0, 255).astype(np.uint8)"
        yield 'Image.fromarray(pixels[0].transpose(1, 2, 0).squeeze()).save("picture.png")'


def _with_torch(about: Card, facts: Mapping[str, Any]) -> Iterator[str]:
    yield "import json"
    yield ""
    yield "import torch"
    yield "from PIL import Image"
    yield ""
    yield 'about = json.load(open("model.json"))'
    yield 'denoiser = torch.export.load("model.pt2").module()'
    yield "torch.manual_seed(0)"
    yield "batch = 4"
    yield from _given(facts, "torch.", ", dtype=torch.")
    yield 'shape = (batch, *about["inputs"]["x"]["shape"][1:])'
    yield "x0 = torch.zeros(shape)"
    yield from _loop(facts)
    yield '    x = x0 + step["noise"] * torch.randn(shape)'
    yield '    sigma = torch.full((batch,), step["sigma"])'
    yield "    with torch.no_grad():"
    yield "        x0 = denoiser(x, sigma, **given)"
    if "clamp" in facts:
        yield '    x0 = x0.clamp(*about["clamp"])'
    if "pixels" in facts:
        yield "pixels = ((x0 + 1) * 127.5).round().clamp(0, 255).byte()"
        yield "picture = pixels[0].permute(1, 2, 0).squeeze(-1).numpy()"
        yield 'Image.fromarray(picture).save("picture.png")'


def _given(facts: Mapping[str, Any], home: str, typed: str) -> Iterator[str]:
    """The line of the inputs beside x and sigma."""
    said = []
    for name, about in facts["inputs"].items():
        if name in ("x", "sigma"):
            continue
        shape = ", ".join(["batch", *map(str, about["shape"][1:])])
        value = f"{home}zeros(({shape},){typed}{about['type']})"
        if name == "guidance":
            value = f"{home}full((batch,), {facts.get('guidance') or 0.0}{typed}float32)"
        if name == "sigma_to":
            value = f"{home}full((batch,), {facts['noise']['sigma_min']}{typed}float32)"
        said.append(f'"{name}": {value}')
    features = [name for name in ("text", "pooled") if name in facts["inputs"]]
    comment = f"  # {', '.join(features)}: features of a prompt" if features else ""
    yield f"given = {{{', '.join(said)}}}{comment}"


def _loop(facts: Mapping[str, Any]) -> Iterator[str]:
    """The head of the loop over the steps; one step where the sampler does more than these."""
    if "steps" in facts:
        yield 'for step in about["steps"]:'
        return
    use = facts["sampler"]["use"]
    yield f"# One step: sampler {use!r} does more than draw fresh noise, and is not written here."
    high = facts["noise"]["sigma_max"]
    yield f'for step in [{{"sigma": {high}, "noise": {high}}}]:'


_CODE = {
    "diffusers": _with_diffusers,
    "cmkit": _with_cmkit,
    "onnx": _with_onnx,
    "torch": _with_torch,
}
