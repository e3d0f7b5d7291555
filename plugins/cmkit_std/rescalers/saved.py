"""The policy that another run's search found."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, ValidationError

from cmkit import CheckpointError, DataSpec, RecipeError, Rescaler, discover
from cmkit.files import digest_of, to_json
from cmkit.rescaling import Policy, read_policy
from cmkit_std.rescalers.families import spans

if TYPE_CHECKING:
    from torch import Tensor

    from cmkit import Noise, Scales


class Saved(Rescaler):
    """The scales of a `rescaling.json`, which every search leaves in its run's folder.

    They belong to the weights that they were found on, in any file or layout; other weights are
    refused unless `any_model` says that they are meant. It has no numbers to search.
    """

    read_by: ClassVar[Mapping[str, tuple[str, ...]]] = {"path": (), "any_model": ()}

    path: str = Field(min_length=1, max_length=4096)
    """The file, or the run with it: its folder, or run:NAME-KEY."""
    any_model: bool = False
    """Whether scales that were found on other weights may be used; the sites must be the same."""

    def bind(self, sites: tuple[str, ...]) -> Callable[[Tensor], Scales]:
        """The found policy's scales; RecipeError where the network has other sites than that on
        which it was found."""
        then = self._policy.sites
        if odd := [site for site in then if site not in sites] or [*{*sites} - {*then}]:
            raise RecipeError(
                f"{self.path}: was found on a network with {spans(then)}; this one has"
                f" {spans(sites)}, which differ in {sorted(odd)[0]}; give a policy of this backbone"
            )
        return self.settled().bind(sites)

    def check_noise(self, noise: Noise) -> None:
        self.settled().check_noise(noise)

    def settled(self) -> Rescaler:
        """The policy as it was found; CheckpointError where its numbers are none that a part of its
        name takes, PluginError where no such part is installed."""
        return _part(self.path, to_json(self._policy.rescaler, self.path).decode())

    def found_on(self) -> Mapping[str, str]:
        return {} if self.any_model else self._policy.model

    def identity(self) -> Mapping[str, Any]:
        """The digest of the policy and its numbers, wherever the file lies."""
        return {"policy": digest_of(to_json(self._policy.rescaler, self.path).decode())}

    def smallest(self, data: DataSpec) -> Mapping[str, Any]:
        """No file, and no scales: small networks have other sites."""
        return {"use": "global"}

    def numbers(self) -> dict[str, float]:
        return {}

    def value_of(self, name: str) -> float:
        raise ValueError(
            'a saved policy has no numbers to search; name a part that has, such as use = "global"'
        )

    @property
    def _policy(self) -> Policy:
        return read_policy(self.path)


@functools.lru_cache(maxsize=16)
def _part(path: str, table: str) -> Rescaler:
    """The part that a table of the file `path` says."""
    import json

    fields = json.loads(table)
    use = fields.pop("use")
    if use == "saved":
        raise CheckpointError(f"{path}: names a policy in another file; give that file")
    part = discover().load("rescaler", use)
    assert issubclass(part, Rescaler)
    try:
        return part.model_validate_json(json.dumps(fields))
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = ".".join(map(str, (use, *fault["loc"])))
        raise CheckpointError(
            f"{path}: {place}: {fault['msg']}; give a file as a search wrote it"
        ) from error
