"""The kinds of part around a network: its layers, what it learns, how it is drawn from."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from cmkit.errors import RecipeError
from cmkit.kinds.part import Part
from cmkit.values import Companion, DataSpec, Layout, Phase, Scheduler

if TYPE_CHECKING:
    from torch import Tensor

    from cmkit.denoiser import Cond, Denoiser, Network, Scales, Scalings
    from cmkit.models import Models
    from cmkit.noise import Noise
    from cmkit.rng import Rng


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

    def guided_by(self) -> tuple[float, float] | None:
        """Lowest and highest guidance weight w that a network which embeds it learns; None = it
        learns of none in particular."""
        return None

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
