"""The weights that a recipe names: a path, or a published file that is downloaded once.

Whatever the file (safetensors, pickle, diffusers folder, run folder) and whoever named its
tensors, `adapt(read(find(..)))` are those of our network."""

from cmkit.weights.download import Downloaded, download
from cmkit.weights.find import DIFFUSERS, Weights, adapt, find, read, shapes

__all__ = ["DIFFUSERS", "Downloaded", "Weights", "adapt", "download", "find", "read", "shapes"]
