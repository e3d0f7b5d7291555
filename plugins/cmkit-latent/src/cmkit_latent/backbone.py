"""The U-Nets of Stable Diffusion (Rombach et al., 2022; Podell et al., 2023), by diffusers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from cmkit import Backbone, CheckpointError, DataSpec, Layout, Precond, RecipeError
from cmkit.errors import inline

if TYPE_CHECKING:
    from torch import Tensor

    from cmkit import Network

CLASS = "UNet2DConditionModel"
PREFIX = "unet."
"""What our names have before those of diffusers."""

_SD2 = {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
_SDXL = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_SSD1B = {
    **_SDXL,
    "transformer_layers_per_block": [1, [2, 2], [4, 4]],
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
    "mid_block_type": "UNetMidBlock2D",
}
_TINY = {
    "block_out_channels": [16, 32],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
}
PRESETS: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768},
    "sd21": _SD2,
    "sdxl": _SDXL,
    "ssd1b": _SSD1B,
    "tiny": _TINY,
}
"""Arguments of diffusers' class where they are not its defaults. Counted: 859,520,964 parameters of
sd15, 865,910,724 of sd21, 2,567,463,684 of sdxl. ssd1b is reconstructed from its published 1.3
billion."""
_REFUSED = {
    "class_embed_type": "classes",
    "num_class_embeds": "classes",
    "encoder_hid_dim_type": "pictures or projected text",
}
"""Arguments of networks that read what we do not tell them, and what that is."""
_TINY_WAVES = 8


class SDUNet(Backbone):
    """The U-Nets of Stable Diffusion 1.5, 2.1, XL and SSD-1B, in latent space, by diffusers.

    Embeds prompts; of XL also pooled prompts and sizes; and the guidance weight of LCM, which
    starts as the identity, so that it can be added to trained weights. The network is told steps
    as they are, by precond `discrete`. Give a `preset`, or the `folder` of another such network.
    """

    accepts: ClassVar[frozenset[str]] = frozenset({"text", "pooled", "size", "guidance"})

    preset: Literal["sd15", "sd21", "sdxl", "ssd1b", "tiny"] | None = None
    """A published network; "tiny", for tests, has the widths of whatever data it is given."""
    folder: str | None = Field(None, min_length=1)
    """A folder of diffusers whose config.json describes the network, or the pipeline's folder
    around it, or "hub:OWNER/NAME", in place of a preset. Weights are named apart."""
    time_cond_proj_dim: int | None = Field(None, ge=4, le=65_536)
    """Sinusoids of the guidance weight, where it is embedded; by default as the folder says, or
    256."""
    gradient_checkpointing: bool = False
    """Recompute blocks in the backward pass: less memory, a third more time."""

    @model_validator(mode="after")
    def _preset_or_folder(self) -> SDUNet:
        if (self.preset is None) == (self.folder is None):
            raise ValueError(
                f"give either preset, one of {', '.join(PRESETS)}, or folder, and not both"
            )
        return self

    def identity(self) -> Mapping[str, Any]:
        return {} if self.folder is None else {"config": self._read()}

    def smallest(self, data: DataSpec) -> Mapping[str, Any]:
        return {"preset": "tiny", "folder": None}

    def located(self, weights: str) -> Path | None:
        """The folder of "hub:OWNER/NAME", or a folder of diffusers."""
        if weights.startswith("hub:"):
            return _folder(weights, "weights")
        folder = Path(weights)
        described = (folder / "config.json", folder / "unet" / "config.json")
        if any(path.is_file() for path in described):
            return folder
        if (folder / "model_index.json").is_file():
            raise CheckpointError(
                f"{weights}: no subfolder unet; name a whole pipeline, as diffusers saves it"
            )
        return None

    def check_published(self, weights: str, precond: Precond) -> None:
        """RecipeError where the pipeline of `weights` says another prediction, or other steps, than
        `precond`."""
        from cmkit_latent.pipelines import schedule_of

        folder = _folder(weights, "weights")
        folder = folder.parent if (folder / "config.json").is_file() else folder
        scheduler = folder / "scheduler" / "scheduler_config.json"
        if not scheduler.is_file():
            return
        said = schedule_of(scheduler, _json(scheduler))
        if any(getattr(precond, key, None) != value for key, value in said.items()):
            told = ", ".join(f"{key} = {inline(value)}" for key, value in said.items())
            raise RecipeError(
                f"{weights}: its network was trained for {told}; beside it set"
                f" precond = {inline({'use': 'discrete', **said})}"
            )

    def build(self, data: DataSpec, conditions: frozenset[str]) -> Network:
        """A fresh network; RecipeError where it does not fit the latents or the prompts."""
        config = self.config(data, conditions)
        from cmkit_latent.network import UNet

        try:
            return UNet(config, conditions, self.gradient_checkpointing)
        except (TypeError, ValueError, NotImplementedError) as error:
            if self.folder is None:
                raise
            raise CheckpointError(
                f"{self.folder}: diffusers {version('diffusers')} builds no network of its"
                f" config.json ({' '.join(str(error).split())[:200]}); upgrade diffusers, or choose"
                " another folder"
            ) from error

    def layouts(self, data: DataSpec) -> tuple[Layout, ...]:
        """The layout of diffusers, whose names ours are behind a prefix."""

        def config(state: Mapping[str, Tensor]) -> dict[str, Any]:
            projected = state.get(f"{PREFIX}time_embedding.cond_proj.weight")
            waves = None if projected is None else projected.shape[1]
            kind = {"_class_name": CLASS, "_diffusers_version": version("diffusers")}
            size = {"sample_size": data.resolution, "time_cond_proj_dim": waves}
            return {**kind, **self._arguments(data), **size}

        return (Layout("diffusers", _matches, _read_names, _write_names, config),)

    def pipeline(
        self, components: Mapping[str, Any], scheduler: str, conditions: frozenset[str]
    ) -> Mapping[str, Any]:
        from cmkit_latent.pipelines import index_of

        return index_of(components, scheduler, conditions)

    @classmethod
    def recipe_of(cls, pipeline: str) -> Mapping[str, Any] | None:
        from cmkit_latent.pipelines import recipe_of

        return recipe_of(pipeline)

    def config(self, data: DataSpec, conditions: frozenset[str]) -> dict[str, Any]:
        """Arguments of diffusers' class; RecipeError where its network does not fit."""
        config = self._arguments(data)
        place = f'backbone.preset = "{self.preset}"'
        if self.folder is not None:
            place = f'backbone.folder = "{self.folder}"'
        _check_conditions(config, data, conditions, place)
        _check_data(config, data, place)
        given = config.get("time_cond_proj_dim")
        if "guidance" in conditions:
            return {**config, "time_cond_proj_dim": self.time_cond_proj_dim or given or 256}
        if given is not None:
            raise RecipeError(
                f"{place}: its network embeds a guidance weight; set denoiser.embeds_guidance ="
                ' true, or of a teacher conditions = ["text", "guidance"]'
            )
        return config

    def _arguments(self, data: DataSpec) -> dict[str, Any]:
        if self.preset == "tiny":
            return {**_TINY, **_fitted(data)}
        return self._read() if self.preset is None else dict(PRESETS[self.preset])

    def _read(self) -> dict[str, Any]:
        """Arguments of diffusers' class, of the folder's config.json."""
        assert self.folder is not None
        folder = _folder(self.folder, "backbone.folder", config_only=True)
        found = [place for place in (folder, folder / "unet") if (place / "config.json").is_file()]
        if not found:
            raise CheckpointError(
                f"{folder}: no config.json in it, nor in its unet/; give the folder of a pipeline"
                " of diffusers, or of its U-Net"
            )
        content = _json(found[0] / "config.json")
        if (name := content.get("_class_name", CLASS)) != CLASS:
            raise CheckpointError(
                f"{found[0] / 'config.json'}: describes a {name}, not a {CLASS}; choose another"
                " folder"
            )
        return {key: value for key, value in content.items() if not key.startswith("_")}


