"""Your own pictures with captions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from cmkit_std.datasets.on_disk import OnDisk
from pydantic import Field

from cmkit import DataError, DataSpec

if TYPE_CHECKING:
    from cmkit_std.datasets.pictures import Decoder

    from cmkit_latent.captioned import Captioned

CHECKED = 2**14
"""Pictures whose headers are read before a run."""


class Captions(OnDisk):
    """Pictures (PNG, JPEG, WebP, BMP, TIFF, GIF, PPM) and what is said of each.

    `path` is one of

    - a folder of pictures, folders in it too, each with its caption in a .txt file of the same
      name (cat.jpg, cat.txt), or with all captions in one `metadata.jsonl`, whose lines are
      `{"file_name": "cat.jpg", "text": "a cat"}`;
    - a folder of tars as img2dataset and webdataset write them (KEY.jpg, KEY.txt), or one tar.
      Nothing is unpacked: where the members are is looked up once, and kept in the user's cache;
    - a Hugging Face data set, as `save_to_disk` leaves it, or its parquet files, with a column of
      pictures and one of captions (`pip install 'cmkit-latent[datasets]'`).

    Other files are not looked at. A run of white space in a caption counts as one blank. Pictures
    are resized and cropped as by `image_folder` with orientation = "stored". Up to 2 GiB of pixels
    are decoded once and kept, larger sets are decoded as they are needed. Nothing is downloaded.
    """

    path: str
    """The folder, the tar, or the parquet file."""
    resolution: int = Field(ge=4, le=4096)
    """Height and width after resizing and cropping."""
    channels: Literal[1, 3] = 3
    """3 for RGB, 1 for grey."""
    flip: bool = False
    """Mirror half of the training images, chosen anew each time; metrics see none mirrored."""
    empty: float = Field(0.0, ge=0, le=1)
    """Probability with which a picture comes with the unconditional prompt in the place of its
    caption, drawn anew each time, so that guidance can be learned."""
    caption_key: str = "text"
    """The key of captions in `metadata.jsonl`, or their column in a Hugging Face data set."""
    test_path: str | None = None
    """Other pictures like those of `path`, in no batch, for metrics with heldout = true."""

    on_bad: Literal["error", "skip"] = "error"
    """What becomes of pictures without a caption, captions without a picture, and pictures that are
    damaged: an error, or they are left out, after all were decoded once, and listed."""

    def spec(self) -> DataSpec:
        """Shape; DataError names pictures and captions that cannot be used.

        Every caption is read. Of more than 16,384 pictures that many are opened, spread evenly. A
        damaged one among the others stops training when its turn comes.
        """
        from cmkit_std.datasets.pictures import check

        if self.on_bad == "skip":
            self._used()
        else:
            found = self._found()
            count = len(found.source)
            check(found.source, range(0, count, max(1, -(-count // CHECKED))), found.faults)
        return self.declared()

    def declared(self) -> DataSpec:
        """The same, without the files."""
        return DataSpec(self.channels, self.resolution)

    def smallest(self, data: DataSpec | None = None) -> Mapping[str, Any]:
        """Invented images with eight captions."""
        return {**super().smallest(data), "texts": 8}

    def captions(self) -> list[str]:
        """The captions, each once, in the order in which pictures first have them."""
        return self._used().captions

    def heldout(self) -> Captions | None:
        """The pictures of `test_path`."""
        if self.test_path is None:
            return None
        return self.model_copy(update={"path": self.test_path, "test_path": None})

    def identity(self) -> dict[str, Any]:
        """How many pictures are used, how many faults are left out, and digests of the pictures'
        contents and of the captions."""
        used, bad = self._used(), len(self.left_out())
        return {
            "images": len(used.source),
            "pictures": used.source.fingerprint(),
            "captions": used.digest(),
            **({"left_out": bad} if bad else {}),
        }

    def faults(self) -> Iterator[str]:
        """What is wrong with each caption, and each picture that cannot be decoded; reads all."""
        from cmkit_std.datasets.pictures import undecodable

        if self.on_bad == "skip":
            return
        found = self._found()
        yield from found.faults
        yield from undecodable(found.source, self._shape)

    def left_out(self) -> Sequence[str]:
        """What is wrong with each caption and picture that is left out."""
        if self.on_bad == "error":
            return ()
        from cmkit_std.datasets.pictures import judged

        found = self._found()
        return (*found.faults, *filter(None, judged(found.source, self._shape)))

    @property
    def _shape(self) -> tuple[int, int]:
        return self.channels, self.resolution

    def _found(self) -> Captioned:
        from cmkit_latent.captioned import collect

        return collect(self.path, self.caption_key)

    def _used(self) -> Captioned:
        """The pictures and captions that are used; DataError for bad ones, unless told to skip."""
        from cmkit_std.datasets.pictures import judged, refuse

        found = self._found()
        if self.on_bad == "error":
            refuse(found.faults)
            return found
        verdicts = judged(found.source, self._shape)
        sound = [index for index, fault in enumerate(verdicts) if not fault]
        if not sound:
            raise DataError(f"{self.path}: no sound picture with a caption in it; see on_bad")
        return found.only(sound) if len(sound) < len(verdicts) else found

    def _images(self) -> Decoder:
        from cmkit_std.datasets.pictures import Decoder

        used = self._used()
        made = Decoder(used.source, self._shape, flip=self.flip)
        made.captions, made.empty = used.numbers, self.empty
        return made
