"""The weights that a recipe names: a path, or a published file that is downloaded once.

Whatever the file (safetensors, pickle, diffusers folder, run folder) and whoever named its
tensors, `adapt(read(find(..)))` are those of our network."""

from cmkit.weights.fetch import Downloaded, download
from cmkit.weights.files import (
    DIFFUSERS,
    TO_COME,
    Weights,
    adapt,
    adapter_file,
    find,
    identity,
    notes,
    read,
    shapes,
    start_checkpoint,
)
