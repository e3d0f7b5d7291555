"""What every part is: a frozen record of options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from cmkit.values import DataSpec


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