def _folder(name: str, key: str, config_only: bool = False) -> Path:
    """The local folder of a path or of "hub:OWNER/NAME", which the recipe's `key` names."""
    if not name.startswith("hub:"):
        return Path(name)
    from cmkit_latent.hub import folder_of

    return folder_of(name, key, ("unet", "scheduler"), config_only)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}; fetch it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds no JSON object; fetch it again")
    return content


def _fitted(data: DataSpec) -> dict[str, Any]:
    """Widths of a network for `data`."""
    widths = {"sample_size": data.resolution, "in_channels": data.channels}
    widths["out_channels"] = data.channels
    text = data.text
    if text is None:
        return widths
    widths["cross_attention_dim"] = text.width
    if text.pooled is None or not text.size:
        return widths
    return {
        **widths,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": _TINY_WAVES,
        "projection_class_embeddings_input_dim": text.pooled + 6 * _TINY_WAVES,
    }


def _check_conditions(
    config: Mapping[str, Any], data: DataSpec, conditions: frozenset[str], place: str
) -> None:
    """RecipeError unless the network reads these conditions, all it needs among them."""
    for name, read in _REFUSED.items():
        if config.get(name) is not None:
            raise RecipeError(
                f"{place}: its {name} = {config[name]!r} asks for {read}, which it is not told"
                " here; choose another network"
            )
    reads = {"text"}
    if (added := config.get("addition_embed_type")) == "text_time":
        reads |= {"pooled", "size"}
    elif added is not None:
        raise RecipeError(
            f'{place}: its addition_embed_type = "{added}" asks for what it is not told here;'
            " choose another network"
        )
    told = conditions - {"guidance"}
    if "text" not in told or data.text is None:
        raise RecipeError(f"{place}: it reads prompts; add a [text] table")
    if lacking := reads - told:
        raise RecipeError(
            f"{place}: it reads {' and '.join(sorted(lacking))} beside the prompt's tokens, which"
            " [text] does not tell; give that of SDXL, with its two encoders"
        )
    if more := told - reads:
        raise RecipeError(
            f"{place}: cannot embed {', '.join(sorted(more))}; it reads"
            f" {', '.join(sorted(reads))}; choose another network, or another [text]"
        )


