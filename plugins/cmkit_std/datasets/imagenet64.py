"""ImageNet at 64x64, from files on this disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cmkit import DataError
from cmkit.kinds import Dataset, DataSpec, Reference
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

    path: str
    """The folder."""
    split: Literal["train", "val"] = "train"
    """1,281,167 or 50,000 pictures of downsampled ImageNet; a folder of classes has no splits."""
    flip: bool = False
    """Mirror half of the training images, chosen anew each time; metrics see none mirrored."""
    reference_npz: str | None = None
    """A published reference file (guided-diffusion's or EDM's .npz) that metrics compare with,
    instead of the pictures."""

    def spec(self) -> DataSpec:
        """Shape and classes; DataError when files are missing or not right, ResourceError when the
        unpacked pixels will not fit on the disk.

        Of .npz files it reads headers and labels; of pictures in folders the header of each.
        """
        files = self._files()
        if not files:
            return self._folder().spec()
        from cmkit_std.datasets.downsampled import CLASSES, check_disk, labels

        labels(files)
        if self.reference_npz:
            from cmkit_std.datasets import reference_npz

            reference_npz.check(Path(self.reference_npz).expanduser(), 3)
        else:
            check_disk(files)
        return DataSpec(channels=3, resolution=64, num_classes=CLASSES)

    def batches(
        self, size: int, seed: int, device: torch.device, start: int = 0
    ) -> Iterator[tuple[Tensor, Cond]]:
        """Endless (x0 in [-1, 1], cond) from batch `start` on, a function of (seed, batch)."""
        files = self._files()
        if not files:
            return self._folder().batches(size, seed, device, start)
        from cmkit_std.datasets.downsampled import labels, pixels
        from cmkit_std.datasets.pixels import Mapped, streamed_batches

        images = Mapped(pixels(files))
        return streamed_batches(
            images.row, len(images), labels(files), size, seed, device, start, self.flip
        )

    def reference(self) -> Reference:
        """The published statistics, or all pictures, none mirrored."""
        files = self._files()
        if not files or self.reference_npz:
            return self._folder().reference()
        from cmkit_std.datasets.downsampled import fingerprint, pixels
        from cmkit_std.datasets.pixels import Mapped

        return Reference(Mapped(pixels(files)), fingerprint(files))

    def _folder(self) -> ImageFolder:
        return ImageFolder(
            path=self.path,
            resolution=64,
            labels=True,
            flip=self.flip,
            reference_npz=self.reference_npz,
        )

    def _files(self) -> tuple[downsampled.File, ...]:
        """The .npz files of the split; none when `path` is a folder of classes."""
        from cmkit_std.datasets.downsampled import find

        files = find(Path(self.path).expanduser(), self.split)
        if not files and self.split != "train":
            raise DataError(
                f"dataset.path = {self.path!r}: no val_data.npz in it; for a folder of classes"
                " remove dataset.split and name the folder of that split"
            )
        return files
