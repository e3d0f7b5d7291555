"""What `cmkit new` writes is installed, listed, tested by its own tests, and run."""

import ast
import builtins
import keyword
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cmkit.new
from cmkit import RecipeError, ResourceError
from cmkit.plugins import KINDS

ROOT = Path(__file__).parent.parent


def ours(site: Path, *command: str, cwd: Path) -> str:
    """Output of a command of a fresh Python that sees this checkout and what lies in `site`."""
    path = os.pathsep.join(map(str, (site, ROOT, ROOT / "plugins")))
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200"},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


INSTALL = "-m pip install --quiet --no-build-isolation --no-deps --no-index --target"
COMMANDS = """
import sys, pytest
from cmkit.cli import main

def cli(*words):
    sys.argv = ["cmkit", *words]
    try:
        main()
    except SystemExit as done:
        assert done.code == 0, words

folders = []
for kind in sys.argv[1:]:
    cli("plugins", "show", kind, f"new_{kind}")
    folders.append(f"cmkit-new-{kind}")
    few = "--set", "train.steps=2", "--set", "sample.images=16"
    if kind not in ("text", "adapter"):  # which need a network of cmkit-latent, or a trained one
        cli("run", f"{folders[-1]}/recipe.toml", "--device", "cpu", *few)
options = "-q", "-p", "no:cacheprovider", "-W", "error"
assert pytest.main([*options, *(f"{folder}/tests" for folder in folders)]) == 0
"""


@pytest.mark.wheels
def test_new_packages_are_installed_listed_checked_run_and_tested(tmp_path):
    """One of each kind, side by side in one environment and one process."""
    folders = [cmkit.new.new(kind, f"new_{kind}", tmp_path) for kind in KINDS]
    site = tmp_path / "site"
    ours(site, *INSTALL.split(), str(site), *map(str, folders), cwd=tmp_path)
    out = ours(site, "-c", COMMANDS, *KINDS, cwd=tmp_path)
    for kind in KINDS:
        assert f"{kind} new_{kind} (cmkit-new-{kind} 0.1.0)" in out
        assert kind in ("text", "adapter") or list(tmp_path.glob(f"runs/new_{kind}-*/report.html"))
    assert f"{2 * len(KINDS)} passed" in out  # each is a check of the package, among others


def test_new_packages_are_in_our_style_and_leave_no_placeholder(tmp_path):
    for kind in KINDS:
        cmkit.new.new(kind, "abc", tmp_path / kind)
    for path in tmp_path.rglob("*"):
        assert "mine" not in path.name
        if path.is_file():
            text = path.read_text("utf-8")
            assert not {"mine", "Mine", "KIND"} & set(text.replace("_", " ").split())
    ruff = [sys.executable, "-m", "ruff"]
    for check in (["check", "--select", "E,F,B,UP,SIM,RUF"], ["format", "--check"]):
        done = subprocess.run(
            [*ruff, *check, "--line-length", "100", "--isolated", "--no-cache", "."],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("kind", "name", "told"),
    [
        ("samplr", "x", "no such kind; did you mean 'sampler'"),
        ("sampler", "Upper", "begins with a lower-case letter"),
        ("sampler", "../x", "begins with a lower-case letter"),
        ("sampler", "there", "it is there already"),
        ("sampler", "a_", "single '_' between"),
        ("sampler", "a__b", "single '_' between"),
        ("sampler", "x" * 41, "a name begins with"),
        ("objective", "manifest", "has a module manifest of its own"),
        ("objective", "class", "a word of Python"),
        ("objective", "lambda", "a word of Python"),
        ("objective", "none", "'None' is a word of Python"),
        ("objective", "phase", "Phase is a class that its module needs"),
        ("objective", "objective", "Objective is a class that its module needs"),
        ("backbone", "network", "Network is a class that its module needs"),
        ("objective", "exception", "Exception is a class that its module needs"),
        ("objective", "std", "there is a package cmkit_std already"),
    ],
)
def test_what_cannot_be_written_is_refused_in_one_line(kind, name, told, tmp_path):
    (tmp_path / "cmkit-there").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RecipeError, match=told):
        cmkit.new.new(kind, name, tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_name_is_taken_its_modules_compile_and_its_class_is_no_other(kind, tmp_path):
    """Every second of the words that its own files hold, and the words of Python."""
    words = {word for text in cmkit.new._files(kind).values() for word in re.findall(r"\w+", text)}
    words = {*sorted(words)[KINDS.index(kind) % 2 :: 2]}
    words |= {*keyword.kwlist, *keyword.softkwlist, *dir(builtins), "a_1", "x2"}
    written = 0
    for name in sorted(words | {word.lower() for word in words}):
        try:
            folder = cmkit.new.new(kind, name, tmp_path)
        except RecipeError:
            continue
        written += 1
        for path in folder.rglob("*.py"):
            compile(path.read_text("utf-8"), path, "exec")
        module = (folder / f"src/cmkit_{name}/{name}.py").read_text("utf-8")
        made = [node.name for node in ast.parse(module).body if isinstance(node, ast.ClassDef)]
        assert len(set(made)) == len(made) >= 1
        assert not set(made) & {word.split(" as ")[-1] for word in imported(module)}
    assert written > 50


def imported(module: str) -> list[str]:
    return [
        alias.asname or alias.name
        for node in ast.walk(ast.parse(module))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    ]


def test_a_package_cannot_be_put_below_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="Not a directory"):
        cmkit.new.new("sampler", "x", tmp_path / "file")