def _check_data(config: Mapping[str, Any], data: DataSpec, place: str) -> None:
    """RecipeError unless the network has the widths of `data`."""
    assert data.text is not None
    for name in ("in_channels", "out_channels"):
        if (channels := config.get(name, 4)) != data.channels:
            raise RecipeError(
                f"{place}: its {name} are {channels}, the latents have {data.channels} channels;"
                " choose the codec that it was trained with"
            )
    levels = len(config.get("block_out_channels", (320, 640, 1280, 1280)))
    if data.resolution % 2 ** (levels - 1):
        raise RecipeError(
            f"{place}: its {levels} levels need latents divisible by {2 ** (levels - 1)}, not of"
            f" {data.resolution} x {data.resolution}; give another dataset.resolution"
        )
    width = config.get("cross_attention_dim", 1280)
    if width != data.text.width:
        raise RecipeError(
            f"{place}: reads {width} numbers a token, [text] gives {data.text.width}; choose the"
            " prompt encoder that it was trained with"
        )
    if config.get("addition_embed_type") != "text_time":
        return
    waves = 6 * (config.get("addition_time_embed_dim") or 256)
    pooled = (config.get("projection_class_embeddings_input_dim") or 0) - waves
    if pooled != data.text.pooled:
        raise RecipeError(
            f"{place}: reads {pooled} pooled numbers of a prompt, [text] gives {data.text.pooled};"
            " choose the prompt encoders that it was trained with"
        )


def _matches(state: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of diffusers."""
    return {"conv_in.weight", "time_embedding.linear_1.weight"} <= state.keys()


def _read_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{PREFIX}{name}": tensor for name, tensor in state.items()}


def _write_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}
