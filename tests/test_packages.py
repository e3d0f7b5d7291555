"""The packages beside cmkit pass their own tests, as pip installs them."""

import pytest

from tests.wheels import PACKAGES, ROOT


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_passes_its_own_tests(package, installed):
    options = ["-q", "-W", "error", "-p", "no:cacheprovider"]
    done = installed.run("python", "-m", "pytest", *options, cwd=ROOT / "plugins" / package)
    assert done.code == 0, done.out + done.err
