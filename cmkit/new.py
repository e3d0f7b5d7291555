"""A new package with one part, which passes its own tests: where authors start."""

from __future__ import annotations

import ast
import builtins
import keyword
import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

from cmkit.errors import RecipeError, did_you_mean
from cmkit.files import new_folder
from cmkit.plugins import KINDS

TEMPLATES = Path(__file__).parent / "templates"
"""One working part of each kind, called `mine`, and a package to put it in."""

RECIPE = {
    "dataset": '[dataset]\nuse = "digits"\n',
    "backbone": (
        '[backbone]\nuse = "adm"\nchannels = 16\nchannel_mult = [1, 2]\nnum_res_blocks = 1\n'
        "norm_groups = 8\n"
    ),
    "objective": '[objective]\nuse = "ict"\nstart_scales = 10\nend_scales = 80\n',
    "train": '[train]\nsteps = 200\nbatch = 32\nlr = 1e-3\nprecision = "fp32"\n',
    "sampler": '[sampler]\nuse = "multistep"\n',
    "sample": '[sample]\nimages = 64\nprecision = "fp32"\n',
    "metric": '[[metric]]\nuse = "digits_judge"\n',
}
DIFFUSION = {
    "denoiser": '[denoiser]\nprecond = "mine"\n',
    "objective": '[objective]\nuse = "edm"\n',
    "sampler": '[sampler]\nuse = "euler"\nsteps = 10\n',
}
"""What the recipe of a precond has instead."""
PROMPTED = {
    "dataset": '[dataset]\nuse = "invented"\nchannels = 1\nresolution = 8\ntexts = 4\n',
    "backbone": '# pip install cmkit-latent\n[backbone]\nuse = "sd_unet"\npreset = "tiny"\n',
    "denoiser": '[denoiser]\nprecond = "discrete"\n',
    "objective": '[objective]\nuse = "edm"\n',
    "sampler": '[sampler]\nuse = "ddim"\nsteps = 10\n',
}
"""What the recipe of a prompt encoder has instead: pictures with captions, a network for them."""


def new(kind: str, name: str, out: Path) -> Path:
    """The folder of a new package `cmkit-NAME` below `out`.

    RecipeError for an unknown kind, a name that no module can have, or a folder that exists.
    """
    if kind not in KINDS:
        raise RecipeError(f"new {kind}: no such kind{did_you_mean(kind, KINDS)}")
    if not re.fullmatch(r"(?=.{1,40}$)[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        raise RecipeError(
            f"new {kind} {name}: a name begins with a lower-case letter, and has lower-case"
            " letters, digits, and single '_' between them; take the acronym of its paper"
        )
    if taken := _taken(kind, name):
        raise RecipeError(f"new {kind} {name}: {taken}; choose another name")
    folder = out / _named(kind, name, "cmkit-mine")
    if folder.exists():
        raise RecipeError(f"{folder}: it is there already; choose another name or --out")
    with new_folder(folder) as stage:
        for path, text in _files(kind).items():
            file = stage / _named(kind, name, path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(_named(kind, name, text), encoding="utf-8")
    return folder


def _taken(kind: str, name: str) -> str:
    """Why a part of this kind cannot have the name; "" if it can."""
    camel, package = _named(kind, name, "Mine"), _named(kind, name, "cmkit_mine")
    if keyword.iskeyword(name) or keyword.iskeyword(camel):
        return f"{name!r} or {camel!r} is a word of Python"
    if find_spec(package):
        return f"there is a package {package} already"
    files = _files(kind)
    if f"src/{package}/{name}.py" in {_named(kind, name, p) for p in files if "mine.py" not in p}:
        return f"the package has a module {name} of its own"
    if camel in dir(builtins) or (camel != "Mine" and camel in set(_names(files))):
        return f"{camel} is a class that its module needs"
    return ""


def _names(files: Mapping[str, str]) -> Iterator[str]:
    """The names that the modules of a package use."""
    for path, text in files.items():
        for node in ast.walk(ast.parse(text)) if path.endswith(".py") else ():
            if isinstance(node, ast.Name):
                yield node.id
            elif isinstance(node, ast.alias):
                yield node.asname or node.name


def _files(kind: str) -> dict[str, str]:
    """Path -> text of a package whose part is called `mine`."""
    package = TEMPLATES / "package"
    copied = [file for file in package.rglob("*.*") if file.suffix in (".md", ".py", ".toml")]
    files = {str(file.relative_to(package)): file.read_text("utf-8") for file in copied}
    for template in TEMPLATES.glob(f"{kind}*.py"):
        module = template.name.replace(kind, "mine", 1)
        files[f"src/cmkit_mine/{module}"] = template.read_text("utf-8")
    return {**files, "recipe.toml": _recipe(kind)}


def _recipe(kind: str) -> str:
    head = f"[[{kind}]]" if kind in ("metric", "tracker") else f"[{kind}]"
    own = {kind: f'{head}\nuse = "mine"\n'}
    changes = {"precond": DIFFUSION, "text": {**PROMPTED, **own}}.get(kind, own)
    first = {"dataset": "", kind: ""} if kind in ("codec", "text") else {}
    tables = {**first, **RECIPE, **changes}
    if kind == "adapter":  # of a trained network, such as that of `cmkit new backbone`
        tables = {**tables, "denoiser": '[denoiser]\nweights = "runs/NAME-KEY"\n'}
    if kind == "text":
        del tables["metric"]  # it knows digits
    return "\n".join(['# cmkit run recipe.toml\nname = "mine"\nseed = 0\n', *tables.values()])


def _named(kind: str, name: str, text: str) -> str:
    """`text` with the placeholders `mine`, `Mine` and KIND filled in."""
    camel = "".join(word.capitalize() for word in name.split("_"))
    text = text.replace("cmkit-mine", f"cmkit-{name.replace('_', '-')}").replace("KIND", kind)
    text = re.sub(r"(?<![a-z])mine(?![a-z])", name, text)
    return re.sub(r"(?<![a-z])Mine(?![a-z])", camel, text)
