"""Records that parts hand to each other: shapes of data, schedule values, layouts of weights.

Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import Dataset as Images


@dataclass(frozen=True)
class TextSpec:
    """Shape of what a prompt encoder tells a network: features of `length` tokens, `width` numbers
    each; `pooled` numbers of the whole prompt, if any; and with `size` the sizes of the picture."""

    length: int
    width: int
    pooled: int | None = None
    size: bool = False

    @property
    def conditions(self) -> frozenset[str]:
        """The fields of `Cond` that hold it."""
        said = {"text": True, "pooled": self.pooled is not None, "size": self.size}
        return frozenset(name for name, given in said.items() if given)


@dataclass(frozen=True)
class DataSpec:
    """Shape of the images, or of the latents that stand for them, and what is known beside them.

    `num_classes` is None when there are no labels. `classes` are the names of the classes and
    `counts` the images of each, both by number, empty where they are not known. Samples have the
    proportions of `counts`, or without them of classes alike. `text` is the shape of the prompts'
    features, None without a prompt encoder.
    """

    channels: int
    resolution: int
    num_classes: int | None = None
    classes: tuple[str, ...] = ()
    counts: tuple[int, ...] = ()
    text: TextSpec | None = None


@dataclass(frozen=True)
class Reference:
    """Real images that metrics compare with.

    `images[i]` is (C, H, W) uint8; `fingerprint` changes whenever a pixel does. `statistics` are
    published Inception features, {"mu": (d,), "sigma": (d, d)} float64, of a larger set than
    `images`, and "mu_s", "sigma_s" those of ADM's spatial features: where they are, Frechet
    distances use them. `captions` are prompts, of which sample k is drawn from the one at k modulo
    their number; in a data set captions[i] is what is said of image i.
    """

    images: Images[Tensor]
    fingerprint: str
    statistics: Mapping[str, Any] | None = None
    captions: Sequence[str] | None = None


@dataclass(frozen=True)
class Phase:
    """Schedule values of one training step; a pure function of (step, total).

    `num_sigmas` is N, the points of the sigma grid; `target_ema` is mu of the target network;
    `log` holds further numbers for the training log. After a step with `renew_teacher` the teacher
    takes the online weights, from which the averages and the optimizer start anew. A step without
    `update` leaves the target and the averages alone: it teaches companions only.
    """

    step: int
    num_sigmas: int | None = None
    target_ema: float = 0.0
    log: Mapping[str, float] = field(default_factory=dict)
    renew_teacher: bool = False
    update: bool = True


@dataclass(frozen=True)
class Companion:
    """A network that an objective trains beside the denoiser: a discriminator, a learned weight.

    `lr` warms up and decays as that of [train]; it and `betas` are those of [train] where absent.
    Parameters that require no gradient, such as those of a pretrained feature network, are not
    kept in checkpoints: `Objective.companions` makes them again.
    """

    network: nn.Module
    lr: float | None = None
    betas: tuple[float, float] | None = None


@dataclass(frozen=True)
class Scheduler:
    """How a scheduler of diffusers draws what a sampler draws."""

    config: Mapping[str, Any]
    """Its `scheduler_config.json`, with `_class_name`."""
    start: float
    """Standard deviation of the x that it starts from, on our axis."""
    call: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of a pipeline's call that choose the same steps."""


@dataclass(frozen=True)
class Layout:
    """How another project names, shapes and orders the weights of a backbone.

    Values may be on the meta device: names and shapes are checked before any weight is read.
    """

    name: str
    """The project, such as "openai"."""
    matches: Callable[[Mapping[str, Tensor]], bool]
    """Whether weights have this layout, judged by names and numbers of axes alone."""
    read: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    """Their weights under the names of our state dict; unknown names stay as they are."""
    write: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    """Our weights as the project stores them; read(write(x)) is x, bit for bit."""
    config: Callable[[Mapping[str, Tensor]], dict[str, Any]] | None = None
    """Content of the `config.json` that the project wants beside our weights, if any."""
