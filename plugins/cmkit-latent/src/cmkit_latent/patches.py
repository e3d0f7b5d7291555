"""Small patches of pixels in a basis of few components."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from cmkit import CheckpointError, Codec, DataSpec, RecipeError
from cmkit.files import cached_sha256, reading, require_regular

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cmkit import Coder

NAMES = ("mean", "components", "std")


class Patches(Codec):
    """Coordinates of patches of pixels in an orthonormal basis: principal components, or cosines.

    It is exact where it keeps all components, and in closed form: for tests and small pictures.
    Without `weights` the basis is that of cosines over colours, rows and columns, which are nearly
    the principal components of photographs, and each is divided by the standard deviation that it
    has in smooth pictures: that of latents is then of the order of 1, and 1 with fitted `weights`.
    """

    patch: int = Field(4, ge=1, le=64)
    """Width and height of a patch, in pixels."""
    channels: int = Field(3, ge=1, le=64)
    """Channels of the images: 3, or 1 for grey ones."""
    components: int = Field(8, ge=1, le=4096)
    """Channels of the latents, the strongest first; at most channels * patch * patch, which lose
    nothing."""
    weights: str | None = Field(None, min_length=1, max_length=1000)
    """File of principal components that `cmkit_latent.patches.save` has written."""

    def spec(self, data: DataSpec) -> DataSpec:
        if data.channels != self.channels:
            raise RecipeError(
                f"codec.channels = {self.channels}: the data set's images have {data.channels}; set"
                f" codec.channels = {data.channels}"
            )
        if data.resolution % self.patch:
            near = max(1, round(data.resolution / self.patch)) * self.patch
            raise RecipeError(
                f"codec.patch = {self.patch}: the data set's resolution {data.resolution} is not"
                f" divisible by it; set dataset.resolution = {near}, or another patch"
            )
        most = self._most()
        if self.components > most:
            raise RecipeError(
                f"codec.components = {self.components}: of {self.weights or 'such patches'} there"
                f" are {most}; set codec.components = {most}"
            )
        return replace(data, channels=self.components, resolution=data.resolution // self.patch)

    def _most(self) -> int:
        """How many components there are."""
        if not self.weights:
            return self.channels * self.patch**2
        count, channels, patch = _shape(self.weights)
        if (channels, patch) != (self.channels, self.patch):
            raise RecipeError(
                f"codec.weights = {self.weights}: of patches of {patch} pixels and {channels}"
                f" channels; set codec.patch = {patch}, codec.channels = {channels}, or fit another"
            )
        return count

    def identity(self) -> Mapping[str, Any]:
        if not self.weights:
            return {}
        return {"weights": cached_sha256(Path(self.weights).expanduser())}

    def load(self, device: torch.device) -> Coder:
        from cmkit_latent.coders import PatchCoder, cosines

        if not self.weights:
            found = cosines(self.channels, self.patch, self.components)
        else:
            self._most()
            from safetensors.torch import load_file

            path = Path(self.weights).expanduser()
            with reading(path):
                found = load_file(path)
        count = {"components": self.components, "std": self.components, "mean": None}
        return PatchCoder(**{name: found[name][: count[name]].to(device) for name in NAMES})


def _shape(weights: str) -> tuple[int, int, int]:
    """Components, channels and pixels of a file's patches; reads its header alone."""
    from safetensors import safe_open

    path = Path(weights).expanduser()
    with reading(path):
        require_regular(path)
        with safe_open(path, framework="numpy") as file:
            names = set(file.keys())
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names & {*NAMES}}
    if names != {*NAMES} or len(shape := shapes["components"]) != 4:
        raise CheckpointError(
            f"{path}: holds {', '.join(sorted(names)[:4])}; name a file of {', '.join(NAMES)}"
            " that cmkit_latent.patches.save has written"
        )
    count, channels, patch, width = shape
    wanted = {"components": shape, "mean": shape[1:], "std": (count,)}
    if shapes != wanted or width != patch:
        raise CheckpointError(f"{path}: its shapes {shapes} do not agree; fit and save it again")
    return count, channels, patch


def fit(images: Tensor, patch: int = 4, components: int = 8) -> dict[str, Tensor]:
    """Mean (C, p, p), components (k, C, p, p) and std (k,) of the patches of images (N, C, H, W) in
    [-1, 1]: their principal components, the strongest first, float32."""
    from cmkit_latent.coders import principal

    return principal(images, patch, components)


def save(fitted: Mapping[str, Tensor], path: Path) -> None:
    """Write what `fit` returned as the file for `codec.weights`."""
    from safetensors.torch import save

    from cmkit.files import atomic_write

    atomic_write(path, save(dict(fitted)))
