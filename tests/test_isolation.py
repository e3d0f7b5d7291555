"""Hostile packages, installed as wheels install them: none of them stops a command or changes a
run that does not name it, and each has its one line."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOOK = """
import cmkit
@cmkit.hookimpl
def cmkit_register():
    return [cmkit.Plugin("{kind}", "{name}", "{target}", "a test"{more})]
"""
PART = """
from cmkit import Rescaler
class Part(Rescaler):
    '''A test.'''
    def bind(self, sites):
        return lambda sigma: {}
"""
SCHEMA = """
from __future__ import annotations
from cmkit import Rescaler
class Endless(Rescaler):
    '''Its schema has no end.'''
    @classmethod
    def model_json_schema(cls, **options):
        return cls.model_json_schema(**options)
    def bind(self, sites):
        return lambda sigma: {}
"""


def hook(name="x", target="hostile_part:Part", kind="rescaler", more=""):
    return HOOK.format(kind=kind, name=name, target=target, more=more)


LISTED = {
    "raises": ("raise RuntimeError('boom')", "RuntimeError: boom"),
    "lacks-module": ("import no_such_module_here", "ModuleNotFoundError"),
    "imports-torch": (f"import torch\n{hook()}", "imports torch"),
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
def site(tmp_path_factory) -> Path:
    """A folder as `pip install --target` leaves it, with every hostile package."""
    site = tmp_path_factory.mktemp("site")
    (site / "hostile_part.py").write_text(PART)
    endless = {"endless": (hook("endless", "endless_part:Endless"), "")}
    (site / "endless_part.py").write_text(SCHEMA)
    for name, (manifest, _) in {**LISTED, **NAMED, **endless}.items():
        module = f"hostile_{name.replace('-', '_')}"
        (site / f"{module}.py").write_text(manifest)
        info = site / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[cmkit]\n{name} = {module}\n")
    (site / "exits.py").write_text("import sys; sys.exit(0)")
    return site


def cmkit(*words: str, cwd: Path, site: Path | None = None) -> subprocess.CompletedProcess:
    path = os.pathsep.join(map(str, filter(None, (site, ROOT, ROOT / "plugins"))))
    return subprocess.run(
        [sys.executable, "-c", "from cmkit.cli import main; main()", *words],
        env={**os.environ, "PYTHONPATH": path},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_every_hostile_package_is_listed_with_its_one_line(site, tmp_path):
    done = cmkit("plugins", "--json", cwd=tmp_path, site=site)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["plugins"]
    for name, (_, told) in LISTED.items():
        (row,) = [row for row in rows if row["package"] == name]
        assert told in row["broken"]
        assert "\n" not in row["broken"]
    for name in NAMED:
        (row,) = [row for row in rows if row["package"] == name]
        assert row["broken"] is None
    assert {"adm", "digits", "multistep"} <= {r["name"] for r in rows if r["package"] == "cmkit"}


def test_commands_that_name_none_of_them_work(site, tmp_path):
    (tmp_path / "plain.toml").write_text(RECIPE)
    words = (["schema"], ["check", "plain.toml"], ["plugins", "show", "sampler", "multistep"])
    for command in words:
        done = cmkit(*command, cwd=tmp_path, site=site)
        assert done.returncode == 0, (command, done.stderr)
        assert done.stdout


@pytest.mark.parametrize("name", NAMED)
def test_a_recipe_that_names_one_is_told_in_one_line(name, site, tmp_path):
    part = "global" if name == "taken" else name
    path = tmp_path / "names.toml"
    path.write_text(f'{RECIPE}rescaler = {{ use = "{part}" }}\n')
    done = cmkit("check", "names.toml", cwd=tmp_path, site=site)
    assert done.returncode == 9
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: names.toml:9: rescaler.use")
    assert NAMED[name][1] in line


def test_a_package_that_fails_is_told_so_by_its_check(site, tmp_path):
    done = cmkit("plugins", "check", "raises", cwd=tmp_path, site=site)
    assert done.returncode == 9
    assert "RuntimeError: boom" in done.stdout
    assert done.stderr.startswith("error: raises: ")


def weights(folder: Path) -> dict[str, str]:
    (run,) = (folder / "runs").iterdir()
    kept = [p for p in run.rglob("*") if p.suffix in {".safetensors", ".npz"}]
    return {str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest() for p in kept}


def test_a_run_that_names_none_of_them_has_the_same_bits(site, tmp_path):
    found = []
    for name, hostile in (("alone", None), ("among", site)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "plain.toml").write_text(RECIPE)
        done = cmkit("run", "plain.toml", "--device", "cpu", cwd=folder, site=hostile)
        assert done.returncode == 0, done.stderr
        found.append(weights(folder))
    assert found[0] == found[1]
    assert any(path.endswith(".safetensors") for path in found[0])
    assert any(path.endswith(".npz") for path in found[0])
