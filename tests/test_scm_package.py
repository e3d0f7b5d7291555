"""plugins/cmkit-scm, a distribution of its own, keeps its laws beside this cmkit."""

import os
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "plugins" / "cmkit-scm"


def test_the_package_passes_its_own_tests():
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider"]
    path = os.pathsep.join([str(PACKAGE / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, cwd=PACKAGE, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
