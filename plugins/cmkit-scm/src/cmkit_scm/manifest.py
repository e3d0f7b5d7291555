"""What this package offers. Imports no torch."""

import cmkit

SCM = (
    "Lu, Song. Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models. 2024. "
    "arXiv:2410.11081"
)


@cmkit.hookimpl
def cmkit_register() -> list[cmkit.Plugin]:
    return [
        cmkit.Plugin(
            "objective",
            "scm",
            "cmkit_scm.scm:SCM",
            "Continuous-time consistency training and distillation",
            cite=SCM,
        )
    ]
