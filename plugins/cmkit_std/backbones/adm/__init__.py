"""The U-Net of the consistency-model papers (Dhariwal, Nichol: Diffusion Models Beat GANs on Image
Synthesis, 2021; as in openai/consistency_models)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from cmkit import DataSpec, Layout, Precond, RecipeError
from cmkit_std.backbones.adm.options import ADMOptions
from cmkit_std.backbones.published import check_published, published

if TYPE_CHECKING:
    from cmkit import Network

OPENAI_KINDS = (("edm", "_ema"), ("cd", "_l2"), ("cd", "_lpips"), ("ct", ""))
"""Published models of each data set: how they were trained, and how their file's name ends."""
_OPENAI_FILES = (
    *(f"{kind}_imagenet64{end}" for kind, end in OPENAI_KINDS),
    *(f"{kind}_{data}256{end}" for data in ("bedroom", "cat") for kind, end in OPENAI_KINDS),
)
_GUIDED_FILES = (
    "64x64_diffusion",
    "128x128_diffusion",
    "256x256_diffusion",
    "256x256_diffusion_uncond",
    "lsun_bedroom",
    "lsun_cat",
    "lsun_horse",
    "lsun_horse_nodropout",
)


class ADM(ADMOptions):
    """Convolutional U-Net with attention at coarse levels, the network of CD, CT, iCT and CTM.

    Embeds labels, prompts as one vector of their tokens, the guidance weight of LCM, and the target
    noise level of CTM by a second path beside that of sigma. The weight starts without effect, so
    that it can be added to trained weights.
    """

    accepts: ClassVar[frozenset[str]] = ADMOptions.accepts | {"text"}

    network: ClassVar[str] = "cmkit_std.backbones.adm.network:UNet"
    published: ClassVar[dict[str, str]] = {
        **published("openai", _OPENAI_FILES),
        **published("edm", ["imagenet-64x64-cond-adm"]),
        **published("guided-diffusion", _GUIDED_FILES),
    }

    @classmethod
    def known(cls) -> Iterator[tuple[ADM, DataSpec, frozenset[str]]]:
        """The networks of the presets, with the data that they were trained on."""
        yield cls(preset="openai-imagenet64"), DataSpec(3, 64, 1000), frozenset({"label"})
        yield cls(preset="openai-lsun256"), DataSpec(3, 256), frozenset()
        yield cls(preset="guided-diffusion-64"), DataSpec(3, 64, 1000), frozenset({"label"})
        yield cls(preset="guided-diffusion-128"), DataSpec(3, 128, 1000), frozenset({"label"})
        yield cls(preset="guided-diffusion-256"), DataSpec(3, 256, 1000), frozenset({"label"})
        yield cls(preset="guided-diffusion-256"), DataSpec(3, 256), frozenset()

    def check_published(self, weights: str, precond: Precond) -> None:
        publisher, _, file = weights.partition(":")
        options: dict[str, Any] = {"time_scale": 1000 if publisher == "openai" else 1}
        if publisher == "guided-diffusion":
            options["learn_sigma"] = True
            options["new_attention_order"] = file.startswith("64x64")
        check_published(weights, self, precond, **options)

    def pipeline(
        self, components: Mapping[str, Any], scheduler: str, conditions: frozenset[str]
    ) -> Mapping[str, Any]:
        if scheduler != "CMStochasticIterativeScheduler" or components:
            raise RecipeError(
                "of this network diffusers has ConsistencyModelPipeline alone, which draws pixels"
                ' from a consistency model; draw with sampler.use = "multistep", without [codec]'
            )
        return {"_class_name": "ConsistencyModelPipeline"}

    @classmethod
    def recipe_of(cls, pipeline: str) -> Mapping[str, Any] | None:
        from cmkit_std.backbones.adm.pipeline import recipe_of

        return recipe_of(pipeline)

    def build(self, data: DataSpec, conditions: frozenset[str]) -> Network:
        return super().build(self.seen(data), conditions)

    def layouts(self, data: DataSpec) -> tuple[Layout, ...]:
        """Layouts of openai/consistency_models, guided-diffusion, diffusers and EDM."""
        if self.patch_size > 1:
            return ()
        from cmkit_std.backbones.adm import diffusers, edm, openai

        return (
            openai.layout(self),
            openai.guided_diffusion(self),
            diffusers.layout(self, data),
            edm.layout(self, data),
        )
