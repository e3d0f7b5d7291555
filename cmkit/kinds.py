"""The kinds of part: what a plugin subclasses. A part's fields are its table in a recipe.

A module that a manifest names should import torch inside its functions (or in a sibling module):
`cmkit schema`, `cmkit plugins show` and the checks of a recipe then stay instant.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from pydantic import BaseModel, ConfigDict

from cmkit.errors import RecipeError
from cmkit.values import Companion, DataSpec, Layout, Phase, Reference, Scheduler, TextSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.utils.data import Dataset as Images

    from cmkit.denoiser import Cond, Denoiser, Network, Scales, Scalings
    from cmkit.models import Models
    from cmkit.noise import Noise
    from cmkit.rng import Rng


class Part(BaseModel):
    """A frozen record of options: the fields of a subclass are the keys of its recipe table."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    read_by: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """The stages of a run whose result a field decides, where these are not all that read the
    table: {"log_every": ()} for one that changes no bit of any."""

    def identity(self) -> Mapping[str, Any]:
        """What the part reads from the disk, as JSON that changes whenever a result could.

        Keys are words for people, such as "pictures"; of a list, what is new and what is gone is
        named. A finished stage is only used again, and an unfinished one gone on with, while it
        stays the same. DataError or CheckpointError where a file cannot be read.
        """
        return {}

    def smallest(self, data: DataSpec) -> Mapping[str, Any]:
        """Changes of these options for `cmkit run --smoke` on images like `data`: tiny widths, few
        steps, nothing that needs a file. None drops a key; "use" puts another part, of which the
        rest are the options, in the place of this one. By default there are none."""
        return {}


class Backbone(Part, ABC):
    """Builds a network F(x, c_noise).

    `accepts` names the fields of `Cond` that it can embed. `published` maps names of public
    weights ("publisher:name") to their addresses, for `denoiser.weights`.
    """

    accepts: ClassVar[frozenset[str]] = frozenset()
    published: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def known(cls) -> Iterator[tuple[Backbone, DataSpec, frozenset[str]]]:
        """Published networks: options, data, conditions. `cmkit convert` recognizes them."""
        return iter(())

    def located(self, weights: str) -> Path | None:
        """The local file or folder of `weights` that other projects keep or publish in their own
        ways, such as "hub:OWNER/NAME"; None where this backbone knows nothing of the name."""
        return None

    def check_published(self, weights: str, precond: Precond) -> None:
        """Raise now if `weights`, published or `located`, belong to other options, or to another
        precond."""

    @abstractmethod
    def build(self, data: DataSpec, conditions: frozenset[str]) -> Network:
        """A fresh network for images of `data`, with an embedding for each of `conditions`."""

    def layouts(self, data: DataSpec) -> tuple[Layout, ...]:
        """Layouts of other projects for weights of this network for `data`.

        At most one of them matches any weights, and none the network's own names. `read`, `write`
        and `config` raise CheckpointError where a project cannot express these options.
        """
        return ()

    def pipeline(
        self, components: Mapping[str, Any], scheduler: str, conditions: frozenset[str]
    ) -> Mapping[str, Any]:
        """What the model_index.json of diffusers says of the pipeline that draws with this network,
        which embeds `conditions`, with `components` and a scheduler of the class `scheduler`:
        `_class_name` and options. RecipeError where there is none.

        The network itself is written in the layout "diffusers".
        """
        raise RecipeError(
            "no pipeline of diffusers draws with this network; draw with `cmkit sample`"
        )

    @classmethod
    def recipe_of(cls, pipeline: str) -> Mapping[str, Any] | None:
        """The tables of the recipe that draws from the `pipeline`, a folder of diffusers or
        "hub:OWNER/NAME", as it does by default; None where it is of another kind of network.
        CheckpointError where the folder is not whole, RecipeError for what is not known here."""
        return None


class Precond(Part, ABC):
    """Preconditioning of a network: D(x, sigma) = c_skip x + c_out F(c_in x, c_noise).

    `levels` are the default sigma_min and sigma_max. `known` are the lowest and the highest noise
    level that such networks were trained on: a recipe cannot leave them.
    """

    @property
    def levels(self) -> tuple[float, float]:
        return 0.002, 80.0

    @property
    def known(self) -> tuple[float, float]:
        return 0.0, math.inf

    def noise(self, sigma_min: float, sigma_max: float, rho: float) -> Noise | None:
        """The noise levels of a network with a fixed set of them; None = the Karras grid of `rho`.

        RecipeError where it has none between `sigma_min` and `sigma_max`.
        """
        return None

    @abstractmethod
    def scalings(self, sigma: Tensor, sigma_data: float, sigma_min: float) -> Scalings:
        """(c_skip, c_out, c_in, c_noise) at noise levels sigma (B,); each (B,), of sigma's type."""


