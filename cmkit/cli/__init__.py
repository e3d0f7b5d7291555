"""The command line: parse, call, print. Imports torch only inside the commands that compute."""

from cmkit.cli.commands import app
from cmkit.cli.entry import main
