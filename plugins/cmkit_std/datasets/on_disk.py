"""What data sets share whose images are files on this disk."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import model_validator

from cmkit import DataError, Dataset, Reference
from cmkit.files import cached_sha256

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cmkit import Cond
    from cmkit_std.datasets.pixels import Images


@dataclass(frozen=True)
class File:
    """A file, with the size and time by which a change is noticed."""

    path: Path
    size: int
    mtime_ns: int

    @classmethod
    def at(cls, path: Path, cure: str = "remove it") -> File:
        """The file at `path`; DataError when it cannot be looked at, or is no regular file."""
        try:
            info = path.stat()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error
        if not path.is_file():
            raise DataError(f"{path}: no regular file; {cure}")
        return cls(path, info.st_size, info.st_mtime_ns)


def counted(labels: Iterable[int], classes: int) -> tuple[int, ...]:
    """How many images each class has."""
    found = Counter(map(int, labels))
    return tuple(found[label] for label in range(classes))


class OnDisk(Dataset):
    """A data set of files on this disk."""

    @abstractmethod
    def _images(self) -> Images:
        """The images and their classes; DataError for a file that is missing or not right."""

    def batches(
        self, size: int, seed: int, device: torch.device, start: int = 0
    ) -> Iterator[tuple[Tensor, Cond]]:
        """Endless (x0 in [-1, 1], cond) from batch `start` on, a function of (seed, batch)."""
        return self._images().batches(size, seed, device, start)

    def pictures(self) -> Images:
        """The images by number."""
        return self._images()

    def identity(self) -> dict[str, Any]:
        """How many images there are, and a digest of their contents."""
        images = self._images()
        return {"images": len(images), "contents": images.fingerprint()}

    def reference(self) -> Reference:
        """The images, none mirrored, and what is said of each."""
        images, texts = self._images(), self.captions()
        said = None
        if texts is not None and images.captions is not None:
            said = [texts[number] for number in images.captions]
        return Reference(images, images.fingerprint(), captions=said)


class Published(OnDisk):
    """A data set of a folder, with which published statistics may stand for its images."""

    read_by = {"reference_npz": ("search", "metric")}

    path: str | None = None
    """The folder; without it nothing can be trained, only compared with `reference_npz`."""
    flip: bool = False
    """Mirror half of the training images, chosen anew each time; metrics see none mirrored."""
    reference_npz: str | None = None
    """A published reference file (guided-diffusion's or EDM's .npz) that metrics compare with,
    instead of the pictures."""

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.path is None and self.reference_npz is None:
            raise ValueError("name the folder by path, or a file by reference_npz")
        return self

    @property
    def _channels(self) -> int:
        return 3

    @property
    def _root(self) -> Path:
        if self.path is None:
            raise DataError("dataset.path: missing; name the folder of the pictures to train on")
        return Path(self.path).expanduser()

    def _check_published(self) -> None:
        """DataError when the headers in the file of `reference_npz` are not of such images."""
        if self.reference_npz:
            from cmkit_std.datasets import reference_npz

            reference_npz.check(Path(self.reference_npz).expanduser(), self._channels)

    def identity(self) -> dict[str, Any]:
        """How many images the folder has and a digest of their contents, if there is a folder; and
        the SHA-256 of `reference_npz`."""
        found = super().identity() if self.path is not None else {}
        if self.reference_npz:
            found["reference_npz"] = cached_sha256(Path(self.reference_npz).expanduser())
        return found

    def reference(self) -> Reference:
        """The published statistics, or the images, none mirrored."""
        if not self.reference_npz:
            return super().reference()
        from cmkit_std.datasets import reference_npz

        return reference_npz.read(Path(self.reference_npz).expanduser(), self._channels)
