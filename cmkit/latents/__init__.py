"""Pictures as latents and prompts as features, for training: encoded on the fly, or once and kept
in the user's cache."""

from cmkit.latents.encode import Kept, kept_of, work
from cmkit.latents.store import Store
from cmkit.latents.stream import batches
