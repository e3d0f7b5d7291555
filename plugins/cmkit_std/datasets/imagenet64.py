"""ImageNet at 64x64, from files on this disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import model_validator

from cmkit import DataError, Dataset, DataSpec, Reference
from cmkit_std.datasets.image_folder import ImageFolder

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cmkit import Cond
    from cmkit_std.datasets import downsampled


class ImageNet64(Dataset):
    """1,281,167 photographs of 1,000 classes, 3x64x64.

    `path` is the folder of downsampled ImageNet (Chrabaszcz, Loshchilov and Hutter, 2017), files
    `train_data_batch_1.npz` and on and `val_data.npz`, or a folder of one folder of pictures a
    class, read as `image_folder` reads it: ADM crops the middle of the original photographs that
    way, and the two forms are different pictures. Classes are numbered from 0.

    An .npz file cannot be read from its middle. The pixels of the split, 15.7 GB, are unpacked once
    into `$XDG_CACHE_HOME/cmkit/imagenet64` (or `~/.cache`), where a training run maps them. The
    first run waits for that, a run after a file changed does so again. Nothing is downloaded.
    """

    path: str | None = None
    """The folder; without it nothing can be trained, only compared with `reference_npz`."""
    split: Literal["train", "val"] = "train"
    """1,281,167 or 50,000 pictures of downsampled ImageNet; a folder of classes has no splits."""
    flip: bool = False
    """Mirror half of the training images, chosen anew each time; metrics see none mirrored."""
    reference_npz: str | None = None
    """A published reference file (guided-diffusion's or EDM's .npz) that metrics compare with,
    instead of the pictures."""

    @model_validator(mode="after")
    def _something(self) -> ImageNet64:
        if self.path is None and self.reference_npz is None:
            raise ValueError("name the folder by path, or a file by reference_npz")
        return self

    def spec(self) -> DataSpec:
        """Shape and classes; DataError when files are missing or not right, ResourceError when the
        unpacked pixels will not fit on the disk.

        Of .npz files it reads headers and labels; of pictures in folders the header of each.
        """
        from cmkit_std.datasets.downsampled import CLASSES, check_disk, labels

        if self.reference_npz:
            from cmkit_std.datasets import reference_npz

            reference_npz.check(Path(self.reference_npz).expanduser(), 3)
        if self.path is None:
            return DataSpec(channels=3, resolution=64, num_classes=CLASSES)
        files = self._files(self.path)
        if not files:
            return self._folder(self.path).spec()
        labels(files)
        if not self.reference_npz:
            check_disk(files)
        return DataSpec(channels=3, resolution=64, num_classes=CLASSES)

    def declared(self) -> DataSpec | None:
        """The 1,000 classes where no files are; a folder there may hold fewer."""
        from cmkit_std.datasets.downsampled import CLASSES

        if self.path and Path(self.path).expanduser().exists():
            return None
        return DataSpec(channels=3, resolution=64, num_classes=CLASSES)

    def batches(
        self, size: int, seed: int, device: torch.device, start: int = 0
    ) -> Iterator[tuple[Tensor, Cond]]:
        """Endless (x0 in [-1, 1], cond) from batch `start` on, a function of (seed, batch)."""
        if self.path is None:
            raise DataError("dataset.path: missing; name the folder of the pictures to train on")
        files = self._files(self.path)
        if not files:
            return self._folder(self.path).batches(size, seed, device, start)
        from cmkit_std.datasets.downsampled import labels, pixels
        from cmkit_std.datasets.pixels import Mapped, streamed_batches

        images = Mapped(pixels(files))
        return streamed_batches(
            images.row, len(images), labels(files), size, seed, device, start, self.flip
        )

    def reference(self) -> Reference:
        """The published statistics, or all pictures, none mirrored."""
        if self.reference_npz:
            from cmkit_std.datasets import reference_npz

            return reference_npz.read(Path(self.reference_npz).expanduser(), 3)
        assert self.path is not None
        files = self._files(self.path)
        if not files:
            return self._folder(self.path).reference()
        from cmkit_std.datasets.downsampled import fingerprint, pixels
        from cmkit_std.datasets.pixels import Mapped

        return Reference(Mapped(pixels(files)), fingerprint(files))

    def _folder(self, path: str) -> ImageFolder:
        return ImageFolder(
            path=path,
            resolution=64,
            labels=True,
            flip=self.flip,
        )

    def _files(self, path: str) -> tuple[downsampled.File, ...]:
        """The .npz files of the split; none when `path` is a folder of classes."""
        from cmkit_std.datasets.downsampled import find

        files = find(Path(path).expanduser(), self.split)
        if not files and self.split != "train":
            raise DataError(
                f"dataset.path = {path!r}: no val_data.npz in it; for a folder of classes"
                " remove dataset.split and name the folder of that split"
            )
        return files
