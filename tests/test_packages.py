"""The packages beside cmkit pass their own tests, as pip installs them."""

from tests.wheels import PACKAGES, ROOT

CODE = """
import sys, pytest
code = pytest.main(sys.argv[1:])
modules = "cmkit", "cmkit_std", "cmkit_ect", "cmkit_scm", "cmkit_meanflow", "cmkit_latent"
print(*(sys.modules[name].__file__ for name in modules))
sys.exit(code)
"""


def test_the_packages_pass_their_own_tests(installed, tmp_path):
    """With no settings file, whose `pythonpath` would put the sources before what is installed."""
    (tmp_path / "none.ini").touch()
    (tmp_path / "tests").symlink_to(ROOT / "tests")  # the helpers, and no other folder of ours
    options = ["-q", "-W", "error", "-p", "no:cacheprovider", "-c", tmp_path / "none.ini"]
    folders = [ROOT / "plugins" / package / "tests" for package in PACKAGES]
    done = installed.run("python", "-c", CODE, *options, *folders, cwd=tmp_path)
    assert done.code == 0, done.out + done.err
    used = done.out.splitlines()[-1].split()
    assert all(file.startswith(f"{installed.site}/") for file in used), used
