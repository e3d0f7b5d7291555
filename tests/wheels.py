"""Wheels, built from this checkout or by hand, and clean environments that pip installs them in."""

import json
import os
import shlex
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PACKAGES = ("cmkit-ect", "cmkit-scm", "cmkit-meanflow", "cmkit-latent", "cmkit-trackers")
"""The distributions beside cmkit."""
SEVERAL = """
import contextlib, io, json, sys
from cmkit.cli import main

for words in json.loads(sys.argv[1]):
    sys.argv, out, err = ["cmkit", *words], io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as done:
            code = done.code
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


class Done(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


def build(out: Path) -> None:
    """The wheels of cmkit and of the packages beside it, built by their own backends."""
    sources = [ROOT, *(ROOT / "plugins" / name for name in PACKAGES)]
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    succeed([*pip, "--no-build-isolation", "--wheel-dir", out, *sources])


def write(out: Path, dist: str, files: dict[str, str], manifest: str) -> Path:
    """A wheel of `files` (path -> text), whose entry point in the group `cmkit` is `manifest`."""
    name = dist.replace("-", "_")
    info = f"{name}-1.0.dist-info"
    files = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[cmkit]\n{dist} = {manifest}\n",
    }
    record = "".join(f"{path},,\n" for path in (*files, f"{info}/RECORD"))
    path = out / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for inner, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(inner, text)
    return path


class Environment:
    """A virtual environment, made unless it is there, with the other packages of the running one,
    and of cmkit only what is installed in it.

    A line of a .pth file adds a folder without reading the .pth files in it, by which an editable
    cmkit would come in.
    """

    def __init__(self, folder: Path):
        made = (folder / "bin").exists()
        self.folder = folder
        self.bin = folder / "bin"
        self.site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
        if not made:
            venv.create(folder, symlinks=True)
            others = [p for p in sys.path if Path(p).name in {"site-packages", "dist-packages"}]
            (self.site / "others.pth").write_text("\n".join(others))

    def install(self, *wheels: Path) -> None:
        """What `pip install` does, with the pip that runs here."""
        pip = [sys.executable, "-m", "pip", "--python", self.bin / "python"]
        succeed([*pip, "install", "--quiet", "--no-deps", "--no-index", *wheels])

    def lend(self, command: str) -> None:
        """A command of another package, as if that had been installed here."""
        script = self.bin / command
        run = f'runpy.run_module("{command}", run_name="__main__", alter_sys=True)'
        script.write_text(f"#!{self.bin / 'python'}\nimport runpy\n{run}\n")
        script.chmod(0o755)

    def variables(self) -> dict[str, str]:
        """What a shell has after `activate`; no path leads to the checkout."""
        ours = "PYTHONPATH", "PYTEST_"
        kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        path = f"{self.bin}{os.pathsep}{kept['PATH']}"
        return {**kept, "PATH": path, "VIRTUAL_ENV": str(self.folder), "COLUMNS": "100"}

    def run(self, *command: str | Path, cwd: Path, timeout: float = 300) -> Done:
        """One of the environment's own commands, `cmkit` or `python`, carried out."""
        done = subprocess.run(
            [self.bin / command[0], *command[1:]],
            env=self.variables(),
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def several(self, *commands: str, cwd: Path) -> list[Done]:
        """Commands of cmkit, without that word, one after another where torch is imported once."""
        words = json.dumps([shlex.split(command) for command in commands])
        done = self.run("python", "-c", SEVERAL, words, cwd=cwd)
        assert done.code == 0, done.err
        return [Done(*json.loads(line)) for line in done.out.splitlines()]


def succeed(command: list) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
