"""LSUN (Yu, Seff, Zhang, Song, Funkhouser, Xiao, 2015), from files on this disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from cmkit import DataError, Dataset, DataSpec, Reference
from cmkit_std.datasets.image_folder import ImageFolder

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cmkit import Cond
    from cmkit_std.datasets.mdb import Mdb

CHANNELS = 3
CHECKED = 1024


class LSUN(Dataset):
    """Bedrooms, cats, churches and the like, without labels, as LSUN is published.

    `path` is the folder of an unzipped LMDB, such as `bedroom_train_lmdb` with its `data.mdb`, or
    a folder of the pictures that were unpacked from it, which is read as `image_folder` reads it.
    Both are resized and cropped as `image_folder` does. Pictures come in the order of the
    LMDB's keys, or of the names of files. The LMDB is only read, needs no package, and takes
    24 bytes of memory a picture. Nothing is downloaded.
    """

    path: str | None = None
    """The folder; without it nothing can be trained, only compared with `reference_npz`."""
    resolution: int = Field(256, ge=4, le=4096)
    """Height and width after resizing and cropping."""
    flip: bool = False
    """Mirror half of the training images, chosen anew each time; metrics see none mirrored."""
    reference_npz: str | None = None
    """A published reference file (guided-diffusion's or EDM's .npz) that metrics compare with,
    instead of the pictures: three million bedrooms take hours."""

    @model_validator(mode="after")
    def _something(self) -> LSUN:
        if self.path is None and self.reference_npz is None:
            raise ValueError("name the folder by path, or a file by reference_npz")
        return self

    def spec(self) -> DataSpec:
        """Shape; DataError when there are no pictures, or when one that was opened is none.

        Every key and size in an LMDB is checked, but only 1,024 of its pictures are opened,
        spread evenly. The others stop training when it comes to one that is damaged.
        """
        if self.reference_npz:
            from cmkit_std.datasets import reference_npz

            reference_npz.check(Path(self.reference_npz).expanduser(), CHANNELS)
        if self.path is None:
            return DataSpec(CHANNELS, self.resolution)
        records = self._records(self.path)
        if records is None:
            return self._folder(self.path).spec()
        from cmkit_std.datasets.mdb import spread
        from cmkit_std.datasets.pictures import check

        check(records, spread(len(records), CHECKED))
        return DataSpec(CHANNELS, self.resolution)

    def batches(
        self, size: int, seed: int, device: torch.device, start: int = 0
    ) -> Iterator[tuple[Tensor, Cond]]:
        """Endless (x0 in [-1, 1], cond) from batch `start` on, a function of (seed, batch)."""
        if self.path is None:
            raise DataError("dataset.path: missing; name the folder of the pictures to train on")
        records = self._records(self.path)
        if records is None:
            return self._folder(self.path).batches(size, seed, device, start)
        from cmkit_std.datasets.pictures import batches

        shape = (CHANNELS, self.resolution)
        return batches(records, shape, None, self.flip, size, seed, device, start)

    def reference(self) -> Reference:
        """The published statistics, or all pictures, resized and cropped, none mirrored."""
        if self.reference_npz:
            from cmkit_std.datasets import reference_npz

            return reference_npz.read(Path(self.reference_npz).expanduser(), CHANNELS)
        assert self.path is not None
        records = self._records(self.path)
        if records is None:
            return self._folder(self.path).reference()
        from cmkit_std.datasets.pictures import reference

        return reference(records, (CHANNELS, self.resolution))

    def _folder(self, path: str) -> ImageFolder:
        return ImageFolder(
            path=path,
            resolution=self.resolution,
            channels=CHANNELS,
            flip=self.flip,
        )

    def _records(self, path: str) -> Mdb | None:
        """The LMDB in `path`, or None when `path` holds pictures."""
        from cmkit_std.datasets.mdb import Mdb

        root = Path(path).expanduser()
        if (root / "data.mdb").exists():
            return Mdb.open(root)
        below = sorted(root.glob("*/data.mdb"))
        if below:
            raise DataError(
                f"dataset.path = {path!r}: the LMDB is in a folder below; name"
                f" {str(below[0].parent)!r}"
            )
        return None
