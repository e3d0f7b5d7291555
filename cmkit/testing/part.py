"""The laws of the kind that a part is of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cmkit.kinds import CLASSES, Part
from cmkit.testing.backbone import check_backbone
from cmkit.testing.dataset import check_dataset
from cmkit.testing.metric import check_metric
from cmkit.testing.objective import check_objective
from cmkit.testing.precond import check_precond
from cmkit.testing.protocol import ProtocolError
from cmkit.testing.rescaler import check_rescaler
from cmkit.testing.sampler import check_sampler

CHECKS: dict[str, Callable[..., None]] = {
    "backbone": check_backbone,
    "precond": check_precond,
    "objective": check_objective,
    "sampler": check_sampler,
    "rescaler": check_rescaler,
    "dataset": check_dataset,
    "metric": check_metric,
}


def check_part(part: Part, **options: Any) -> None:
    """The check of the part's kind; `options` are that check's."""
    for kind, cls in CLASSES.items():
        if isinstance(part, cls):
            CHECKS[kind](part, **options)
            return
    raise ProtocolError(
        f"{type(part).__name__}: a part is an instance of one of the seven kinds; its bases are"
        f" {', '.join(base.__name__ for base in type(part).__mro__[1:-1])}; subclass one of"
        f" {', '.join('cmkit.' + cls.__name__ for cls in CLASSES.values())}"
    )
