"""The command line: parse, call, print. Imports torch only inside the commands that compute."""

from cmkit.cli.app import app
from cmkit.cli.entry import main

__all__ = ["app", "main"]
