"""Hostile packages, installed by pip: none of them stops a command or changes a run that does not
name it, and each has its one line."""

import hashlib
import json
import shlex
from pathlib import Path

import pytest

from tests.forks import CMKIT, Fork
from tests.wheels import Environment, write

HOOK = """
import cmkit
@cmkit.hookimpl
def cmkit_register():
    return [cmkit.Plugin("{kind}", "{name}", "{target}", "a test"{more})]
"""


def hook(name="x", target="hostile_part:Part", kind="rescaler", more=""):
    return HOOK.format(kind=kind, name=name, target=target, more=more)


PARTS = {
    "hostile_endless.py": hook("endless", "endless_part:Endless"),
    "hostile_part.py": """
from cmkit import Rescaler
class Part(Rescaler):
    '''A test.'''
    def bind(self, sites):
        return lambda sigma: {}
""",
    "endless_part.py": """
from __future__ import annotations
from cmkit import Rescaler
class Endless(Rescaler):
    '''Its schema has no end.'''
    @classmethod
    def model_json_schema(cls, **options):
        return cls.model_json_schema(**options)
    def bind(self, sites):
        return lambda sigma: {}
""",
    "exits.py": "import sys; sys.exit(0)",
}
"""Path -> text of what the manifests below point at, and of one that points there itself."""
LISTED = {
    "raises": ("raise RuntimeError('boom')", "RuntimeError: boom"),
    "lacks-module": ("import no_such_module_here", "ModuleNotFoundError"),
    "imports-torch": (f"import torch\ntorch.manual_seed(1)\n{hook()}", "imports torch"),
    "exits": ("import sys; sys.exit(0)", "SystemExit: 0"),
    "newer": (hook("newer", more=", api=2"), "written for cmkit API 2, this is 1"),
    "odd-api": (hook("odd", more=", api='x'"), "written for cmkit API x, this is 1"),
    "odd-target": (hook("odder", "hostile_part"), "is not 'module:Class'"),
    "many-lines": ("raise ValueError('one\\ntwo\\nthree')", "ValueError: one two three"),
}
"""Name -> (manifest, what `cmkit plugins` says)."""
NAMED = {
    "no-module": (hook("no-module", "gone:Part"), "ModuleNotFoundError"),
    "no-class": (hook("no-class", "hostile_part:Gone"), "AttributeError"),
    "wrong-base": (hook("wrong-base", "cmkit_std.datasets.digits:Digits"), "not a cmkit.Rescaler"),
    "exits-late": (hook("exits-late", "exits:Part"), "SystemExit"),
    "taken": (hook("global"), "say 'cmkit:global' or 'taken:global'"),
}
"""Name -> (manifest, what a recipe that names its part is told)."""
RECIPE = """
name = "plain"
dataset = { use = "digits" }
backbone = { use = "adm", channels = 8, channel_mult = [1], num_res_blocks = 1, norm_groups = 4 }
objective = { use = "edm" }
sampler = { use = "multistep" }
train = { steps = 2, batch = 4, precision = "fp32" }
sample = { images = 4, precision = "fp32" }
"""


@pytest.fixture(scope="module")
def besieged(built, tmp_path_factory) -> Environment:
    """A clean environment with cmkit and every hostile package."""
    wheels = tmp_path_factory.mktemp("hostile")
    for name, (manifest, _) in {**LISTED, **NAMED}.items():
        module = f"hostile_{name.replace('-', '_')}"
        write(wheels, name, {f"{module}.py": manifest}, module)
    write(wheels, "endless", PARTS, "hostile_endless")
    environment = Environment(tmp_path_factory.mktemp("besieged"))
    environment.install(*built, *wheels.iterdir())
    return environment


def test_every_hostile_package_is_listed_with_its_one_line(besieged, tmp_path):
    done = besieged.run("cmkit", "plugins", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    rows = json.loads(done.out)["plugins"]
    for name, (_, told) in LISTED.items():
        (row,) = [row for row in rows if row["package"] == name]
        assert told in row["broken"]
        assert "\n" not in row["broken"]
    for name in NAMED:
        (row,) = [row for row in rows if row["package"] == name]
        assert row["broken"] is None
    assert {"adm", "digits", "multistep"} <= {r["name"] for r in rows if r["package"] == "cmkit"}


OTHERS = (
    "run plain.toml --device cpu",
    "schema",
    "check plain.toml",
    "plugins show sampler multistep",
)
"""Commands that name no hostile package."""


def test_what_names_one_is_told_in_one_line_and_what_names_none_is_as_ever(besieged, tmp_path):
    """The weights and samples of a run are those of an environment without them."""
    (tmp_path / "plain.toml").write_text(RECIPE)
    for name in NAMED:
        part = "global" if name == "taken" else name
        (tmp_path / f"{name}.toml").write_text(f'{RECIPE}rescaler = {{ use = "{part}" }}\n')
    commands = [*(f"check {name}.toml" for name in NAMED), "plugins check raises", *OTHERS]
    done = besieged.several(*commands, cwd=tmp_path)
    for name, told in zip(NAMED, done, strict=False):
        assert told.code == 9, (name, told)
        (line,) = told.err.splitlines()
        assert line.startswith(f"error: {name}.toml:9: rescaler.use"), line
        assert NAMED[name][1] in line
    checked = done[len(NAMED)]
    assert checked.code == 9
    assert "RuntimeError: boom" in checked.out
    assert checked.err.startswith("error: raises: ")
    for command, told in zip(OTHERS, done[-len(OTHERS) :], strict=True):
        assert told.code == 0, (command, told.err)
        assert told.out
    (tmp_path / "free").mkdir()
    (tmp_path / "free" / "plain.toml").write_text(RECIPE)
    alone = Fork(CMKIT, *shlex.split(OTHERS[0]), cwd=tmp_path / "free").wait()
    assert alone.returncode == 0, alone.stderr
    kept = weights(tmp_path)
    assert kept == weights(tmp_path / "free")
    assert {Path(path).suffix for path in kept} == {".safetensors", ".npz"}


def weights(folder: Path) -> dict[str, str]:
    """Path -> hash of all weights and samples of the one run."""
    (run,) = (folder / "runs").iterdir()
    kept = [p for p in run.rglob("*") if p.suffix in {".safetensors", ".npz"}]
    return {str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest() for p in kept}
