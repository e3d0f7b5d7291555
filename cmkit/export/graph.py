"""The denoiser x0_hat = f(x, sigma, ..) as a graph that ONNX Runtime or torch.export opens without
cmkit, and beside it what drawing from it takes."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cmkit.denoiser import NO_COND, Cond, Denoiser, Guided
from cmkit.errors import CheckpointError, PluginError
from cmkit.export.drawing import DRAWING, Steps, drawn, steps_of
from cmkit.files import atomic_write

if TYPE_CHECKING:
    from cmkit.plan import Plan

Graph = Callable[[Mapping[str, Tensor]], Tensor]
"""x0_hat of inputs by name."""
TOLERANCE = 1e-3
"""Of x0_hat, relative to its largest value where that is above 1: an eighth of a step of 255."""
BATCHES = (1, 3)
"""Sizes at which graph and original are compared; the graph is traced at 2."""
FILES = {"onnx": "model.onnx", "torch": "model.pt2"}
NEEDED: dict[str, tuple[str, ...]] = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "torch": (),
}


class Exported(nn.Module):
    """A denoiser whose conditions are inputs of their own."""

    def __init__(self, denoiser: Denoiser):
        super().__init__()
        self.denoiser = denoiser

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        label: Tensor | None = None,
        guidance: Tensor | None = None,
        sigma_to: Tensor | None = None,
        text: Tensor | None = None,
        pooled: Tensor | None = None,
        size: Tensor | None = None,
    ) -> Tensor:
        """x0_hat, (B, C, H, W)."""
        cond = Cond(label, guidance, sigma_to, text, pooled, size)
        x0_hat: Tensor = self.denoiser(x, sigma, cond)
        return x0_hat


def require(to: str) -> None:
    """PluginError where a library that writes or opens the form `to` is not installed."""
    for module in NEEDED[to]:
        if importlib.util.find_spec(module) is None:
            raise PluginError(f"--to {to}: needs the package {module}; pip install 'cmkit[{to}]'")


def write(plan: Plan, denoiser: Denoiser, to: str, stage: Path, target: Path) -> dict[str, Any]:
    """Facts of the graph of `denoiser`, which is written to the folder `stage`, to be `target`,
    with model.json beside it; both were opened again and compared with the original.

    PluginError where the network cannot be followed, CheckpointError where the graph gives
    something else.
    """
    original = Exported(_told(denoiser)).eval()
    cases = [_inputs(plan, denoiser, size) for size in (*BATCHES, 2)]
    with torch.no_grad():
        # First of all: what a rescaler keeps of its numbers must be real, not of the tracing.
        expected = [original(**case) for case in cases]
        name = FILES[to]
        file = stage / name
        program = _traced(original, cases[-1], plan, target)
        if to == "torch":
            with _unwarned():
                torch.export.save(program, file)
            graph = open_torch(file)
        else:
            _write_onnx(program, file, list(cases[-1]), plan, target)
            graph = open_onnx(file)
        pairs = zip(cases, expected, strict=True)
        difference = max(_difference(graph(case), given) for case, given in pairs)
        _require_same(difference, target, "x0_hat")
        steps = steps_of(plan, denoiser)
        if steps is not None:
            difference = max(difference, _drawn_alike(plan, denoiser, steps, graph))
            _require_same(difference, target, "what is drawn")
    about = _about(plan, denoiser, to, name, cases[0], steps)
    atomic_write(stage / DRAWING, json.dumps(about, indent=2) + "\n")
    return {"file": name, "difference": difference, "tolerance": TOLERANCE, "about": about}


def _told(denoiser: Denoiser) -> Denoiser:
    """The denoiser that is told the guidance weight, where its network embeds one."""
    if isinstance(denoiser, Guided) and denoiser.embedded:
        return Guided(denoiser.inner, None, True)
    return denoiser


def _inputs(plan: Plan, denoiser: Denoiser, batch: int) -> dict[str, Tensor]:
    """Seeded inputs of a batch: noise levels from sigma_max down, and noise of these."""
    generator = torch.Generator().manual_seed(plan.recipe.seed)
    space, noise = plan.space, denoiser.noise

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    levels = noise.sigmas(4).flip(0)[:3].float()
    sigma = levels[torch.arange(batch) % 3]
    x = normal(space.channels, space.resolution, space.resolution)
    given = {"x": x * (1 + sigma**2).sqrt().view(-1, 1, 1, 1), "sigma": sigma}
    text = space.text
    makers: dict[str, Callable[[], Tensor]] = {
        "label": lambda: torch.arange(batch) % (space.num_classes or 1),
        "guidance": lambda: torch.full((batch,), plan.recipe.denoiser.guidance or 0.0),
        "sigma_to": lambda: torch.full((batch,), noise.sigma_min),
        "text": lambda: normal(text.length, text.width) if text else x,
        "pooled": lambda: normal(text.pooled or 1) if text else x,
        "size": lambda: torch.full((batch, 6), float(plan.data.resolution)),
    }
    return given | {name: make() for name, make in makers.items() if name in plan.conditions}


def _traced(module: Exported, case: Mapping[str, Tensor], plan: Plan, target: Path) -> Any:
    """The torch.export program, for any batch, without the places of source files."""
    shapes = {name: {0: torch.export.Dim.DYNAMIC} for name in case}
    rest = {name: value for name, value in case.items() if name not in ("x", "sigma")}
    try:
        with _unwarned():
            program = torch.export.export(
                module, (case["x"], case["sigma"]), rest, dynamic_shapes=shapes, strict=False
            )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever tracing a stranger's network raises
        raise _cannot(plan, target, "torch.export", error) from error
    for part in program.graph_module.modules():
        if isinstance(part, torch.fx.GraphModule):
            for node in part.graph.nodes:
                node.meta.pop("stack_trace", None)
    return program


def _write_onnx(program: Any, file: Path, names: list[str], plan: Plan, target: Path) -> None:
    try:
        with _unwarned():
            written = torch.onnx.export(
                program, dynamo=True, verbose=False, input_names=names, output_names=["x0_hat"]
            )
            assert written is not None
            for node in written.model.graph.all_nodes():
                node.metadata_props.clear()
            written.save(file)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever the converter raises
        raise _cannot(plan, target, "torch.onnx", error) from error


def _cannot(plan: Plan, target: Path, library: str, error: Exception) -> PluginError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    use = plan.recipe.resolved["backbone"]["use"]
    return PluginError(
        f"{target}: not written, {library} cannot follow the network of backbone {use!r}: {reason};"
        " draw with `cmkit sample`, or give the backbone a forward() without Python's branches on"
        " values"
    )


@torch.no_grad()
def open_torch(file: Path) -> Graph:
    """The graph in a .pt2 file."""
    with _unwarned():
        module = torch.export.load(file).module()

    def call(given: Mapping[str, Tensor]) -> Tensor:
        rest = {name: value for name, value in given.items() if name not in ("x", "sigma")}
        with torch.no_grad():
            x0_hat: Tensor = module(given["x"], given["sigma"], **rest)
        return x0_hat

    return call


def open_onnx(file: Path) -> Graph:
    """The graph in a .onnx file, on the CPU."""
    import onnxruntime  # type: ignore[import-untyped]

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def call(given: Mapping[str, Tensor]) -> Tensor:
        return torch.from_numpy(session.run(None, {k: v.numpy() for k, v in given.items()})[0])

    return call


def _drawn_alike(plan: Plan, denoiser: Denoiser, steps: Steps, graph: Graph) -> float:
    """By how much samples that `steps` draws with the graph differ from those of the sampler."""
    assert plan.recipe.sampler is not None
    case = _inputs(plan, denoiser, BATCHES[-1])
    generator = torch.Generator().manual_seed(plan.recipe.seed)
    draws = [torch.randn(case["x"].shape, generator=generator) for _ in steps.levels]
    rest = {name: value for name, value in case.items() if name not in ("x", "sigma")}
    cond = replace(NO_COND, **rest)
    x = denoiser.noise.start * draws[0]
    ours = plan.recipe.sampler.sample(denoiser, x, cond, lambda k: draws[k])
    theirs = drawn(steps, lambda x, sigma: graph({"x": x, "sigma": sigma, **rest}), draws)
    return _difference(theirs, ours)


def _difference(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


def _require_same(difference: float, target: Path, what: str) -> None:
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"{target}: not kept, {what} of the graph differs by {difference:.3g} from the"
            f" original's, and {TOLERANCE:g} is allowed; draw with `cmkit sample`, and report it"
        )


def _about(
    plan: Plan,
    denoiser: Denoiser,
    to: str,
    file: str,
    case: Mapping[str, Tensor],
    steps: Steps | None,
) -> dict[str, Any]:
    """What model.json says: all that drawing takes."""
    import cmkit

    recipe, noise = plan.recipe, denoiser.noise
    inputs = {
        name: {
            "shape": ["batch", *value.shape[1:]],
            "type": str(value.dtype).removeprefix("torch."),
            "is": MEANING[name],
        }
        for name, value in case.items()
    }
    shape = ["batch", *case["x"].shape[1:]]
    x0 = "latents of the codec" if recipe.codec else "pictures, about -1 to 1, to be clamped"
    found: dict[str, Any] = {
        "schema": 1,
        "format": to,
        "file": file,
        "cmkit": cmkit.__version__,
        "recipe": recipe.name,
        "inputs": inputs,
        "output": {"x0_hat": {"shape": shape, "type": "float32", "is": x0}},
        "noise": {
            "axis": "x = x0 + sigma * z, with z standard normal",
            "sigma_min": noise.sigma_min,
            "sigma_max": noise.sigma_max,
            "sigma_data": recipe.denoiser.sigma_data,
        },
        "sampler": recipe.resolved["sampler"],
        "steps": None if steps is None else [asdict(level) for level in steps.levels],
        "clamp": None if steps is None else steps.clamp,
        "pixels": None if recipe.codec else "((x0 + 1) * 127.5) rounded and clamped to 0 .. 255",
        "codec": recipe.resolved.get("codec"),
        "text": recipe.resolved.get("text"),
        "classes": list(plan.data.classes) if "label" in plan.conditions else None,
        "guidance": recipe.denoiser.guidance,
        "rescaling": recipe.rescaler and _rescaling(recipe),
    }
    return {key: value for key, value in found.items() if value not in (None, [])}


def _rescaling(recipe: Any) -> dict[str, Any]:
    policy = recipe.rescaler.settled()
    numbers = policy.model_dump(mode="json", exclude_none=True)
    return {"baked into the graph": {k: v for k, v in numbers.items() if k != "path"}}


MEANING = {
    "x": "noisy picture or latent",
    "sigma": "its noise level",
    "label": "class, by number",
    "guidance": "guidance weight w, the usual guidance scale less 1",
    "sigma_to": "noise level to go to; sigma_min for x0",
    "text": "features of the prompt's tokens, of the recipe's prompt encoder",
    "pooled": "features of the whole prompt",
    "size": "height and width, top and left of the crop, height and width after it, in pixels",
}


class _unwarned(warnings.catch_warnings):  # noqa: N801
    """Inside, the exporters' notes to their own authors are not shown."""

    def __enter__(self) -> Any:
        found = super().__enter__()
        warnings.simplefilter("ignore")
        return found
