"""What `cmkit new` writes is installed, listed, tested by its own tests, and run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import cmkit.new
from cmkit import RecipeError
from cmkit.plugins import KINDS

pytestmark = pytest.mark.wheels
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

kind = sys.argv[1]
cli("plugins", "show", kind, "two_words")
cli("plugins", "check", "cmkit-two-words")
cli("run", "recipe.toml", "--device", "cpu", "--set", "train.steps=2", "--set", "sample.images=16")
assert pytest.main(["-q", "-p", "no:cacheprovider", "-W", "error", "tests"]) == 0
"""


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_package_is_installed_listed_checked_run_and_tested(kind, tmp_path):
    folder, site = cmkit.new.new(kind, "two_words", tmp_path), tmp_path / "site"
    ours(site, *INSTALL.split(), str(site), str(folder), cwd=tmp_path)
    out = ours(site, "-c", COMMANDS, kind, cwd=folder)
    assert f"{kind} two_words (cmkit-two-words 0.1.0)" in out
    assert out.count(" pass\n") == 2
    assert list((folder / "runs").glob("two_words-*/report.html"))
    assert "2 passed" in out


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_package_is_in_our_style_and_leaves_no_placeholder(kind, tmp_path):
    folder = cmkit.new.new(kind, "abc", tmp_path)
    for path in folder.rglob("*"):
        assert "mine" not in path.name
        if path.is_file():
            text = path.read_text("utf-8")
            assert not {"mine", "Mine", "KIND"} & set(text.replace("_", " ").split())
    ruff = [sys.executable, "-m", "ruff"]
    for check in (["check", "--select", "E,F,B,UP,SIM,RUF"], ["format", "--check"]):
        done = subprocess.run(
            [*ruff, *check, "--line-length", "100", "--isolated", "--no-cache", "."],
            cwd=folder,
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
    ],
)
def test_what_cannot_be_written_is_refused_in_one_line(kind, name, told, tmp_path):
    (tmp_path / "cmkit-there").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RecipeError, match=told):
        cmkit.new.new(kind, name, tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
