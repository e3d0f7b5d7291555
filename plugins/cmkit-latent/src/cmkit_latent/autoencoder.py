"""The autoencoders of latent diffusion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from cmkit import CheckpointError, Codec, DataSpec, RecipeError
from cmkit_latent import hub

if TYPE_CHECKING:
    import torch

    from cmkit import Coder

CLASSES = ("AutoencoderKL", "AutoencoderTiny")
WIDTHS = {"AutoencoderKL": "block_out_channels", "AutoencoderTiny": "encoder_block_out_channels"}
"""The key of a configuration that has an entry for each resolution."""


class Autoencoder(Codec):
    """An autoencoder of latent diffusion (Rombach et al., 2022): AutoencoderKL of diffusers, whose
    latents are drawn from a posterior, or AutoencoderTiny.

    Latents are those of diffusers' pipelines: less the mean, times scaling_factor, as config.json
    has them, so that their standard deviation is about 1.
    """

    weights: str = Field(min_length=1, max_length=1000)
    """A pipeline's folder with a subfolder `vae`, or the folder of an autoencoder alone, as
    diffusers saves them; or hub:OWNER/NAME or hub:OWNER/NAME@REVISION of the Hugging Face Hub."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of its weights and activations. There is no fp16, in which it makes NaN."""
    batch: int = Field(8, ge=1, le=4096)
    """Images encoded or decoded at once."""
    tiling: bool = False
    """Large images in overlapping tiles, which takes less memory and changes them a little."""

    @field_validator("dtype", mode="before")
    @classmethod
    def _never_fp16(cls, value: Any) -> Any:
        if value in ("fp16", "float16", "half"):
            raise ValueError("this autoencoder makes NaN in fp16; use fp32 or bf16")
        return value

    def spec(self, data: DataSpec) -> DataSpec:
        config = hub.config_of(self._folder(config_only=True))
        channels = config.get("in_channels", 3)
        factor = 2 ** (len(config[self._widths(config)]) - 1)
        if data.channels != channels:
            raise RecipeError(
                f"codec.weights = {self.weights}: takes images of {channels} channels, and the data"
                f" set's have {data.channels}; choose a data set with {channels}"
            )
        if data.resolution % factor:
            near = max(1, round(data.resolution / factor)) * factor
            raise RecipeError(
                f"codec.weights = {self.weights}: takes resolutions divisible by {factor}, and the"
                f" data set's is {data.resolution}; set dataset.resolution = {near}"
            )
        latents = config.get("latent_channels", 4)
        return replace(data, channels=latents, resolution=data.resolution // factor)

    def _widths(self, config: Mapping[str, Any]) -> str:
        name = config.get("_class_name")
        if name not in CLASSES or WIDTHS[name] not in config:
            raise CheckpointError(
                f"codec.weights = {self.weights}: _class_name in config.json is {name!r}; name an"
                f" autoencoder of a class that is known: {', '.join(CLASSES)}"
            )
        return WIDTHS[name]

    def smallest(self, data: DataSpec) -> Mapping[str, Any]:
        patch = 4 if data.resolution % 4 == 0 else 1
        count = min(4, data.channels * patch**2)
        return {"use": "patches", "patch": patch, "channels": data.channels, "components": count}

    def identity(self) -> Mapping[str, Any]:
        return {"weights": hub.digest(self._folder())}

    def load(self, device: torch.device) -> Coder:
        import diffusers

        from cmkit_latent.coders import AutoencoderCoder

        folder = self._folder()
        config = hub.config_of(folder)
        self._widths(config)
        vae = hub.loaded(getattr(diffusers, config["_class_name"]), folder, self.dtype, device)
        if self.tiling:
            vae.enable_tiling()
        return AutoencoderCoder(vae, self.batch)

    def exported(self) -> Mapping[str, Any]:
        import torch

        vae = self.load(torch.device("cpu")).vae  # type: ignore[attr-defined]
        if getattr(vae.config, "shift_factor", None):
            raise RecipeError(
                f"codec.weights = {self.weights}: has a shift_factor, which no Stable Diffusion"
                " pipeline of diffusers takes off; choose another autoencoder"
            )
        return {"vae": vae}

    def _folder(self, config_only: bool = False) -> Path:
        folder = hub.folder_of(self.weights, "codec.weights", ("vae",), config_only)
        if (folder / "vae").is_dir() or (folder / "model_index.json").is_file():
            return hub.part_of(folder, "vae", "codec.weights")
        return folder
