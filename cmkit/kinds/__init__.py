"""The kinds of part: what a plugin subclasses. A part's fields are its table in a recipe.

A module that a manifest names should import torch inside its functions (or in a sibling module):
`cmkit schema`, `cmkit plugins show` and the checks of a recipe then stay instant.
"""

from cmkit.kinds.data import Dataset, Pictures
from cmkit.kinds.latent import Codec, Coder, Prompts, TextEncoder
from cmkit.kinds.metric import Meter, Metric
from cmkit.kinds.network import Adapter, Backbone, Objective, Precond, Rescaler, Sampler
from cmkit.kinds.part import Part
from cmkit.kinds.tracker import Listener, RunInfo, Tracker

CLASSES: dict[str, type[Part]] = {
    "backbone": Backbone,
    "precond": Precond,
    "objective": Objective,
    "sampler": Sampler,
    "rescaler": Rescaler,
    "dataset": Dataset,
    "metric": Metric,
    "codec": Codec,
    "text": TextEncoder,
    "adapter": Adapter,
    "tracker": Tracker,
}

__all__ = [
    "CLASSES",
    "Adapter",
    "Backbone",
    "Codec",
    "Coder",
    "Dataset",
    "Listener",
    "Meter",
    "Metric",
    "Objective",
    "Part",
    "Pictures",
    "Precond",
    "Prompts",
    "Rescaler",
    "RunInfo",
    "Sampler",
    "TextEncoder",
    "Tracker",
]
