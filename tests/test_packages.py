"""The packages beside cmkit pass their own tests, as pip installs them."""

import pytest

from tests.wheels import PACKAGES, ROOT

CODE = """
import importlib, sys, pytest
code = pytest.main(sys.argv[2:])
modules = "cmkit", "cmkit_std", sys.argv[1]
print(*(importlib.import_module(name).__file__ for name in modules))
sys.exit(code)
"""
MARKERS = """\
[pytest]
markers =
  compile: calls torch.compile
  slow: takes seconds of arithmetic
"""


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_passes_its_own_tests(installed, tmp_path, package):
    """With no settings file of its own, whose `pythonpath` would put the sources before what is
    installed."""
    (tmp_path / "pytest.ini").write_text(MARKERS)
    (tmp_path / "tests").symlink_to(ROOT / "tests")  # the helpers, and no other folder of ours
    options = ["-q", "-W", "error", "-p", "no:cacheprovider", "-c", tmp_path / "pytest.ini"]
    folder, module = ROOT / "plugins" / package / "tests", package.replace("-", "_")
    words = [module, *options, folder]
    done = installed.run("python", "-c", CODE, *words, cwd=tmp_path, timeout=900)
    assert done.code == 0, done.out + done.err
    used = done.out.splitlines()[-1].split()
    assert all(file.startswith(f"{installed.site}/") for file in used), used
