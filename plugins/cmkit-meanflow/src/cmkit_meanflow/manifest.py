"""What this package offers. Imports no torch."""

import cmkit

MEANFLOW = (
    "Geng, Deng, Bai, Kolter, He. Mean Flows for One-step Generative Modeling. 2025. "
    "arXiv:2505.13447"
)


@cmkit.hookimpl
def cmkit_register() -> list[cmkit.Plugin]:
    return [
        cmkit.Plugin(
            "objective",
            "meanflow",
            "cmkit_meanflow.objective:MeanFlow",
            "Average velocities between two noise levels, learned from their identity",
            cite=MEANFLOW,
        ),
        cmkit.Plugin(
            "sampler",
            "meanflow",
            "cmkit_meanflow.sampler:MeanFlowSampler",
            "One or a few jumps along average velocities",
            cite=MEANFLOW,
        ),
    ]
