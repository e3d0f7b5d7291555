"""Zero-shot editing with a consistency model (Consistency Models, 2023, algorithm 4)."""

from cmkit.edit.projections import (
    Projection,
    brightness,
    check_levels,
    colorize,
    edit,
    inpaint,
    superres,
)
from cmkit.edit.tasks import Task
