"""ImageNet at 64x64, from files on this disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cmkit import DataError, DataSpec
from cmkit_std.datasets import image_folder
from cmkit_std.datasets.on_disk import File, Published, counted

if TYPE_CHECKING:
    from cmkit_std.datasets.pixels import Images


class ImageNet64(Published):
    """1,281,167 photographs of 1,000 classes, 3x64x64.

    `path` is the folder of downsampled ImageNet (Chrabaszcz, Loshchilov and Hutter, 2017), files
    `train_data_batch_1.npz` and on and `val_data.npz`, or a folder of one folder of pictures a
    class, read as `image_folder` reads it with orientation = "stored": ADM crops the middle of the
    original photographs that way, and the two forms are different pictures. Classes are numbered
    from 0.

    An .npz file cannot be read from its middle. The pixels of the split, 15.7 GB, are unpacked once
    into `$XDG_CACHE_HOME/cmkit/imagenet64` (or `~/.cache`), where a training run maps them. The
    first run waits for that, a run after a file changed does so again. Nothing is downloaded.
    """

    split: Literal["train", "val"] = "train"
    """1,281,167 or 50,000 pictures of downsampled ImageNet; a folder of classes has no splits."""

    def spec(self) -> DataSpec:
        """Shape and classes; DataError when files are missing or not right, ResourceError when the
        unpacked pixels will not fit on the disk.

        Of .npz files it reads headers and labels; of pictures in folders the header of each.
        """
        from cmkit_std.datasets.downsampled import CLASSES, check_disk, labels

        self._check_published()
        if self.path is None:
            return DataSpec(channels=3, resolution=64, num_classes=CLASSES)
        if files := self._files():
            if not self.reference_npz:
                check_disk(files)
            return DataSpec(3, 64, CLASSES, counts=counted(labels(files), CLASSES))
        from cmkit_std.datasets.pictures import check

        folder = image_folder.find(self.path, labels=True)
        check(folder, range(len(folder)))
        return DataSpec(3, 64, len(folder.classes), folder.classes, folder.counts())

    def declared(self) -> DataSpec | None:
        """The 1,000 classes where no files are; a folder there may hold fewer."""
        from cmkit_std.datasets.downsampled import CLASSES

        if self.path and Path(self.path).expanduser().exists():
            return None
        return DataSpec(channels=3, resolution=64, num_classes=CLASSES)

    def smallest(self, data: DataSpec | None = None) -> Mapping[str, Any]:
        from cmkit_std.datasets.downsampled import CLASSES

        return super().smallest(DataSpec(3, 64, CLASSES))

    def faults(self) -> Iterator[str]:
        """What is wrong with each picture of a folder of classes that cannot be decoded."""
        from cmkit_std.datasets.pictures import undecodable

        if self.path is None or self._files():
            return iter(())
        return undecodable(image_folder.find(self.path, labels=True), (3, 64))

    def identity(self) -> dict[str, Any]:
        """A digest of the contents, of .npz files without unpacking them; of pictures their number
        as well; and the SHA-256 of `reference_npz`."""
        if self.path is None or not (files := self._files()):
            return super().identity()
        from cmkit_std.datasets.downsampled import fingerprint

        own = {"contents": fingerprint(files)}
        return {**self.model_copy(update={"path": None}).identity(), **own}

    def _images(self) -> Images:
        files = self._files()
        if not files:
            from cmkit_std.datasets.pictures import Decoder

            folder = image_folder.find(str(self.path), labels=True)
            return Decoder(folder, (3, 64), folder.labels(), self.flip)
        from cmkit_std.datasets.downsampled import fingerprint, labels, pixels
        from cmkit_std.datasets.pixels import Mapped

        return Mapped(pixels(files), fingerprint(files), labels(files), self.flip)

    def _files(self) -> tuple[File, ...]:
        """The .npz files of the split; none when `path` is a folder of classes."""
        from cmkit_std.datasets.downsampled import find

        files = find(self._root, self.split)
        if not files and self.split != "train":
            raise DataError(
                f"dataset.path = {self.path!r}: no val_data.npz in it; for a folder of classes"
                " remove dataset.split and name the folder of that split"
            )
        return files
