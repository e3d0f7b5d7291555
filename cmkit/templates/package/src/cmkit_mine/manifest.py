"""What this package offers. Imported by every cmkit command: it imports no torch."""

import cmkit

examples = {"KIND.mine": {}}
"""Options, as in a recipe, with which `cmkit plugins check` makes each part."""


@cmkit.hookimpl
def cmkit_register():
    return [
        cmkit.Plugin(
            "KIND",
            "mine",
            "cmkit_mine.mine:Mine",
            "Say in a few words what it is",
            cite=None,  # or "Who. What. Year. arXiv:..."
        )
    ]