class Objective(Part, ABC):
    """A training loss.

    `needs` may hold "target" (an EMA copy of the online network), "teacher" (frozen weights), names
    of `Cond` fields that the backbone must accept, and what must hold of the online network's
    scalings: any of `cmkit.traits.TRAITS`.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def needed(self) -> frozenset[str]:
        """Those of `needs` that these very options need."""
        return self.needs

    def check(self, data: DataSpec) -> None:
        """Raise now what would stop `loss` later, such as missing weights of a distance."""

    def check_batch(self, size: int) -> None:
        """Raise now if `loss` cannot work on `size` images at a time."""

    def check_networks(self, online: Network, teacher: Network | None) -> None:
        """Raise now what would stop `loss` later on these networks, maybe on the meta device."""

    def companions(self, data: DataSpec) -> Mapping[str, Companion]:
        """Networks that `loss` trains beside the denoiser; it finds them in `models.companions`.

        Fresh weights, drawn by torch's global generator, which the recipe's seed has set; maybe on
        the meta device. A companion without gradients after a step stays as it is.
        """
        return {}

    @abstractmethod
    def phase(self, step: int, total: int) -> Phase:
        """Schedules at `step` of `total`, in pure Python."""

    @abstractmethod
    def loss(self, models: Models, x0: Tensor, cond: Cond, phase: Phase, rng: Rng) -> Tensor:
        """Unreduced loss, (B,), of clean images x0 (B, C, H, W) in [-1, 1]."""


class Sampler(Part, ABC):
    """Turns noise into images by calling a denoiser `nfe` times.

    `needs` may hold what must hold of the denoiser's scalings: any of `cmkit.traits.TRAITS`.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    @property
    @abstractmethod
    def nfe(self) -> int:
        """Denoiser evaluations a sample."""

    @abstractmethod
    def sample(
        self, denoiser: Denoiser, x: Tensor, cond: Cond, noise: Callable[[int], Tensor]
    ) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] from x = noise.start * z; noise(k), k >= 1, is the k-th
        standard normal draw (B, C, H, W) of these very images."""

    def scheduler(self, precond: Precond, noise: Noise, sigma_data: float) -> Scheduler:
        """The scheduler of diffusers that draws the same images from a model with this precond and
        noise axis; RecipeError where there is none."""
        raise RecipeError(
            'no scheduler of diffusers draws so; set sampler.use = "multistep" of a consistency'
            ' model of pixels, "lcm" of a latent one, or "ddim" of a diffusion model'
        )


class Rescaler(Part, ABC):
    """A policy of post-training scales for a network's sites."""

    @abstractmethod
    def bind(self, sites: tuple[str, ...]) -> Callable[[Tensor], Scales]:
        """The map sigma (B,) -> scales; RecipeError when a site that it names is not in `sites`."""

    def check_noise(self, noise: Noise) -> None:
        """Raise now what does not fit a model with these noise levels."""

    def settled(self) -> Rescaler:
        """The policy whose fields are the numbers: itself, or the one that it has read."""
        return self

    def found_on(self) -> Mapping[str, str]:
        """Of a policy that serves one model alone, which: "weights", their digest as
        `rescaling.json` has it, and "training", the key of a run's training. Nothing where it
        serves any."""
        return {}

    labels: ClassVar[Mapping[str, str]] = {}
    """Names of numbers on the report's page, where the key alone says too little."""

    def numbers(self) -> dict[str, float]:
        """The numbers that a search can change, by name: by default every numeric field."""
        fields = {field: getattr(self, field) for field in type(self).model_fields}
        return {field: float(v) for field, v in fields.items() if isinstance(v, int | float)}

    def value_of(self, name: str) -> float:
        """The number `name`, which may be one of a list such as "skip.3"; ValueError where there is
        none."""
        numbers = self.numbers()
        if name not in numbers:
            raise ValueError(f"the rescaler has no such number; known: {', '.join(numbers)}")
        return numbers[name]

    def complete(self, values: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
        """Those of `names` that `values` set, with their values: the names themselves, and
        entries of a list that is set whole."""
        return {name: values[name] for name in names if name in values}

    def with_values(self, values: Mapping[str, Any]) -> Self:
        """The same policy with other numbers, by the names of `value_of`; ValueError for a value
        out of bounds."""
        return type(self).model_validate({**self.model_dump(), **values})


class Coder(Protocol):
    """A codec with its weights on a device."""

    def encode(self, x0: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean (B, c, h, w) of the latents of images (B, C, H, W) in [-1, 1], and their standard
        deviation, of the same shape, where they are drawn; both float32."""

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, C, H, W), about [-1, 1], float32, of latents (B, c, h, w)."""


class Codec(Part, ABC):
    """Pictures as latents, in which networks are trained and drawn from.

    Latents are scaled so that their standard deviation is about 1, unless published networks want
    them otherwise.
    """

    @abstractmethod
    def spec(self, data: DataSpec) -> DataSpec:
        """Shape of the latents of images like `data`, whose classes and text they keep; reads no
        weights. RecipeError for images that it cannot take, CheckpointError for missing files."""

    @abstractmethod
    def load(self, device: torch.device) -> Coder:
        """The codec on `device`, whose parameters require no gradient."""

    def exported(self) -> Mapping[str, Any]:
        """What a pipeline of diffusers has in the place of this codec, by name: models, such as
        "vae", on the CPU, and options; RecipeError where there is none."""
        raise RecipeError("no pipeline of diffusers has such a codec; draw with `cmkit sample`")


class Prompts(Protocol):
    """A prompt encoder with its weights on a device."""

    null: Cond
    """The unconditional prompt: `text`, and `pooled` if any, of one row."""

    def __call__(self, prompts: Sequence[str]) -> Cond:
        """`text` (B, L, D), and `pooled` (B, P) if any, of these prompts; float32."""


class TextEncoder(Part, ABC):
    """Prompts as features, which networks are conditioned on."""

    @abstractmethod
    def spec(self) -> TextSpec:
        """Shape of the features; reads no weights. CheckpointError for missing files."""

    def cut(self, prompts: Sequence[str]) -> list[int]:
        """How many tokens of each prompt are cut off because it is too long; reads no weights."""
        return [0] * len(prompts)

    @abstractmethod
    def load(self, device: torch.device) -> Prompts:
        """The encoder on `device`, whose parameters require no gradient."""

    def exported(self) -> Mapping[str, Any]:
        """What a pipeline of diffusers has in the place of this encoder, by name: models, such as
        "text_encoder" and "tokenizer", on the CPU, and options; RecipeError where there is none."""
        raise RecipeError(
            "no pipeline of diffusers has such a prompt encoder; draw with `cmkit sample`"
        )


class Pictures(Protocol):
    """The images of training by number."""

    labels: Sequence[int] | None
    """Their classes."""
    captions: Sequence[int] | None
    """The numbers of their captions in `Dataset.captions`."""
    flip: bool
    """Whether half of the images of batches are mirrored."""
    empty: float
    """Probability with which a batch has the unconditional prompt in the place of a caption."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tensor:
        """Image `index`, uint8 (C, H, W)."""

    def fingerprint(self) -> str:
        """What changes whenever an image does."""


class Dataset(Part, ABC):
    """Images and labels."""

    @abstractmethod
    def spec(self) -> DataSpec:
        """Shape and classes, with their names and counts where they are known; DataError when the
        files are missing or corrupt."""

    def declared(self) -> DataSpec | None:
        """What `spec` returns, maybe without names and counts of classes, where the keys alone
        decide it, so that a model is drawn from without the data; None where files must be read."""
        return None

    def smallest(self, data: DataSpec | None = None) -> Mapping[str, Any]:
        """Invented images in place of the files, at most 32 pixels wide: of the shape of `data`,
        where it is absent of what `declared` returns, or else `spec`."""
        data = data or self.declared() or self.spec()
        return {
            "use": "invented",
            "channels": data.channels,
            "resolution": min(data.resolution, 32),
            "classes": data.num_classes,
        }

    @abstractmethod
    def batches(
        self, size: int, seed: int, device: torch.device, start: int = 0
    ) -> Iterator[tuple[Tensor, Cond]]:
        """Endless (x0 in [-1, 1], cond) from batch `start` on, a function of (seed, batch)."""

    def captions(self) -> Sequence[str] | None:
        """What is said of the pictures: distinct texts, to which `Cond.caption` refers; None
        without any."""
        return None

    def pictures(self) -> Pictures | None:
        """The images of `batches` by number, whose latents are encoded once and kept; None where
        they have no numbers."""
        return None

    @abstractmethod
    def reference(self) -> Reference:
        """The real images that metrics compare with."""

    def heldout(self) -> Dataset | None:
        """Images of the same kind that are in no batch, for metrics that compare with those: of a
        training split the test split. None where there are none."""
        return None

    def faults(self) -> Iterator[str]:
        """What is wrong with single images, each by its place, found by reading them all."""
        return iter(())

    def left_out(self) -> Sequence[str]:
        """Images that are not used, each by its place and why not."""
        return ()


class Meter(Protocol):
    """Computes a metric of images while they are drawn, without keeping them."""

    def add(self, images: Tensor) -> None:
        """Take the next images, uint8 (B, C, H, W) on any device."""

    def values(self) -> dict[str, float]:
        """The numbers, once all images are taken."""

    def state(self) -> dict[str, Tensor]:
        """What is computed of the images so far, on the CPU, for `restore` in another process."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state`, before the first `add`: the same numbers, bit for bit. Until the next
        `add`, `state()` returns it again. It may be that of a meter of fewer images, all of which
        were added; ValueError where that is no beginning of more."""


class Metric(Part, ABC):
    """Numbers about images, of which less is better.

    `higher` names those of which more is better, `neither` those that say nothing of quality by
    themselves, such as a spread.
    """

    higher: ClassVar[tuple[str, ...]] = ()
    neither: ClassVar[tuple[str, ...]] = ()

    heldout: bool = False
    """Compare with images that no training saw, such as the data set's test split. The numbers have
    "heldout_" before their names: "heldout_fid"."""

    @property
    def prefix(self) -> str:
        """What a recipe has before the names of `keys`."""
        return "heldout_" if self.heldout else ""

    @abstractmethod
    def keys(self) -> tuple[str, ...]:
        """Names of the numbers that `measure` returns."""

    def only(self, key: str) -> Metric:
        """The cheapest metric that still returns `key`."""
        return self

    def check(self, data: DataSpec, images: int) -> None:
        """Raise now what would stop `measure` later on `images` samples like `data`: missing
        weights, an unfit image size, too few images."""

    def check_reference(self, data: DataSpec, reference: Reference, device: torch.device) -> None:
        """Raise, before the first stage of a run, if `measure` cannot compare with `reference`."""

    @abstractmethod
    def measure(
        self, images: Images[Tensor], reference: Reference, device: torch.device
    ) -> dict[str, float]:
        """`keys()` with their values, for images[i] (C, H, W) uint8."""

    def meter(self, images: int, reference: Reference, device: torch.device) -> Meter | None:
        """A meter for `images` images that are not kept; None where the metric has to see them all
        at once. It gives what `measure` gives, up to rounding."""
        return None

    def features(
        self, images: Images[Tensor], reference: Reference, device: torch.device
    ) -> dict[str, dict[str, Tensor]]:
        """What the distances of features among the numbers are computed of, on the CPU: "rows"
        (N, d) of the images, and of the reference "mu" (d,) and "sigma" (d, d) for a Frechet
        distance, or "real" (M, d) for a kernel distance.

        It tells two single checkpoints apart on the same noise; nothing else can for other numbers.
        """
        return {}

    def provenance(self) -> dict[str, Any]:
        """What must stand beside the numbers so that they can be compared: extractor, weights.

        cmkit adds the number of images and the reference's fingerprint. "features", the width d by
        number, marks the Frechet distances, which are biased where images are few.
        """
        return {}


class Adapter(Part, ABC):
    """A few weights that are trained beside a network's own, which stay as they are, such as LoRA.

    Training attaches it; sampling folds it into the network, which is then one like any other.
    """

    weights: str | dict[str, float] | None = None
    """Trained weights of adapters: a file, a folder with one, or a run; or several, each with the
    number that it counts: { "a.safetensors" = 0.8, "runs/b-1a2b" = 0.5 }."""

    @abstractmethod
    def attach(self, network: Network) -> None:
        """Put the weights that `weights` say, or fresh ones, beside those of `network`, whose
        output fresh ones do not change; afterwards they alone require gradients.

        Fresh weights are drawn by torch's global generator. On a network without memory only names
        and shapes are tried. RecipeError where it has no layer for them, CheckpointError where
        `weights` do not fit.
        """

    @abstractmethod
    def off(self, network: Network) -> AbstractContextManager[None]:
        """Inside, an attached `network` computes, bit for bit, what it did before."""

    @abstractmethod
    def fold(self, network: Network) -> None:
        """Add what is attached to the weights of `network`, whose names are then as before."""

    @abstractmethod
    def write(self, network: Network, path: Path) -> None:
        """Write what is attached to `network`, alone, to the safetensors file `path`, for
        `weights`."""

    @abstractmethod
    def mix(self, path: Path) -> None:
        """Write what `weights` name, mixed, to the safetensors file `path`; RecipeError or
        CheckpointError where they do not go together."""


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
}
