"""docs/plugins.md, carried out from top to bottom as its reader would, in a clean environment."""

import doctest
import re
import subprocess

import pytest

from tests.wheels import ROOT, Environment

PAGE = (ROOT / "docs" / "plugins.md").read_text("utf-8")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.S | re.M)
SHELL = {
    "LC_ALL": "C",
    "PIP_NO_INDEX": "1",
    "PIP_NO_BUILD_ISOLATION": "0",  # "no", to the option that this variable sets
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
}


@pytest.fixture
def reader(built, tmp_path) -> Environment:
    """An environment with cmkit, and with its own `pip` and `pytest`."""
    environment = Environment(tmp_path / "env")
    environment.install(*built)
    environment.lend("pip")
    environment.lend("pytest")
    return environment


def transcript(body: str) -> list[tuple[str, str]]:
    """(command, what the page says it prints) of a console block."""
    parts = re.split(r"^\$ (.*)\n", body, flags=re.M)
    assert not parts[0]
    return list(zip(parts[1::2], parts[2::2], strict=True))


def test_the_page_does_what_it_says(reader, tmp_path):
    """A console block's commands print what it shows, `...` being anything; a block of code goes
    into the file that the paragraph before it begins with, a block of TOML is there already."""
    home = tmp_path / "home"
    home.mkdir()
    shell = {**reader.variables(), **SHELL}
    for block in BLOCK.finditer(PAGE):
        language, body = block.groups()
        if language == "console":
            for command, shown in transcript(body):
                done = subprocess.run(
                    command,
                    shell=True,
                    cwd=home,
                    env=shell,
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                )
                assert done.returncode == 0, (command, done.stdout)
                same = doctest.OutputChecker().check_output(shown, done.stdout, doctest.ELLIPSIS)
                assert same, f"$ {command}\n{done.stdout}"
        else:
            paragraph = PAGE[: block.start()].split("\n\n")[-2]
            file = home / paragraph.split("`")[1]
            assert language in {"python", "toml"}
            assert file.is_file()
            if language == "python":
                file.write_text(body)
            assert body in file.read_text("utf-8")
