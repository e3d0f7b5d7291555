"""TensorBoard's event files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import cmkit
from cmkit_trackers.telling import Telling, need

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard(cmkit.Tracker):
    """Event files for `tensorboard --logdir runs`: numbers, pictures and the recipe as text."""

    path: str | None = None
    """The folder; absent = `trackers/tensorboard` in the run's folder."""

    def check(self) -> None:
        need("tensorboard")

    def start(self, run: cmkit.RunInfo) -> cmkit.Listener:
        """A writer; a start that goes on from a checkpoint hides what came after it."""
        folder = Path(self.path).expanduser() / run.name if self.path else run.folder
        return Events(run, folder)


class Events(Telling):
    """The event file of one start."""

    def __init__(self, run: cmkit.RunInfo, folder: Path):
        import torch.utils.tensorboard  # noqa: F401 - it takes seconds, which `on` must not

        super().__init__(run)
        self.folder, self.recipe = folder, run.recipe
        self.writer: SummaryWriter | None = None

    def goes_on(self, step: int) -> None:
        """Open a file, at whose head TensorBoard drops what it has of later steps."""
        self.told = {what: min(known, step) for what, known in self.told.items()}
        self.step = step
        self._open(step + 1)

    def _open(self, purge_step: int | None = None) -> SummaryWriter:
        """The writer, made where there is none yet."""
        from torch.utils.tensorboard import SummaryWriter

        if self.writer is None:
            self.writer = SummaryWriter(str(self.folder), purge_step=purge_step)
            text = json.dumps(self.recipe, indent=1)
            self.writer.add_text("recipe", f"```\n{text}\n```", self.step)
        return self.writer

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        writer = self._open()
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    def picture(self, step: int, name: str, path: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        writer = self._open()
        writer.add_image(name, pixels, step, dataformats="HWC")
        writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
