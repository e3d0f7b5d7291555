"""What this package offers, by name. Imports no torch."""

from __future__ import annotations

import cmkit

CITE = "Geng, Pokle, Luo, Lin, Kolter. Consistency Models Made Easy. ICLR 2025. arXiv:2406.14548"


@cmkit.hookimpl
def cmkit_register() -> list[cmkit.Plugin]:
    return [
        cmkit.Plugin(
            "objective",
            "ect",
            "cmkit_ect.objective:ECT",
            "Easy consistency tuning: from a diffusion model, the two noise levels close up",
            cite=CITE,
        ),
        cmkit.Plugin(
            "sampler",
            "ect",
            "cmkit_ect.sampler:ECTSampler",
            "One step, then one a noise level, each with the full noise sigma z",
            cite=CITE,
        ),
    ]
